"""What a process may do with a type, for the tests of the runner: they find these by name."""

from __future__ import annotations

import os
import time


def work(name: str) -> str:
    """Do what the name says."""
    if name == "raise":
        raise ValueError("no such layer")
    if name == "crash":
        os._exit(3)
    if name == "eat":
        return str(len(bytearray(1 << 30)))
    if name == "hang":
        time.sleep(600)
    return name.upper()
