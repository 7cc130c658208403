"""The files of a task run: who may write them, which items are done, and how they are read back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memretrofit.errors import CheckpointError, ConfigError
from memretrofit.evaluation.scoring import SCORES
from memretrofit.files import held

RUN, ITEMS, SUMMARY, COST = "run.json", "items.jsonl", "summary.json", "cost.json"
SCHEMA_VERSION = 2
"""Of all four files; a change of their fields counts it up."""
KEYS = ("task", "length", "number", "arm", "prompt_hash")
"""What identifies a line of `items.jsonl`."""
_LABELS = {"model"}
"""Settings that fix no number: `base` and `files` say which model it was, however it is spelled."""
_NUMBER = (int, float)
_NONE = type(None)
_FIELDS: Mapping[str, tuple[type, ...]] = {
    "task": (str,),
    "length": (int,),
    "number": (int,),
    "group": (str,),
    "depth": (*_NUMBER, _NONE),
    "arm": (str,),
    "prompt_hash": (str,),
    **dict.fromkeys((*SCORES, "chance"), (*_NUMBER, _NONE)),
}
"""What every line of `items.jsonl` holds at least."""


@contextmanager
def claim(output: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold a folder, which no other process may then claim, for a run with these settings.

    Raises:
        ConfigError, CheckpointError: the folder cannot be written, or belongs to a run with other
            settings; with what differs.
        StateError: another process writes there now.
    """
    with held(output):
        _check_owner(output, settings)
        yield


def _check_owner(output: Path, settings: Mapping[str, Any]) -> None:
    path = output / RUN
    if not path.is_file():
        if (output / ITEMS).exists():
            raise ConfigError(f"{output} holds {ITEMS} without {RUN}; name another --output")
        return
    there, now = read_object(path), json.loads(json.dumps(settings))
    differ = [
        f"{key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in dict.fromkeys([*there, *now])
        if there.get(key) != now.get(key) and key not in _LABELS
    ]
    if differ:
        raise ConfigError.listing(
            f"{output} holds another run, which is kept; name another --output", differ
        )


def kept_units(path: Path, units: Sequence[Sequence[tuple[Any, ...]]]) -> int:
    """How many units, each the `KEYS` of its lines, the file holds whole. Cuts off what follows.

    Raises:
        CheckpointError: a whole line is damaged, or is not the one that belongs there.
    """
    if not path.is_file():
        return 0
    lines = path.read_bytes().split(b"\n")[:-1]
    done = used = size = 0
    for unit in units:
        mine = lines[used : used + len(unit)]
        if len(mine) < len(unit):
            break
        for place, (line, key) in enumerate(zip(mine, unit, strict=True), used + 1):
            record = _record(line, path, place)
            found = tuple(record[name] for name in KEYS)
            if found != key:
                raise CheckpointError(
                    f"{path}, line {place}: {found}, where this release writes {key}. The items "
                    "were made by another release, or the file was edited; use another --output."
                )
        done, used, size = done + 1, used + len(mine), size + sum(len(x) + 1 for x in mine)
    with path.open("r+b") as file:
        file.truncate(size)
    return done


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of `items.jsonl`, in order.

    Raises:
        CheckpointError: a line is damaged, or lacks a field.
    """
    # Bytes: an answer may hold characters that str.splitlines takes for the end of a line.
    for place, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if line:
            yield _record(line, path, place)


def read_object(path: Path) -> dict[str, Any]:
    """The object in one of a run's other files.

    Raises:
        CheckpointError: it is damaged, or was written by another release.
    """
    values = _parsed(path.read_bytes(), str(path))
    if (version := values.get("schema_version")) != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema_version={version!r}; this release reads {SCHEMA_VERSION}. Run the "
            "tasks again into another folder, or use the release that wrote it."
        )
    return values


def _record(line: bytes, path: Path, place: int) -> dict[str, Any]:
    where = f"{path}, line {place}"
    found = _parsed(line, where)
    strange = [
        f"{name}={found.get(name)!r}"
        for name, kinds in _FIELDS.items()
        if name not in found or not isinstance(found[name], kinds)
    ]
    if strange:
        raise CheckpointError(
            f"{where} is no item of a run: {', '.join(strange)}. Run the tasks again into another "
            "folder."
        )
    return found


def _parsed(content: bytes, where: str) -> dict[str, Any]:
    remedy = "Run the tasks again into another folder."
    try:
        values = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"{where} is damaged: {error}. {remedy}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} is damaged: not a JSON object. {remedy}")
    return values
