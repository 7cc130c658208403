"""What a memory between segments added to a model, and how its parts see the forward that reads
some columns: hooks on the decoder and its layers, live inside `visiting`.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from memretrofit.errors import StateError
from memretrofit.modules.segment_memory import Columns, LayerMemory, SegmentMemory, State
from memretrofit.patching.ffn_sites import hidden_of
from memretrofit.patching.ledger import Ledger, ledger_of
from memretrofit.patching.seats import Seat


@dataclass(eq=False)
class SegmentLedger(Ledger):
    """What a memory between segments added to a model."""

    heeds = frozenset({"disabled", "writes", "shuffled", "silenced", "carried"})

    memory: SegmentMemory = field(kw_only=True)
    layers: dict[int, LayerMemory] = field(kw_only=True)
    seams: dict[str, Seat] = field(default_factory=dict)
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def decoder(self) -> nn.Module:
        """What is given the columns and holds the layers."""
        return next(seat.module for seat in self.seams.values() if seat.layer_idx is None)

    def begin(self, rows: int) -> State:
        """The state of conversations that have written nothing."""
        devices = {seat.layer_idx: seat.device for seat in self.seams.values()}
        state = dict(self.memory.begin(rows, devices[None]))
        for index, layer in self.layers.items():
            found = layer.begin(rows, devices[index])
            state |= {f"{index}.{name}": x for name, x in found.items()}
        return state


def segment_ledger_of(model: nn.Module) -> SegmentLedger:
    """What a memory between segments added to a patched model.

    Raises:
        StateError: the model is not patched, or with a memory of another family.
    """
    ledger = ledger_of(model)
    if not isinstance(ledger, SegmentLedger):
        raise StateError(
            f"This {type(model).__name__} is patched with {ledger.config}, and what was asked is "
            "about memories between segments, such as armt or rmt."
        )
    return ledger


@dataclass(eq=False)
class Visit:
    """One forward of the decoder over some columns."""

    columns: Columns
    state: State
    """The rows' own, which is written; `columns.state` is the one that is read."""
    written: list[State]
    """By closing part: what layers wrote."""
    hidden: Tensor | None = None
    """[B, C, E] the decoder's last hidden states."""

    @cached_property
    def read_by_layer(self) -> dict[int, State]:
        """What each layer reads, under its own names."""
        return _by_layer(self.columns.state)

    @cached_property
    def held_by_layer(self) -> dict[int, State]:
        """What each layer writes to, under its own names."""
        return _by_layer(self.state)


_current: ContextVar[Visit | None] = ContextVar("memretrofit_segment_visit", default=None)


@contextmanager
def visiting(visit: Visit) -> Iterator[None]:
    """Inside, the hooks of the model read and write for `visit`."""
    token = _current.set(visit)
    try:
        yield
    finally:
        _current.reset(token)


@dataclass(eq=False)
class EnterHook:
    """The decoder's pre-hook: whoever calls the decoder itself would get no memory."""

    ledger: SegmentLedger

    def __call__(self, decoder: nn.Module, args: tuple) -> None:
        """Refuse it.

        Raises:
            StateError: no forward of the model around the decoder is under way.
        """
        if _current.get() is None and not self.ledger.controls.disabled:
            raise StateError(
                f"{type(decoder).__name__} was called by itself, and the model around it reads in "
                "segments. Call that model, or run inside memretrofit.memory_disabled(model)."
            )


@dataclass(eq=False)
class LayerHook:
    """The hooks of one patched layer."""

    index: int
    memory: LayerMemory

    def read(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Change the layer's input."""
        visit = _current.get()
        if visit is None:
            return None
        state = visit.read_by_layer.get(self.index, {})
        hidden = self.memory.read(hidden_of(args, kwargs), state, visit.columns)
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def write(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Let the layer's memory write, where a span closes."""
        visit = _current.get()
        if visit is None:
            return
        before, after = hidden_of(args, kwargs), output[0] if isinstance(output, tuple) else output
        for number, closing in enumerate(visit.columns.closings):
            state = visit.held_by_layer.get(self.index, {})
            found = self.memory.write(before, after, state, closing)
            written = visit.written[number]
            written |= {f"{self.index}.{name}": x for name, x in found.items()}


def note_hidden(decoder: nn.Module, args: tuple, output: Any) -> None:
    """The decoder's hook: what the trailing columns became."""
    visit = _current.get()
    if visit is not None:
        visit.hidden = output[0]


def _by_layer(state: State) -> dict[int, State]:
    found: dict[int, State] = {}
    for name, x in state.items():
        layer, dot, own = name.partition(".")
        if dot:
            found.setdefault(int(layer), {})[own] = x
    return found
