"""Put a saved memory back onto its base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memretrofit.errors import CheckpointError, ConfigError
from memretrofit.hub.adapter import attach_adapter
from memretrofit.hub.bank_file import open_bank
from memretrofit.hub.base import check_base, find_base, load_base
from memretrofit.hub.delta_file import load_delta
from memretrofit.hub.folder import locate
from memretrofit.hub.record import (
    ADAPTER,
    ADAPTER_CONFIG,
    DELTA,
    MEMORY,
    Record,
    method_hash,
    read_record,
)
from memretrofit.hub.remote import download
from memretrofit.hub.saving import memory_tensors, row_identities
from memretrofit.hub.tensors import (
    TensorSpec,
    damaged,
    differences,
    listing,
    read_header,
    read_tensors,
    spec_of,
)
from memretrofit.patching.ffn import bank_of
from memretrofit.patching.wrapping import unwrapped
from memretrofit.retrofit import ledger_of, patch, unpatch


def from_pretrained(
    path_or_repo: str | Path,
    *,
    base: PreTrainedModel | str | Path | None = None,
    bank: str | Path | None = None,
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
        bank: folder that `write_bank` wrote: rows of a bank's tables, read from there by memory
            map. None: as its method makes them.
        revision: commit, branch or tag of the memory's repository.
        token: for the Hub.
        model_kwargs: for `AutoModelForCausalLM.from_pretrained`. A recorded base is loaded from
            safetensors (or GGUF) alone unless `use_safetensors=False`.

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
        if bank is not None:
            attach_bank(model, bank)
        _check_rows(model, folder / MEMORY)
        if DELTA in record.files:
            merge_delta(model, folder / DELTA)
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
    origin: dict[str, Any] = {
        "revision": record.base.revision,
        "gguf_file": record.base.gguf_file,
    }
    if find_base(record.base.model, record.base.gguf_file)[1] is None:
        origin["use_safetensors"] = True  # no pickle is opened because a file names it
    return load_base(record.base.model, **{**origin, **model_kwargs})


def _read_memory(folder: Path, record: Record) -> dict[str, Tensor]:
    """The tensors of a memory, as its record lists them."""
    path = folder / MEMORY
    found, metadata, _ = read_header(path)
    lines = differences(record.tensors, found)
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


def _check_rows(model: nn.Module, path: Path) -> None:
    """Refuse to read other rows than those that a bank was saved with: they are no part of it."""
    wanted = read_header(path).metadata.get("tables")
    found = row_identities(ledger_of(model))
    try:
        saved = json.loads(wanted) if wanted else {}
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        raise damaged(path, "it does not say which rows its tables had")
    if lines := [f"{name}: {saved.get(name)}" for name in found if found[name] != saved.get(name)]:
        raise CheckpointError(
            f"{path} was saved with rows that its method does not make:{listing(lines)}\n"
            "Pass bank=, the folder in which write_bank wrote them."
        )


def _assign(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give the fresh memory of `model` the saved values, in the saved dtype."""
    ledger = ledger_of(model)
    expected = {
        # a memory may have been cast since it was made: the file's dtype is the one to restore
        name: TensorSpec(_saved_shape(x, tensors.get(name)), _saved_dtype(x, tensors.get(name)))
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


def _saved_shape(mine: Tensor, saved: Tensor | None) -> tuple[int, ...]:
    """What a bank fitted to its texts is empty before, and has as many entries as they gave it."""
    fitted = saved is not None and mine.shape[:1] == (0,) and saved.shape[1:] == mine.shape[1:]
    return tuple(saved.shape if fitted else mine.shape)  # type: ignore[union-attr]


def _saved_dtype(mine: Tensor, saved: Tensor | None) -> str:
    """Numbers may be saved in any floating point type; hash constants and counts are exact."""
    free = saved is not None and mine.is_floating_point() and saved.is_floating_point()
    return spec_of(saved if free else mine).dtype  # type: ignore[arg-type]


def attach_bank(model: Any, directory: str | Path) -> None:
    """Let the tables of a patched model read the rows that `write_bank` wrote, by memory map.

    Raises:
        StateError: the model has no bank, or one of other sizes.
        CheckpointError: the folder holds no usable bank, or not all of its tables.
    """
    bank, found = bank_of(unwrapped(model)), open_bank(directory)
    tables = dict(bank.each_table())
    if missing := sorted(set(tables) - set(found)):
        raise CheckpointError(
            f"{directory} has tables {', '.join(sorted(found))}, and this bank also needs "
            f"{', '.join(missing)}. Open the folder that was written for it."
        )
    for name, table in tables.items():
        table.check_attach(found[name])
    for name, table in tables.items():
        table.attach(found[name])


def merge_delta(model: Any, path: str | Path) -> None:
    """Add what another bank of the same rows learned (`delta.safetensors`) to a patched model's.

    Raises:
        StateError: the model has no bank, or both hold a row with other values.
        CheckpointError: the file is damaged or belongs to other rows. Nothing was merged.
    """
    bank = bank_of(unwrapped(model))
    tables = dict(bank.each_table())
    deltas = load_delta(path, tables, meaning=bank.meaning())
    for name, delta in deltas.items():
        tables[name].check_merge(*delta)
    for name, delta in deltas.items():
        tables[name].merge(*delta)
