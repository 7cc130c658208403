"""`remembered.json`: what a saved conversation is, of which model, and in which files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from memretrofit.config import MethodConfig, build
from memretrofit.errors import CheckpointError, ConfigError
from memretrofit.hub.mapped import map_tensors, sample_sha256
from memretrofit.hub.record import BaseRecord, TensorSpec, read_json
from memretrofit.hub.tensors import Header, differences, listing, read_header, sha256

RECORD = "remembered.json"
TOKENS = "tokens.safetensors"
SCHEMA_VERSION = 2
DATA = re.compile(r"data-[0-9a-f]{12}")
"""Names of the folders that a save makes."""
_LAYER = re.compile(r"layer-\d{3,}\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def layer_file(place: int) -> str:
    """Name of the file of one layer."""
    return f"layer-{place:03d}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """What `remembered.json` says."""

    folder: Path
    method: MethodConfig
    base: BaseRecord
    added_sha256: str
    """Of what was added to the base model: the memory's parameters and an adapter's."""
    tokens: int
    """Tokens of each row, padding included."""
    rows: int
    layers: int
    data: str
    """Folder of the files."""
    files: Mapping[str, Mapping[str, Any]]
    """File name -> `bytes`, `sha256` of the whole, `sample` as `sample_sha256` says it."""
    text_name: str | None = None
    text_sha256: str | None = None

    def nbytes(self) -> int:
        """Bytes on disk."""
        return sum(entry["bytes"] for entry in self.files.values())

    def path(self, name: str) -> Path:
        """Where one of `files` lies."""
        return self.folder / self.data / name


def read_remembered(folder: str | Path) -> Remembered:
    """The record of a saved conversation; no other file is read.

    Raises:
        CheckpointError: there is none, or it is damaged or from another release.
    """
    folder = Path(folder)
    path = folder / RECORD
    if not path.is_file():
        raise CheckpointError(
            f"No {RECORD} in {folder}, so there is nothing remembered to load. Pass a folder that "
            "save_memory or `memretrofit remember` wrote; one whose first save was interrupted "
            "has none."
        )
    found = read_json(path)
    version = found.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema_version={version!r}, written by memretrofit "
            f"{found.get('memretrofit_version')!r}; this release reads {SCHEMA_VERSION}. Install "
            "the release that wrote it, or read and save the text again."
        )
    faults = [
        f"{name}: not a whole number above 0"
        for name in ("tokens", "rows", "layers")
        if type(found.get(name)) is not int or found[name] < 1
    ]
    faults += [
        f"{name}: not a text"
        for name in ("text_name", "text_sha256")
        if not isinstance(found.get(name), (str, type(None)))
    ]
    if not isinstance(found.get("added_sha256"), str):
        faults.append("added_sha256: missing")
    if not DATA.fullmatch(str(found.get("data"))):
        faults.append("data: not a folder of a saved conversation")
    files = found.get("files")
    files = files if isinstance(files, dict) else {}
    faults += [f"{name}: not a file entry" for name, x in files.items() if not _is_entry(name, x)]
    if not faults and len([name for name in files if name != TOKENS]) != found["layers"]:
        faults.append(f"files: expected {found['layers']} layers, found {len(files)} files")

    def section(name: str, read: Callable[[dict[str, Any]], Any]) -> Any:
        try:
            return read(found[name] if isinstance(found.get(name), dict) else {})
        except ConfigError as error:
            faults.extend(f"{name}.{problem}" for problem in error.problems)

    sections: dict[str, Any] = {
        "method": section("method", MethodConfig.from_dict),
        "base": section("base", lambda values: build(BaseRecord, values)),
    }
    if faults:
        raise CheckpointError(f"{path} is not a record that save_memory wrote:{listing(faults)}")
    named = ("added_sha256", "tokens", "rows", "layers", "data", "text_name", "text_sha256")
    sections |= {name: found.get(name) for name in named}
    return Remembered(folder=folder, files=files, **sections)


def remembered_ids(folder: str | Path) -> Tensor:
    """The token ids [B, T] that were saved with a conversation: what `generate` wants to see
    before a question.

    Raises:
        CheckpointError: they were not saved, or the file is damaged.
    """
    record = read_remembered(folder)
    if TOKENS not in record.files:
        raise CheckpointError(
            f"{record.folder} was saved without its token ids. Pass input_ids= to save_memory, or "
            "keep the ids yourself."
        )
    path = record.path(TOKENS)
    header = checked_header(record, path)
    expected = {"input_ids": TensorSpec((record.rows, record.tokens), "I64")}
    if lines := differences(expected, header.specs):
        raise CheckpointError(f"{path}:{listing(lines)}\nSave the text again.")
    return map_tensors(path, header)["input_ids"].clone()


def verify_memory(folder: str | Path) -> Remembered:
    """Read every file of a saved conversation in full, and compare its hash.

    Raises:
        CheckpointError: one is missing, or is not the file that was saved.
    """
    record = read_remembered(folder)
    for name, entry in record.files.items():
        path = record.path(name)
        checked_header(record, path)
        if sha256(path) != entry["sha256"]:
            raise _not_the_file(path)
    return record


def checked_header(record: Remembered, path: Path) -> Header:
    """What the header of one of the record's files states, when it is the file that was saved.

    Raises:
        CheckpointError: missing, truncated, damaged, or another file.
    """
    entry = record.files.get(path.name)
    if entry is None or not path.is_file():
        raise CheckpointError(
            f"{path} is missing; {RECORD} names it. Copy the whole folder again, or read and save "
            "the text again."
        )
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(
            f"{path} has {size} bytes, and {entry['bytes']} were saved: truncated or edited. Copy "
            "it again, or read and save the text again."
        )
    header = read_header(path)
    if sample_sha256(path) != entry["sample"]:
        raise _not_the_file(path)
    return header


def file_entry(path: Path, digest: str) -> dict[str, Any]:
    """What a record says of a file whose SHA-256 is known."""
    return {"bytes": path.stat().st_size, "sha256": digest, "sample": sample_sha256(path)}


def _is_entry(name: str, entry: Any) -> bool:
    return (
        (name == TOKENS or _LAYER.fullmatch(name) is not None)
        and isinstance(entry, dict)
        and type(entry.get("bytes")) is int
        and all(_SHA256.fullmatch(str(entry.get(key))) for key in ("sha256", "sample"))
    )


def _not_the_file(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not the file that was saved: its content has changed. Copy it again, or read "
        "and save the text again."
    )
