"""What a memory between segments added to a model, layer by layer, and what a cache holds with it.

Bytes are those of one row after one forward of r tokens, in the model's own dtype::

    full attention     b r                                                      grows
    in segments        state  +  b (P + t)  +  E tokens that may be read again  bounded

with b the bytes of a token's keys and values in all layers, t the tokens of the open span and P the
columns in front of them: both are 0 where the last token closed a segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import nn

from memretrofit.description import (
    LENGTHS,
    LayerCost,
    as_text,
    base_costs,
    in_units,
    layer_lines,
    share_of_base,
)
from memretrofit.modules.segment_memory import Past, SegmentMemory, State
from memretrofit.patching.segment_visit import SegmentLedger
from memretrofit.patching.wrapping import unwrapped


@dataclass(frozen=True, kw_only=True)
class SessionCost:
    """Bytes of one row, without and with the memory."""

    base: list[LayerCost]
    memory: SegmentMemory
    state: int
    """Of what is carried: the same at any length."""
    token: int
    """Of a token that may be read again."""
    fronts: tuple[tuple[int, ...], tuple[int, ...]]
    """Columns in front of each span: in the first segment, and later at most."""
    counter: int

    def before(self, tokens: int) -> int:
        """Of the base model's cache."""
        return sum(cost.at(tokens) for cost in self.base)

    def after(self, tokens: int) -> int:
        """Of the session; a memory whose opening still grows has fewer columns in front."""
        opened = self._open(tokens)
        kept = self.token * self._kept(tokens)
        return self.state + self.counter + kept + self.column * opened

    @property
    def column(self) -> int:
        """Of one column of the open span."""
        return sum(cost.per_token for cost in self.base)

    def most(self) -> int:
        """Within a segment, just before it is closed."""
        length = self.memory.segment_length
        return max(self.after(r) for r in range(2 * length, 3 * length))

    def _open(self, tokens: int) -> int:
        """Columns of the open span after so many tokens."""
        segments, place = divmod(tokens, self.memory.segment_length)
        ends = list(itertools.accumulate(self.memory.spans))
        for span, length in enumerate(self.memory.spans):
            begin = ends[span] - length
            if begin < place < ends[span]:
                return self.fronts[segments > 0][span] + place - begin
        return 0

    def _kept(self, tokens: int) -> int:
        """Tokens that may be read again, after one forward."""
        if not self.memory.kept_tokens:
            return 0
        width = 0
        for piece in self._pieces(tokens):
            width = min(width, self.memory.kept_tokens) + piece
        return width

    def _pieces(self, tokens: int) -> Iterator[int]:
        """Lengths of the pieces that fill what is kept, up to the last one."""
        length = self.memory.segment_length
        whole = -(-self.memory.kept_tokens // length) + 1
        left = tokens % length + min(tokens // length, whole) * length
        for span in itertools.cycle([x for x in self.memory.spans if x]):
            if not left:
                return
            yield min(span, left)
            left -= min(span, left)


@torch.no_grad()
def session_cost(model: nn.Module, ledger: SegmentLedger) -> SessionCost:
    """What a row's cache holds at any length. Runs the base model on two and on three tokens."""
    inner = unwrapped(model)
    memory, state = ledger.memory, ledger.begin(0)
    embedding = inner.get_input_embeddings().weight  # type: ignore[union-attr, operator]
    # nothing, and all there may be, of one row and of no size
    none, full = (
        {name: x.new_full((), number).expand(1, *x.shape[1:]) for name, x in state.items()}
        for number in (0, 1)
    )
    return SessionCost(
        base=base_costs(inner),
        memory=memory,
        state=sum(x.nbytes for x in full.values()),
        token=embedding[0].nbytes,
        fronts=(_fronts(memory, none, 0, embedding), _fronts(memory, full, 1, embedding)),
        counter=torch.zeros(1, dtype=torch.long).nbytes,
    )


def _fronts(
    memory: SegmentMemory, state: State, segments: int, embedding: torch.Tensor
) -> tuple[int, ...]:
    """Columns in front of each span where `segments` were read."""
    found = []
    for span in range(len(memory.spans)):
        begin = sum(memory.spans[:span])
        width = memory.kept_tokens if segments else min(begin, memory.kept_tokens)
        past = Past(
            state=state,
            segments=torch.full((1,), segments),
            embeds=embedding.new_zeros(1, width, embedding.shape[1]),
            real=torch.ones(1, width, dtype=torch.bool),
        )
        opening = memory.opening(span, past) if memory.spans[span] else None
        found.append(0 if opening is None else opening.embeds.shape[1])
    return tuple(found)


def render_segments(model: nn.Module, ledger: SegmentLedger) -> str:
    """A table of layers, one of cache bytes, and the totals, as plain text."""
    inner = unwrapped(model)
    added = sum(p.numel() for seat in ledger.seams.values() for p in seat.memory.parameters())
    cost = session_cost(inner, ledger)
    dtype = str(inner.dtype).removeprefix("torch.")  # type: ignore[union-attr]
    return as_text(
        f"{type(inner).__name__} + {ledger.config}",
        _layers(ledger),
        f"added parameters: {added:,} ({share_of_base(inner, added)})",
        _cache(cost),
        f"cache of one row in {dtype}, after one forward pass of so many tokens; "
        f"{in_units(cost.state)} of it are the state, at any length, and inside a segment of "
        f"{ledger.memory.segment_length:,} tokens it is at most {in_units(cost.most())}",
    )


def _layers(ledger: SegmentLedger) -> Table:
    grid = Table(box=SIMPLE, pad_edge=False)
    for name in ("layers", "module", "memory"):
        grid.add_column(name)
    for name in ("added", "state of a row"):
        grid.add_column(name, justify="right")
    state = {name: x.new_empty(()).expand(1, *x.shape[1:]) for name, x in ledger.begin(0).items()}
    rows = []
    for name, seat in ledger.seams.items():
        index = seat.layer_idx
        own = [x for key, x in state.items() if _owner(key) == index]
        path = ".".join("*" if x == str(index) else x for x in name.split("."))
        added = f"{sum(p.numel() for p in seat.memory.parameters()):,}"
        what = (path, ledger.config.method, added, in_units(sum(x.nbytes for x in own)))
        rows.append((index, what))
    for label, cells in layer_lines(rows):
        grid.add_row(label, *cells)
    return grid


def _owner(name: str) -> int | None:
    """The layer that a name of the state belongs to; None for what stands beside all."""
    layer, dot, _ = name.partition(".")
    return int(layer) if dot and layer.isdigit() else None


def _cache(cost: SessionCost) -> Table:
    grid = Table(box=SIMPLE, pad_edge=False)
    for name in ("cache at tokens", "before", "after", "after/before"):
        grid.add_column(name, justify="right")
    for tokens in LENGTHS:
        before, after = cost.before(tokens), cost.after(tokens)
        share = f"{100 * after / before:.1f}%" if before else "n/a"
        grid.add_row(f"{tokens // 1024}k", in_units(before), in_units(after), share)
    return grid
