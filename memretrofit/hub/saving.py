"""Write a memory to a folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from memretrofit import __version__
from memretrofit.card import ADDED, Form, render_card
from memretrofit.errors import StateError
from memretrofit.hub.adapter import save_adapter
from memretrofit.hub.base import base_record
from memretrofit.hub.delta_file import save_delta
from memretrofit.hub.folder import publish, staging
from memretrofit.hub.mapped import Written, write_pieces
from memretrofit.hub.record import (
    CARD,
    CONFIG,
    DELTA,
    MEMORY,
    REPORT,
    TASKS,
    Record,
    method_hash,
    read_json,
    read_record,
)
from memretrofit.hub.tensors import not_finite, sha256, spec_of
from memretrofit.methods import get_method
from memretrofit.modules.table import Table
from memretrofit.patching.ffn import BankLedger, bank_of
from memretrofit.patching.ledger import Ledger
from memretrofit.patching.wrapping import unwrapped
from memretrofit.retrofit import ledger_of


def save_pretrained(
    model: nn.Module,
    directory: str | Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
) -> None:
    """Save a patched model's memory (and PEFT adapter); `from_pretrained` gives the same model.

    Writes `memory_config.json`, `memory.safetensors`, the adapter's two files where `model` is a
    PeftModel, and a card, `README.md`. Base weights are not written. A kill at any moment leaves
    what was there before, or all of the new.

    Args:
        model: a patched model, or the PeftModel around one.
        directory: made where it is missing; other files in it stay.
        recipe: what trained it, `Recipe.to_dict()`.
        results: what was measured, as `render_card` takes it.
        tokenizer: saved beside the memory, and its fingerprint recorded.

    Raises:
        StateError: the model is not patched, a parameter is nan or infinite, or its adapter cannot
            be saved as it is.
        CheckpointError: the directory cannot be written to; what it held can still be loaded.
        ConfigError: recipe or results are not JSON.
    """
    directory = Path(directory)
    check_savable(model)
    with staging(directory) as staged:
        written = write_files(
            model,
            staged,
            name=directory.resolve().name,
            recipe=recipe,
            results=results,
            tokenizer=tokenizer,
        )
        publish(staged, directory, written.named, written.after)


@dataclass(frozen=True, kw_only=True)
class Files:
    """Names of the files beside the record, in the order in which they replace older ones."""

    named: list[str]
    """What the record names, and the tokenizer's files."""
    after: list[str]
    """What describes it."""


