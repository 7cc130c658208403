"""Ways of generating that a memory cannot go along with, refused before they begin.

Continuous batching runs the forwards of many requests in a thread of its own, packed into one row,
over a cache of pages: a memory cannot tell the requests apart, and an error in that thread would
end in fewer results and a line in a log. A cache of another kind is refused by its name, before
Transformers builds it.

Compiled code is cut at what a memory does, unless it says that its step can be traced: then a
decoding step is one graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar, Token
from typing import Any, Generic, TypeVar

import torch
from transformers import PreTrainedModel

from memretrofit.errors import UnsupportedModelError
from memretrofit.patching.ledger import Ledger

T = TypeVar("T")
BATCHING = "init_continuous_batching"
"""What `generate_batch`, `cache_implementation="paged"` and the manager of requests all call."""

uncompiled = functools.partial(
    torch.compiler.disable,
    reason="a memory keeps state of its own, between graphs: compile without fullgraph=True",
)
"""Decorates what `torch.compile` must call and not trace."""


class Current(Generic[T]):
    """What goes on in this thread, as a `ContextVar` says. `torch.compile` cannot trace that one:
    compiled code notes it in `traced`, which is None again when its forward ends.
    """

    def __init__(self, name: str) -> None:
        self._variable: ContextVar[T | None] = ContextVar(name, default=None)
        self.traced: T | None = None

    def get(self) -> T | None:
        """The last that was entered and not left."""
        if torch.compiler.is_compiling():
            return self.traced
        # torch may give up on compiling a part of a forward: then it goes on here
        return self._variable.get() or self.traced

    def enter(self, value: T) -> Token[T | None] | T | None:
        """Begin; what is returned ends it."""
        if torch.compiler.is_compiling():
            outer, self.traced = self.traced, value
            return outer
        return self._variable.set(value)

    def leave(self, token: Token[T | None] | T | None) -> None:
        """End what `enter` began."""
        if isinstance(token, Token):
            self._variable.reset(token)
        else:
            self.traced = token


class once(Generic[T]):
    """`functools.cached_property` without its lock (before Python 3.12), which `torch.compile`
    cannot trace.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self.make, self.name = make, make.__name__

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        value = self.make(instance)
        setattr(instance, self.name, value)
        return value


def refuse_continuous_batching(model: PreTrainedModel, ledger: Ledger) -> None:
    """Let the patched `model` refuse it, unless its memory is disabled."""
    if hasattr(model, BATCHING):
        ledger.replace_method(model, BATCHING, functools.partial(_refuse, model, ledger))


def _refuse(model: PreTrainedModel, ledger: Ledger, *args: Any, **kwargs: Any) -> Any:
    if ledger.controls.disabled:
        return getattr(type(model), BATCHING)(model, *args, **kwargs)
    raise UnsupportedModelError(
        "Continuous batching (generate_batch, cache_implementation='paged') packs requests into "
        f"one row over a paged cache; {type(model).__name__} is patched with {ledger.config}, "
        "which keeps a state for each row of a DynamicCache. Call generate with a left-padded "
        "batch, or run inside memretrofit.memory_disabled(model)."
    )


def refuse_named_cache(kind: str | None, ledger: Ledger) -> None:
    """Raise if `generate(cache_implementation=kind)` is another cache than a plain dynamic one.

    Raises:
        UnsupportedModelError: it is.
    """
    if kind in (None, "dynamic") or ledger.controls.disabled:
        return
    raise UnsupportedModelError(
        f"cache_implementation={kind!r} was asked for, and {ledger.config} keeps its state in the "
        "layers of a plain DynamicCache: a cache that is static, quantised or offloaded holds keys "
        "and values alone. Leave cache_implementation out; what is kept does not grow with the "
        "text."
    )
