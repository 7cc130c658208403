"""Put a saved memory back onto its base model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memretrofit.errors import CheckpointError, ConfigError
from memretrofit.hub.adapter import attach_adapter
from memretrofit.hub.base import check_base, load_base
from memretrofit.hub.folder import locate
from memretrofit.hub.record import ADAPTER, ADAPTER_CONFIG, MEMORY, Record, method_hash, read_record
from memretrofit.hub.remote import download
from memretrofit.hub.saving import memory_tensors
from memretrofit.hub.tensors import (
    FLOATING,
    TensorSpec,
    differences,
    listing,
    read_header,
    read_tensors,
    spec_of,
)
from memretrofit.retrofit import ledger_of, patch, unpatch


def from_pretrained(
    path_or_repo: str | Path,
    *,
    base: PreTrainedModel | str | Path | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **model_kwargs: Any,
) -> Any:
    """The patched model that `save_pretrained` or `push_to_hub` saved.

    Everything in the folder is checked before the base model is loaded, and the base model before
    it is patched. An error leaves a `base` that was passed in as it was.

    Args:
        path_or_repo: folder, or Hub id `owner/name`.
        base: the base model, which is patched in place; or where to load it from, as in
            `load_base`. None loads the base that is recorded, at its revision and in its dtype.
        revision: commit, branch or tag of the memory's repository.
        token: for the Hub.
        model_kwargs: for `AutoModelForCausalLM.from_pretrained`.

    Returns:
        The patched model in evaluation mode; the PeftModel around it where an adapter was saved.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit; another base model; no
            connection.
        StateError: `base` is patched already, or holds PEFT layers beside which an adapter cannot
            stand.
        UnsupportedModelError, ConfigError: the recorded method does not fit the base.
    """
    directory = Path(path_or_repo).expanduser()
    if not directory.is_dir():
        directory = download(str(path_or_repo), revision, token)
    record = read_record(directory)
    folder = locate(directory, record)
    tensors = _read_memory(folder, record)
    model = _base_model(record, base, token, model_kwargs)
    check_base(model, record.base, directory)
    patch(model, record.method)
    try:
        _assign(model, tensors, folder / MEMORY)
        beside = folder == directory and (folder / ADAPTER_CONFIG).is_file()
        has_adapter = ADAPTER in record.files or beside
        return attach_adapter(model, folder) if has_adapter else model
    except BaseException:
        unpatch(model)
        raise


def _base_model(record: Record, base: Any, token: Any, model_kwargs: dict[str, Any]) -> Any:
    if isinstance(base, nn.Module):
        if model_kwargs:
            raise ConfigError(
                f"{', '.join(model_kwargs)}: options for loading a base model, but base= is a "
                "model already. Leave one out."
            )
        return base
    model_kwargs = {
        "dtype": getattr(torch, record.base.dtype, None),
        "token": token,
        **model_kwargs,
    }
    if base is not None:
        return load_base(base, **model_kwargs)
    if not record.base.model:
        raise CheckpointError(
            f"The memory was made for {record.base}, which was built and not loaded, so it cannot "
            "be loaded again. "
            "Pass it: from_pretrained(..., base=model)."
        )
    origin = {"revision": record.base.revision, "gguf_file": record.base.gguf_file}
    return load_base(record.base.model, **{**origin, **model_kwargs})


def _read_memory(folder: Path, record: Record) -> dict[str, Tensor]:
    """The tensors of a memory, as its record lists them."""
    path = folder / MEMORY
    found, metadata = read_header(path)
    lines = differences(record.tensors, found)
    lines += [
        f"{name}: {spec} is not floating point"
        for name, spec in found.items()
        if spec.dtype not in FLOATING
    ]
    lines += [f"{name}: not a tensor of a memory" for name in found if ".memory." not in name]
    if lines:
        raise CheckpointError(
            f"{path} does not hold what its record lists:{listing(lines)}\nSave it again."
        )
    if metadata.get("method_sha256") != method_hash(record.method):
        raise CheckpointError(
            f"{path} was saved with another method config than the one in the record, "
            f"{record.method}. Undo the edit; to try "
            "another window use memretrofit.patching.controls.window_override."
        )
    return read_tensors(path)


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give the fresh memory of `model` the saved values, in the saved dtype."""
    ledger = ledger_of(model)
    expected = {
        # a memory may have been cast since it was made: the file's dtype is the one to restore
        name: TensorSpec(
            tuple(x.shape), spec_of(tensors[name]).dtype if name in tensors else spec_of(x).dtype
        )
        for name, x in memory_tensors(ledger).items()
    }
    if lines := differences(expected, {name: spec_of(x) for name, x in tensors.items()}):
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__} with "
            f"{ledger.config}:{listing(lines)}\nNothing was patched."
        )
    for site, seam in ledger.seams.items():
        prefix = f"{site}.memory."
        device = next(model.get_submodule(site).parameters()).device
        own = {
            name[len(prefix) :]: x.to(device)
            for name, x in tensors.items()
            if name.startswith(prefix)
        }
        seam.memory.load_state_dict(own, strict=True, assign=True)
