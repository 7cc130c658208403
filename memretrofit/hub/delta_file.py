"""Edits of a bank on disk: the rows that were learned, and their numbers.

A delta is one small safetensors file. It names the rows that it was trained over by their
`RowSource.identity`: it fits them in any tier and in shards of any size, and no others. Undoing an
edit is not loading it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from memretrofit.errors import CheckpointError, StateError
from memretrofit.hub.folder import sync
from memretrofit.hub.mapped import Written, write_pieces
from memretrofit.hub.tensors import damaged, read_header, read_tensors
from memretrofit.modules.bank import tensors_sha256
from memretrofit.modules.table import Table

FORMAT = "memretrofit.delta.1"
_ENDS = ("index", "rows")


class Delta(NamedTuple):
    """What was learned of one table."""

    numbers: Tensor
    """[n] of the rows, sorted."""
    rows: Tensor
    """[n, *shape]"""


def save_delta(tables: Mapping[str, Table], path: str | Path, *, meaning: str = "") -> None:
    """Write what tables learned, with the identities of the rows that it belongs to. A file that
    is there is replaced in one step; an error leaves it as it was. `meaning` says what gives rows
    their numbers (`MemoryBank.meaning`); a bank with another one refuses the file.

    Raises:
        StateError: no table has an open row, or a value is nan or infinity.
        CheckpointError: the file cannot be written.
    """
    path = Path(path)
    tensors: dict[str, Written] = {}
    about: dict[str, Any] = {}
    for name, table in tables.items():
        if table.delta is None or table.delta_index is None:
            continue
        if not bool(table.delta.isfinite().all()):
            raise StateError(
                f"The delta of table {name!r} holds nan or infinity: its training diverged. Train "
                "it again, with a lower learning rate."
            )
        tensors[f"{name}.index"] = Written.whole(table.delta_index)
        tensors[f"{name}.rows"] = Written.whole(table.delta.detach())
        about[name] = {
            "rows": table.rows,
            "shape": list(table.shape),
            "identity": table.source.identity,
        }
    if not tensors:
        raise StateError("No row of these tables is open, so there is no delta to save.")
    draft = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=".saving-", dir=path.parent)
        os.close(handle)
        metadata = {
            "kind": FORMAT,
            "tables": json.dumps(about),
            "meaning": meaning,
            "sha256": _sha256(tables, about),
        }
        write_pieces(Path(draft), tensors, metadata)
        sync(Path(draft))
        os.replace(draft, path)
        draft = None
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"Saving {path} failed: {error.strerror or error}. What was saved there before can "
            "still be loaded."
        ) from error
    finally:
        if draft is not None:
            Path(draft).unlink(missing_ok=True)


def load_delta(
    path: str | Path, tables: Mapping[str, Table], *, meaning: str = ""
) -> dict[str, Delta]:
    """What `save_delta` wrote, checked against the tables that it is for::

        for name, delta in load_delta(path, tables).items():
            tables[name].merge(*delta)

    Raises:
        CheckpointError: damaged, or for other rows than those of `tables`.
    """
    path = Path(path)
    found, metadata, _ = read_header(path)
    try:
        about = json.loads(str(metadata.get("tables")))
    except (ValueError, RecursionError):
        about = None
    about = about if isinstance(about, dict) else {}
    if metadata.get("kind") == FORMAT and metadata.get("meaning", "") != meaning:
        raise CheckpointError(
            f"{path} was trained on a bank with another tree or other hash constants, whose rows "
            "of the same numbers belong to other texts, and this bank has its own. Train both on "
            "copies of one prepared bank, or inject the lessons again."
        )
    names = {f"{name}.{end}" for name in about for end in _ENDS}
    if metadata.get("kind") != FORMAT or not about or names != {*found}:
        raise damaged(path, f"it is no delta of this release ({FORMAT})")
    for name, entry in about.items():
        table, entry = tables.get(name), entry if isinstance(entry, dict) else {}
        if table is None or entry.get("identity") != table.source.identity:
            mine = f"tables {', '.join(tables)}" if table is None else table.source.identity
            raise CheckpointError(
                f"{path} is for {entry.get('rows')} rows {entry.get('shape')} of table {name!r} "
                f"({entry.get('identity')}), and this bank has {mine}. Open the bank that it was "
                "trained on, or train it again on this one."
            )
    tensors = read_tensors(path)
    found = {name: _checked(path, name, tables[name], tensors) for name in about}
    # an edit may be shared alone, and then no record of a folder vouches for it
    if metadata.get("sha256", "") not in ("", tensors_sha256(sorted(tensors.items()))):
        raise damaged(path, "its content is not what was saved")
    return found


def _sha256(tables: Mapping[str, Table], names: Iterable[str]) -> str:
    found = {
        f"{name}.{end}": x
        for name in names
        for end, x in zip(_ENDS, _of(tables[name]), strict=True)
    }
    return tensors_sha256(sorted(found.items()))


def _of(table: Table) -> tuple[Tensor, Tensor]:
    assert table.delta_index is not None
    assert table.delta is not None
    return table.delta_index, table.delta


def _checked(path: Path, name: str, table: Table, tensors: Mapping[str, Tensor]) -> Delta:
    delta = Delta(*(tensors[f"{name}.{end}"] for end in _ENDS))
    try:
        table.check_delta(*delta)
    except StateError as error:
        raise damaged(path, f"table {name!r}: {error}") from error
    return delta