def check_savable(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the memory, under their names in the base model.

    Raises:
        StateError: the model is not patched, or a value is nan or infinite.
    """
    tensors = memory_tensors(ledger_of(model))
    if wrapped := [name for name in tensors if ".base_layer." in name or ".lora_" in name]:
        raise StateError(
            f"Refusing to save: a PEFT adapter wraps the memory itself ({wrapped[0]}), and a file "
            "of that form could not be loaded. Adapt the base only: exclude_modules='.*memory.*'."
        )
    if faulty := not_finite(tensors):
        raise StateError(
            f"Refusing to save: nan or infinity in {len(faulty)} of {len(tensors)} memory "
            f"tensors, first {faulty[0]}. "
            "Go back to an earlier checkpoint, and train with a smaller learning rate."
        )
    return tensors


def memory_tensors(ledger: Ledger) -> dict[str, Tensor]:
    """What a file of a patched model's memory holds: `<module>.memory.<name>`. What a bank's tables
    learned is a file of its own (`hub.delta_file`).
    """
    return {
        f"{site}.memory.{inner}": tensor
        for site, seam in ledger.seams.items()
        for inner, tensor in seam.memory.state_dict().items()
        if not re.fullmatch(r"tables\.\w+\.delta(_index)?", inner)
    }


def row_identities(ledger: Ledger) -> dict[str, str]:
    """Which rows the tables of a bank learned over; of another memory nothing."""
    if not isinstance(ledger, BankLedger):
        return {}
    return {name: table.source.identity for name, table in ledger.bank.each_table()}


def opened_tables(ledger: Ledger) -> dict[str, Table]:
    """The tables of a bank that learned something; of another memory none."""
    if not isinstance(ledger, BankLedger):
        return {}
    return {name: table for name, table in ledger.bank.each_table() if table.opened}


def write_files(
    model: nn.Module,
    folder: Path,
    *,
    name: str,
    recipe: Mapping[str, Any] | None,
    results: Mapping[str, Any] | None,
    tokenizer: Any = None,
    base_model: str | None = None,
) -> Files:
    """Write a saved memory into an empty folder; `name` is what the card calls it, `base_model`
    what the base is called, where that is not the name that it was loaded by.
    """
    tensors = check_savable(model)
    method = ledger_of(model).config
    base = base_record(model, recipe, tokenizer)
    if base_model is not None:
        base = replace(base, model=base_model, revision=None, gguf_file=None)
    tokenizer_files = _save_tokenizer(tokenizer, folder)
    # the memory comes first: from then on an adapter beside it is not taken for that of the old one
    files = [MEMORY, *save_adapter(model, folder)]
    metadata = {"method_sha256": method_hash(method)}
    if sources := row_identities(ledger_of(model)):
        metadata["tables"] = json.dumps(sources)
    # not write_tensors: safetensors writes metadata in any order, and a push that goes on after an
    # interruption knows by its hash what has arrived
    write_pieces(folder / MEMORY, {key: Written.whole(x) for key, x in tensors.items()}, metadata)
    if opened := opened_tables(ledger_of(model)):
        save_delta(opened, folder / DELTA, meaning=bank_of(unwrapped(model)).meaning())
        files.append(DELTA)
    hashes = {file: sha256(folder / file) for file in files}
    record = Record(
        method=method,
        base=base,
        tensors={key: spec_of(tensor) for key, tensor in tensors.items()},
        files=hashes,
        recipe=recipe,
        results=results,
        version=__version__,
    )
    (folder / CONFIG).write_text(record.to_json(), encoding="utf-8")
    (folder / CARD).write_text(card_of(record, name), encoding="utf-8")
    return Files(named=[*tokenizer_files, *files], after=[CARD])


def read_results(directory: str | Path) -> Mapping[str, Any] | None:
    """What was measured of a saved memory: `report.json` where there is one, else its record's.

    `tasks` is the report of a task run in its folder `tasks`, where there is one.
    """
    path = Path(directory) / REPORT
    results = read_json(path) if path.exists() else read_record(directory).results
    tasks = Path(directory) / TASKS / REPORT
    return {**(results or {}), "tasks": read_json(tasks)} if tasks.exists() else results


def write_card(directory: str | Path, *, name: str | None = None, limits: str = "") -> Path:
    """Render a saved memory's card again, from its record and `report.json` where there is one.

    Args:
        directory: what `save_pretrained` wrote.
        name: what the card calls it; None takes the folder's.
        limits: Markdown: what it does not do, what was tried and failed.

    Raises:
        CheckpointError: no memory there, a damaged record or report, or nothing can be written.
    """
    directory = Path(directory)
    record = replace(read_record(directory), results=read_results(directory))
    with staging(directory) as staged:
        text = card_of(record, name or directory.resolve().name, limits)
        (staged / CARD).write_text(text, encoding="utf-8")
        os.replace(staged / CARD, directory / CARD)
    return directory / CARD


def card_of(record: Record, name: str, limits: str = "", form: Form = ADDED) -> str:
    """The card of a saved memory."""
    base = record.base
    return render_card(
        name=name,
        config=record.method.to_dict(),
        base={
            "model": base.model or f"an unnamed {base.model_type} model",
            "revision": base.revision,
            "fingerprint": base.weight_fingerprint,
        },
        recipe=record.recipe,
        results=record.results,
        paper=get_method(record.method.method).paper,
        limits=limits,
        hashes=record.files,
        form=form,
    )


def _save_tokenizer(tokenizer: Any, folder: Path) -> list[str]:
    if tokenizer is None:
        return []
    tokenizer.save_pretrained(folder)
    return sorted(path.name for path in folder.iterdir())
