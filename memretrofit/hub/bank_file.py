"""Banks on disk: rows in shards, which are mapped and never written again.

::

    my_bank/
      bank.safetensors.index.json         tables, and which rows lie in which shard
      bank-00001-of-00002.safetensors     consecutive rows of one table, from a page on

A shard is a safetensors file with one tensor ``table[low:high]``. Shards and index carry the
`RowSource.identity` of their rows, so that those of two banks do not mix. The index is written
last; without one there is no bank. What is learned goes elsewhere: see `delta_file`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.hub.folder import STAGING, staging, sync
from memretrofit.hub.mapped import PAGE
from memretrofit.hub.record import TensorSpec, read_json, tensor_spec
from memretrofit.hub.tensors import DTYPES, damaged, read_header
from memretrofit.modules.row_sources import MappedRows, RowSource, Span, row_nbytes, row_pieces

INDEX = "bank.safetensors.index.json"
SHARD_BYTES = 5 << 30
"""Bytes of rows in a shard; a row that is larger has a shard of its own."""
FORMAT = "memretrofit.bank.1"

_SHARD = re.compile(r"bank-\d{5}-of-\d{5}\.safetensors")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PART = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)\[(\d{1,18}):(\d{1,18})\]")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[int, int], None]
"""Told the bytes written so far, and all there are."""


@dataclass(frozen=True)
class _Shard:
    table: str
    source: RowSource
    low: int
    high: int

    @property
    def part(self) -> str:
        return f"{self.table}[{self.low}:{self.high}]"

    @property
    def nbytes(self) -> int:
        return (self.high - self.low) * row_nbytes(self.source)


def write_bank(
    tables: Mapping[str, RowSource],
    directory: str | Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write all rows of a bank, a few at a time. Rows that are known to be zero take no room on a
    file system with sparse files.

    Args:
        tables: by name, the name of a Python variable.
        directory: made where it is missing; must hold no bank.
        shard_bytes: the most that a file holds.
        progress: told after each piece.

    Raises:
        ConfigError: no table, or a name or a size that is not usable.
        CheckpointError: there is a bank already, or the folder cannot be written to or has no
            room. No shard is left behind.
    """
    directory = Path(directory)
    faulty = [name for name in tables if not _NAME.fullmatch(name)]
    if faulty or not tables or shard_bytes < 1:
        raise ConfigError(
            f"write_bank: tables named {list(tables)}, shard_bytes={shard_bytes}. Pass at least "
            "one table, named like a Python variable, and at least 1 byte."
        )
    if (directory / INDEX).exists():
        raise CheckpointError(
            f"{directory} holds a bank, which may be in use and is never written again. Choose "
            "another folder, or delete it first."
        )
    shards = _plan(tables, shard_bytes)
    files = {
        f"bank-{number:05}-of-{len(shards):05}.safetensors": shard
        for number, shard in enumerate(shards, 1)
    }
    made = not directory.exists()
    moved: list[Path] = []
    try:
        with staging(directory) as staged:
            _check_room(directory, sum(shard.nbytes for shard in shards if not shard.source.blank))
            _write_all(files, staged, progress or (lambda done, total: None))
            (staged / INDEX).write_text(_index(tables, files), encoding="utf-8")
            for path in staged.iterdir():
                sync(path)
            for name in files:
                os.replace(staged / name, directory / name)
                moved.append(directory / name)
            sync(directory)
            os.replace(staged / INDEX, directory / INDEX)
            sync(directory)
            _clear(directory, {*files}, staged)
    except BaseException:
        if not (directory / INDEX).exists():
            for path in moved:
                path.unlink(missing_ok=True)
            if made:
                with suppress(OSError):
                    directory.rmdir()
        raise


def _clear(directory: Path, files: set[str], staged: Path) -> None:
    """Remove what writes that were killed have left."""
    for left in directory.iterdir():
        if left.name.startswith(STAGING) and left != staged:
            shutil.rmtree(left, ignore_errors=True)
        elif _SHARD.fullmatch(left.name) and left.name not in files:
            left.unlink(missing_ok=True)


