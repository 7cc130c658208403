"""Typed errors. A message says what was asked, what was found, and what to do, in that order; a
note under it, which a traceback and the command line print, says where the class is explained.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches
from typing import Any

PAGE = "docs/errors.md"


class MemretrofitError(Exception):
    """Base of every error that memretrofit raises on purpose.

    `section` is where the class is explained.
    """

    section: str = f"{PAGE}#memretrofiterror"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """A class has the section of its name."""
        super().__init_subclass__(**kwargs)
        cls.section = f"{PAGE}#{cls.__name__.lower()}"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        # what add_note of Python 3.11 would make; the list is an error's own, others may add to it
        self.__notes__ = [f"Causes and remedies: {self.section}"]


class ConfigError(MemretrofitError):
    """A value in a config, a recipe or an argument is not usable.

    `problems` holds one line per fault, so that a caller that collects faults (a recipe with
    several sections) can merge them. It is the message itself when there is only one.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems: tuple[str, ...] = tuple(problems) or (message,)

    @classmethod
    def listing(cls, subject: str, problems: Iterable[str]) -> ConfigError:
        """One error that lists every fault of `subject`."""
        found = tuple(problems)
        if len(found) == 1:
            return cls(f"{subject}: {found[0]}", found)
        lines = "".join(f"\n  - {problem}" for problem in found)
        return cls(f"{subject}: {len(found)} problems{lines}", found)

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, tuple[str, ...]]]:
        # The default drops `problems` when a worker process hands the error to its parent.
        return type(self), (str(self), self.problems)


class UnsupportedModelError(MemretrofitError):
    """The model, its cache class or its attention cannot be served; nothing was changed."""


class NoTargetError(UnsupportedModelError):
    """No module of the model matches what a method asked for."""


class CheckpointError(MemretrofitError):
    """A file on disk is missing, damaged, or belongs to another base model."""


class StateError(MemretrofitError):
    """The call does not fit the present state, such as patching a patched model."""


def did_you_mean(name: object, legal: Iterable[str]) -> str:
    """The tail of an error about an unknown name: the nearest legal one, and all of them."""
    names = sorted(legal)
    near = get_close_matches(str(name), names, n=3, cutoff=0.6)

    def likeness(other: str) -> tuple[float, bool]:
        ratio = SequenceMatcher(None, other, str(name)).ratio()
        return ratio, other[:1] == str(name)[:1]  # of two as near, the one that begins like it

    hint = f"did you mean {max(near, key=likeness)!r}? " if near else ""
    return f"{hint}legal: {', '.join(names) if names else 'none'}"
