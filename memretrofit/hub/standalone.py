"""Base and memory as one checkpoint, which Transformers loads by code of ours or not at all.

::

    my_model/
      config.json               model_type "memretrofit", which Transformers does not know
      modeling_memretrofit.py   names the two classes below
      base/                     the base model, as Transformers saves it
      memory/                   what save_pretrained writes, without a card
      README.md, tokenizer

No weights lie where a loader that ignores `config.json` would look, and no adapter where PEFT would
put it onto another base: without this code nothing loads.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from memretrofit import __version__
from memretrofit.card import STANDALONE
from memretrofit.errors import CheckpointError, StateError, UnsupportedModelError
from memretrofit.files import write_json
from memretrofit.hub.base import ORIGIN, load_base
from memretrofit.hub.folder import staging, sync
from memretrofit.hub.loading import from_pretrained
from memretrofit.hub.record import CARD, NAMED, read_record
from memretrofit.hub.record import CONFIG as RECORD
from memretrofit.hub.remote import download
from memretrofit.hub.saving import card_of, check_savable, write_files
from memretrofit.patching.wrapping import unwrapped
from memretrofit.retrofit import ledger_of

CONFIG, CODE = "config.json", "modeling_memretrofit.py"
BASE, MEMORY = "base", "memory"
MODEL_TYPE = "memretrofit"
_PATTERNS = [
    *(f"{BASE}/{pattern}" for pattern in ("*.json", "*.safetensors")),
    *(f"{MEMORY}/{name}" for name in (RECORD, *NAMED)),
]
_STUB = '''"""Loads this checkpoint: a base model, and the memory that memretrofit gave it."""

from memretrofit.hub.standalone import StandaloneConfig, StandaloneForCausalLM
'''
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only")
_OF_AUTO_CLASSES = (
    "config",
    "trust_remote_code",
    "adapter_kwargs",
    "code_revision",
    "proxies",
    "_commit_hash",
    "_from_auto",
)
"""What the auto classes pass on, and the base does not need."""
_WRAPPED = re.compile(r"\.(base_layer|original_module)(?=\.)")
"""What PEFT puts into the names of the modules that it wraps."""


def export_standalone(
    model: nn.Module,
    directory: str | Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Write a patched model with its base: where memretrofit is installed,
    `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` gives the same model.

    With remote code off, or without memretrofit, it is an error and never the base alone.

    Args:
        model: a patched model, or the PeftModel around one; it does not change.
        directory: made where it is missing; must hold no checkpoint.
        recipe, results: see `save_pretrained`.
        tokenizer: saved beside `config.json`.

    Raises:
        StateError: see `save_pretrained`.
        UnsupportedModelError: the base model is quantised, or its code is not in Transformers.
        CheckpointError: the directory holds a checkpoint, or cannot be written to.
    """
    directory = Path(directory).expanduser()
    check_savable(model)
    inner: Any = unwrapped(model)
    if getattr(inner, "hf_quantizer", None) is not None or inner.is_remote_code():
        raise UnsupportedModelError(
            f"export_standalone: this {type(inner).__name__} is quantised or has code of its own. "
            "Load the base unquantised, or publish the memory alone with push_to_hub."
        )
    if (directory / CONFIG).exists():
        raise CheckpointError(
            f"{directory} holds a checkpoint already ({CONFIG}). Choose another folder, or delete "
            "it first."
        )
    with staging(directory) as staged:
        inner.save_pretrained(staged / BASE, state_dict=base_state(model))
        memory = staged / MEMORY
        memory.mkdir()
        write_files(model, memory, name=directory.name, recipe=recipe, results=results)
        record = read_record(memory)
        text = card_of(record, directory.resolve().name, form=STANDALONE)
        (memory / CARD).unlink()
        (staged / CARD).write_text(text, encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        (staged / CODE).write_text(_STUB, encoding="utf-8")
        write_json(staged / CONFIG, _config(inner))
        for path in staged.rglob("*"):
            sync(path)
        # the config last: without it there is nothing to load
        for path in sorted(staged.iterdir(), key=lambda path: path.name == CONFIG):
            os.replace(path, directory / path.name)
        sync(directory)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own tensors, under the names that they have without memory and PEFT."""
    inner = unwrapped(model)
    memories = tuple(f"{site}.memory." for site in ledger_of(model).seams)
    return {
        _WRAPPED.sub("", name): tensor
        for name, tensor in inner.state_dict().items()
        if not name.startswith(memories) and not _of_adapter(name)
    }


def _of_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def _config(inner: Any) -> dict[str, Any]:
    code = CODE.removesuffix(".py")
    return {
        "model_type": MODEL_TYPE,
        "architectures": [StandaloneForCausalLM.__name__],
        "auto_map": {
            "AutoConfig": f"{code}.{StandaloneConfig.__name__}",
            "AutoModelForCausalLM": f"{code}.{StandaloneForCausalLM.__name__}",
        },
        "base_model_type": inner.config.model_type,
        "vocab_size": inner.config.get_text_config(decoder=True).vocab_size,
        "memretrofit_version": __version__,
    }


class StandaloneConfig(PreTrainedConfig):
    """`config.json` of a standalone checkpoint. The base model's own is in `base/`."""

    model_type = MODEL_TYPE


class StandaloneForCausalLM(PreTrainedModel):
    """What the auto class calls; the model that it gives is the base's own class, patched."""

    config_class = StandaloneConfig

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        raise StateError(
            "A standalone checkpoint is not built from its config, which has no architecture. Call "
            "from_pretrained."
        )

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        bank: str | Path | None = None,
        **model_kwargs: Any,
    ) -> Any:
        """The patched model that `export_standalone` wrote.

        Args:
            pretrained_model_name_or_path: folder, or Hub id `owner/name`.
            revision: commit, branch or tag on the Hub.
            token: for the Hub.
            bank: see `memretrofit.from_pretrained`.
            model_kwargs: for the base model.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another base model.
        """
        told = {name: model_kwargs.pop(name, None) for name in (*_HUB_OPTIONS, *_OF_AUTO_CLASSES)}
        folder = Path(pretrained_model_name_or_path).expanduser()
        if not folder.is_dir():
            options = {name: told[name] for name in _HUB_OPTIONS if told[name] is not None}
            repo_id = str(pretrained_model_name_or_path)
            folder = download(repo_id, revision, token, patterns=_PATTERNS, **options)
        record = read_record(folder / MEMORY)
        base = load_base(folder / BASE, use_safetensors=True, **model_kwargs)
        origin = {name: getattr(record.base, name) for name in ("model", "revision", "gguf_file")}
        setattr(base, ORIGIN, origin)
        return from_pretrained(folder / MEMORY, base=base, bank=bank)
