"""What a bench asks of the machine: room for large caches, and bytes that came from storage."""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

SPARE_BYTES = 1 << 30
"""Memory and disk that are left to others."""


def lacking(memory: int, disk: int) -> str:
    """Why there is no room for so many bytes of memory and of disk, in the folder of temporary
    files; empty where there is.
    """
    folder = tempfile.gettempdir()
    for what, needed, free in (
        ("memory", memory, _free_memory()),
        (f"disk in {folder}", disk, shutil.disk_usage(folder).free),
    ):
        if needed and free is not None and needed + SPARE_BYTES > free:
            return (
                f"needs {needed / 2**30:,.1f} GiB of {what} and {SPARE_BYTES / 2**30:.0f} GiB to "
                f"spare, and {free / 2**30:,.1f} GiB are free."
            )
    return ""


def _free_memory() -> int | None:
    """Bytes that may be allocated without swapping; None where the system does not tell."""
    return _number("/proc/meminfo", "MemAvailable:", 1024)


def storage_bytes() -> int | None:
    """Bytes that this process has had read from storage; None where the system does not tell."""
    return _number("/proc/self/io", "read_bytes:", 1)


def bytes_since(before: int | None) -> int | None:
    """`storage_bytes` now less those of `before`."""
    now = storage_bytes()
    return None if now is None or before is None else now - before


def _number(path: str, name: str, unit: int) -> int | None:
    with suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(name):
                return unit * int(line.split()[1])
    return None


def forget_pages(path: Path) -> None:
    """Let the next read of a file that was written in full come from storage."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reset_peak() -> int:
    """Resident bytes now; the peak is measured from here on."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_bytes()  # not Linux: what exceeds the earlier peak is counted
    return _number("/proc/self/status", "VmRSS:", 1024) or 0


def peak_bytes() -> int:
    """Resident bytes at the peak since `reset_peak`."""
    # not `ru_maxrss` on Linux: a new process starts with the one of the process that started it
    if found := _number("/proc/self/status", "VmHWM:", 1024):
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
