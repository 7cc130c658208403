"""Replace one set of files by another; a kill at any moment leaves the old set or the new one.

Several files cannot be replaced at once. So the record (`memory_config.json`) names the others by
their hash and is replaced last, and before anything is replaced the old set is linked into
`.previous/`. Whoever reads takes the files in `.previous/` if they have the recorded hashes, and
those beside the record otherwise::

    the files     the record    .previous/    read
    old           old           incomplete    old
    mixed         old           old           old, from .previous
    new           new           old           new
    new           new           -             new

The card and the report describe the set; they are replaced after it and not covered.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from memretrofit.errors import CheckpointError
from memretrofit.hub.record import CONFIG, MEMORY, NAMED, Record, read_record
from memretrofit.hub.tensors import differences, listing, read_header, sha256

PREVIOUS = ".previous"
STAGING = ".saving-"
logger = logging.getLogger(__name__)


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A folder inside `directory`, on the same disk, for files that are not there yet.

    Raises:
        CheckpointError: nothing can be written there; nothing was.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=STAGING, dir=directory))
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to {directory}: {error.strerror}. Nothing was saved. Choose a folder "
            "that you may write to."
        ) from error
    try:
        yield staged
    except OSError as error:
        raise CheckpointError(
            f"Saving to {directory} failed: {error.strerror or error}. What was saved there "
            "before can still be loaded."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def publish(staged: Path, directory: Path, names: Sequence[str], after: Sequence[str]) -> None:
    """Move `names`, then the record, then `after` from `staged` into `directory`."""
    for path in staged.iterdir():
        sync(path)
    for stale in _keep_previous(directory) - {*names}:
        (directory / stale).unlink(missing_ok=True)
    for name in names:
        os.replace(staged / name, directory / name)
    sync(directory)
    os.replace(staged / CONFIG, directory / CONFIG)
    sync(directory)
    for name in after:
        os.replace(staged / name, directory / name)
    shutil.rmtree(directory / PREVIOUS, ignore_errors=True)
    for left in directory.glob(f"{STAGING}*"):  # by a save that was killed
        if left != staged:
            shutil.rmtree(left, ignore_errors=True)


def _keep_previous(directory: Path) -> set[str]:
    """Link the recorded files into `.previous`; return the names of ours in `directory`."""
    try:
        files = read_record(directory).files
    except CheckpointError:
        # nothing that could be loaded; an adapter without a memory is somebody else's
        return {*NAMED} if (directory / MEMORY).exists() else set()
    previous = directory / PREVIOUS
    if _complete(previous, files):
        return {*NAMED}  # a killed save: keep the good set, and clear what it left
    if _complete(directory, files):
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir()
        for name in files:
            _link(directory / name, previous / name)
        sync(previous)
        sync(directory)
    return {*files}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)
        sync(target)


def locate(directory: Path, record: Record) -> Path:
    """The folder with the recorded files: `directory`, or its `.previous` after a killed save.

    Raises:
        CheckpointError: a file is missing, damaged, or not the one that was saved with this record.
    """
    if _complete(directory / PREVIOUS, record.files):
        # also when the recorded files are still in the folder: others may be half replaced
        logger.warning("%s: the last save was interrupted; loading the one before it.", directory)
        return directory / PREVIOUS
    if _complete(directory, record.files):
        return directory
    for name, digest in record.files.items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing; {CONFIG} names it. Save or download the folder again."
            )
        if sha256(path) == digest:
            continue
        found = read_header(path).specs if path.suffix == ".safetensors" else {}
        lines = differences(record.tensors, found) if name == MEMORY else []
        what = (
            f"its tensors are not those that {CONFIG} lists:{listing(lines)}"
            if lines
            else "its content has changed"
        )
        raise CheckpointError(
            f"{path} is not the file that was saved with {CONFIG} (interrupted save, or edited): "
            f"{what}\n"
            "Save it with memretrofit.save_pretrained, or download the folder again."
        )
    raise CheckpointError(f"{directory} changed while it was read. Load it again.")


def _complete(folder: Path, files: Mapping[str, str]) -> bool:
    try:
        return all(sha256(folder / name) == digest for name, digest in files.items())
    except OSError:
        return False


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # such a handle exists on POSIX alone
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
