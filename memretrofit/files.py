"""Files that are written whole: a kill leaves the old one or the new one, never a part."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from memretrofit.errors import ConfigError, StateError

_LOCK = ".lock"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` unless there was an error."""
    draft = path.with_name(path.name + ".part")
    try:
        yield draft
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    os.replace(draft, path)


def write_text(path: Path, text: str) -> Path:
    """Write a text in UTF-8, and return where."""
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, values: Any) -> Path:
    """Write plain JSON values, one a line, and return where."""
    return write_text(path, json.dumps(values, indent=1) + "\n")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder, and let no other process that asks have it meanwhile.

    Raises:
        ConfigError: it cannot be written.
        StateError: another process has it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"output={str(folder)!r} cannot be written: {error.strerror}. Name another folder."
        ) from error
    lock = FileLock(folder / _LOCK)  # goes with its process, however that ends
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise StateError(
            f"another process is writing its run to {folder}; wait for it, or name another --output"
        ) from None
    try:
        yield
    finally:
        lock.release()