def _plan(tables: Mapping[str, RowSource], shard_bytes: int) -> list[_Shard]:
    shards = []
    for name, source in tables.items():
        step = max(1, shard_bytes // row_nbytes(source))
        shards += [
            _Shard(name, source, low, min(low + step, source.rows))
            for low in range(0, source.rows, step)
        ]
    return shards


def _check_room(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise CheckpointError(
            f"A bank in {directory} needs {needed} bytes, and {free} are free. Nothing was "
            "written. Make room, or choose a folder on a larger disk."
        )


def _write_all(files: Mapping[str, _Shard], staged: Path, progress: Progress) -> None:
    total, done = sum(shard.nbytes for shard in files.values()), 0
    for name, shard in files.items():
        header = _header(shard)
        with (staged / name).open("wb") as file:
            file.write(header)
            if shard.source.blank:
                file.truncate(len(header) + shard.nbytes)
                done += shard.nbytes
                progress(done, total)
                continue
            for piece in row_pieces(shard.source, shard.low, shard.high):
                file.write(piece.cpu().reshape(-1).view(torch.uint8).numpy().data)
                done += piece.nbytes
                progress(done, total)


def _header(shard: _Shard) -> bytes:
    source = shard.source
    text = json.dumps(
        {
            "__metadata__": {
                "format": "pt",
                "row_start": str(shard.low),
                "identity": source.identity,
            },
            shard.part: {
                "dtype": _DTYPE_NAMES[source.dtype],
                "shape": [shard.high - shard.low, *source.shape],
                "data_offsets": [0, shard.nbytes],
            },
        }
    ).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    return len(text).to_bytes(8, "little") + text


def _index(tables: Mapping[str, RowSource], files: Mapping[str, _Shard]) -> str:
    values = {
        "metadata": {
            "format": FORMAT,
            "total_size": sum(shard.nbytes for shard in files.values()),
        },
        "tables": {
            name: {
                "rows": source.rows,
                "shape": list(source.shape),
                "dtype": _DTYPE_NAMES[source.dtype],
                "identity": source.identity,
            }
            for name, source in tables.items()
        },
        "weight_map": {shard.part: name for name, shard in files.items()},
    }
    return json.dumps(values, indent=1) + "\n"


def open_bank(directory: str | Path) -> dict[str, MappedRows]:
    """The tables of a bank, mapped: headers are read and checked, rows only when asked for.

    Raises:
        CheckpointError: no bank; an index or a header that is damaged or names files elsewhere; a
            shard that is missing, truncated or of another bank.
    """
    path = Path(directory) / INDEX
    if not path.is_file():
        raise CheckpointError(
            f"No {INDEX} in {directory}, so there is no bank to open. Pass a folder that "
            "write_bank wrote."
        )
    values = read_json(path)
    metadata, tables, parts = (values.get(key) for key in ("metadata", "tables", "weight_map"))
    if not (isinstance(metadata, dict) and isinstance(tables, dict) and isinstance(parts, dict)):
        raise damaged(path, "it has no metadata, tables and weight_map")
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format={metadata.get('format')!r}; this release reads {FORMAT!r}. Install "
            "the release that wrote it, or write the bank again."
        )
    spans: dict[str, list[tuple[int, int, str]]] = {name: [] for name in tables}
    for part, file in parts.items():
        found = _PART.fullmatch(part)
        if found is None or found[1] not in spans:
            raise damaged(path, f"weight_map names {part!r}, which is no part of a table")
        if not isinstance(file, str) or not _SHARD.fullmatch(file):
            raise damaged(path, f"weight_map names {file!r}, which is no shard of a bank")
        spans[found[1]].append((int(found[2]), int(found[3]), file))
    return {name: _open_table(path, name, entry, spans[name]) for name, entry in tables.items()}


def _open_table(path: Path, name: str, entry: Any, parts: list[tuple[int, int, str]]) -> MappedRows:
    entry = entry if isinstance(entry, dict) else {}
    spec, rows = tensor_spec(entry.get("shape"), entry.get("dtype")), entry.get("rows")
    identity = entry.get("identity")
    if spec is None or type(rows) is not int or not isinstance(identity, str):
        raise damaged(path, f"no legal rows, shape, dtype and identity of table {name!r}")
    parts.sort()
    borders = [0, *(high for _, high, _ in parts)]
    if [low for low, _, _ in parts] != borders[:-1] or borders[-1] != rows:
        raise damaged(path, f"the shards of {name!r} do not hold rows 0 to {rows}, each once")
    spans = []
    for low, high, file in parts:
        shard = path.parent / file
        found, metadata, offsets = read_header(shard)
        expected = TensorSpec((high - low, *spec.shape), spec.dtype)
        if found != {f"{name}[{low}:{high}]": expected}:
            raise damaged(shard, f"it holds {_told(found)}; {INDEX} promises {expected}")
        if metadata.get("identity") != identity or metadata.get("row_start") != str(low):
            raise CheckpointError(
                f"{shard} is a shard of another bank than {path} tells of. Download or write the "
                "bank again."
            )
        (offset,) = offsets.values()
        spans.append(Span(shard, offset, low, high - low))
    try:
        return MappedRows(spans, spec.shape, DTYPES.get(spec.dtype, torch.int64), identity)
    except (ConfigError, StateError) as error:
        raise damaged(path, str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{path.parent} cannot be mapped: {error.strerror}.") from error


def _told(found: Mapping[str, TensorSpec]) -> str:
    return ", ".join(f"{name}, {spec}" for name, spec in found.items()) or "nothing"
