"""A pool of hidden states in every layer, read in front of a segment's tokens."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from memretrofit.modules.memory_tokens import SinkTokens
from memretrofit.modules.segment_memory import (
    Columns,
    LayerMemory,
    Opening,
    Part,
    Past,
    SegmentMemory,
    State,
)

POOL, WRITES = "pool", "writes"
WORD = 0xFFFFFFFF


def dropped_places(writes: Tensor, size: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Which places of a pool the next write drops: a function of how much was written alone, so
    that a row of a batch drops what it would drop alone.

    Args:
        writes: [B] writes that each row has behind it.
        size: N places, numbered from the oldest.
        count: K of them are dropped, all equally likely.

    Returns:
        The places that stay, [B, N - K], and those that go, [B, K], each ascending.
    """
    rounds = _mixed(writes.long() + _mixed(torch.tensor(seed, device=writes.device)))
    places = torch.arange(size, device=writes.device)
    order = _mixed(places + rounds[:, None]).argsort(dim=-1, stable=True)
    return order[:, count:].sort(dim=-1).values, order[:, :count].sort(dim=-1).values


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit words in which every bit of the result depends on every bit of x: the
    same on all devices, and no generator's state to keep. Constants: Wellons' lowbias32.
    """
    x = x & WORD
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & WORD
    return x ^ (x >> 16)


@functools.lru_cache(maxsize=1)
def _drawn(writes: tuple[int, ...], size: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`dropped_places` for the layers of one forward, which all drop the same."""
    return dropped_places(torch.tensor(writes), size, count, seed)


def rows_at(rows: Tensor, places: Tensor) -> Tensor:
    """`rows` [B, N, ...] at each row's own places [B, n]."""
    index = places.to(rows.device).view(*places.shape, *(1,) * (rows.ndim - 2))
    return rows.gather(1, index.expand(-1, -1, *rows.shape[2:]))


def tokens_before(spans: tuple[int, ...]) -> tuple[int, ...]:
    """How many tokens of a segment stand before each of its spans, the one that writes last."""
    return (0, *itertools.accumulate(spans))


@dataclass(frozen=True, kw_only=True)
class PoolSizes:
    """What the columns in front of a segment and the rows of each layer agree on."""

    spans: tuple[int, ...]
    """Tokens of each, without the span that writes."""
    num_memory_tokens: int
    """K."""
    num_blocks: int
    """N / K."""

    @property
    def rows(self) -> int:
        """N."""
        return self.num_memory_tokens * self.num_blocks


class Offset(nn.Module):
    """A learned vector [E] that is added; it starts at zero."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [B, n, E], moved."""
        return hidden + self.vector.to(hidden.dtype)


class PoolMemory(SegmentMemory):
    """Makes room for the pools of the layers: a sink column, and one column for each row.

    ::

        span 0       [ sink ; N rows ; tokens ]                 tokens alone before an empty pool
        last span    [ sink ; last K rows ; the T tokens again ]

    What stands in the columns of rows does not matter: each layer puts its own there.
    """

    def __init__(self, sizes: PoolSizes, *, sink: SinkTokens, layer: int) -> None:
        """`sink` is one token; `layer` is any that has a pool."""
        super().__init__()
        self.spans, self.kept_tokens = (*sizes.spans, 0), sum(sizes.spans)
        self.again = tokens_before(sizes.spans)
        self.block, self.size = sizes.num_memory_tokens, sizes.rows
        self._sink, self._layer = sink, layer

    def opening(self, span: int, past: Past) -> Opening | None:
        """The sink, the rows that there are, and the tokens that are read again."""
        batch, width, size = past.embeds.shape
        last = width - self.again[span]
        embeds, real = [past.embeds[:, last:]], [past.real[:, last:]]
        rows = self.rows(span, past)
        if bool(rows.any()):
            blank = past.embeds.new_zeros(batch, rows.shape[1], size)
            embeds = [self._sink(past.embeds), blank, *embeds]
            real = [self.filled(past), rows, *real]
        if sum(x.shape[1] for x in embeds) == 0:
            return None
        return Opening(embeds=torch.cat(embeds, dim=1), real=torch.cat(real, dim=1))

    def rows(self, span: int, past: Past) -> Tensor:
        """[B, n] bool: the columns for rows in front of `span`, and who has them."""
        count = self.block if span == len(self.spans) - 1 else self.size
        return self.filled(past).expand(-1, count)

    def filled(self, past: Past) -> Tensor:
        """[B, 1] bool: whose pools hold something."""
        return past.state[f"{self._layer}.{WRITES}"].cpu()[:, None] > 0


class LayerPool(LayerMemory):
    """One layer's N rows, oldest first: hidden states of the last K tokens of closed segments."""

    def __init__(
        self,
        sizes: PoolSizes,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        stored: Literal["input", "output"],
        seed: int,
    ) -> None:
        """`dtype` is that of the model, whose hidden states are kept as they are."""
        super().__init__()
        self.again, self.write_span = tokens_before(sizes.spans), len(sizes.spans)
        self.block, self.size = sizes.num_memory_tokens, sizes.rows
        self.hidden_size, self.dtype, self.stored, self.seed = hidden_size, dtype, stored, seed
        self.move_sink = Offset(hidden_size)
        self.mark_written = Offset(hidden_size)

    def begin(self, rows: int, device: torch.device) -> State:
        """An empty pool: [B, N, E] rows, and [B] writes, on the CPU: they decide what is read."""
        shape = rows, self.size, self.hidden_size
        return {
            POOL: torch.zeros(shape, dtype=self.dtype, device=device),
            WRITES: torch.zeros(rows, dtype=torch.long, device="cpu"),
        }

    def read(self, hidden: Tensor, state: State, columns: Columns) -> Tensor:
        """The layer's input, with this layer's rows in the columns that wait for them: the last
        ones before the tokens.
        """
        for part in columns.openings:
            own, first = hidden[:, part.begin : part.end], part.end - self.again[part.span]
            front, tokens = own[:, : first - part.begin], own[:, first - part.begin :]
            if front.shape[1]:
                rows = self.rows(part.span, tokens, state).to(hidden)
                sink, others = front[:, :1], front[:, 1 : front.shape[1] - rows.shape[1]]
                front = torch.cat([self.move_sink(sink), others, rows], dim=1)
            if part.span == self.write_span:
                kept, last = tokens[:, : -self.block], tokens[:, -self.block :]
                tokens = torch.cat([kept, self.mark_written(last)], dim=1)
            own = torch.cat([front, tokens], dim=1)
            hidden = torch.cat([hidden[:, : part.begin], own, hidden[:, part.end :]], dim=1)
        return hidden

    def rows(self, span: int, tokens: Tensor, state: State) -> Tensor:
        """The rows [B, n, E] in front of `span`, before whose tokens `tokens` [B, t, E] stand."""
        return state[POOL][:, -self.block if span == self.write_span else 0 :]

    def write(self, inputs: Tensor, outputs: Tensor, state: State, closing: Part) -> State:
        """Drop K rows at random and append the new; a first write fills the pool with copies."""
        if closing.span != self.write_span:
            return {}
        new = inputs if self.stored == "input" else outputs
        new = new[:, closing.end - self.block : closing.end].to(state[POOL])
        done = tuple(state[WRITES].tolist())
        return self.replaced(new, state, *_drawn(done, self.size, self.block, self.seed))

    def replaced(self, new: Tensor, state: State, stay: Tensor, leave: Tensor) -> State:
        """The state after K new rows [B, K, E] came and the places `leave` [B, K] were dropped."""
        empty = (state[WRITES] == 0).to(new.device)[:, None, None]
        moved = torch.cat([rows_at(state[POOL], stay), new], dim=1)
        copies = new.repeat(1, self.size // self.block, 1)
        return {POOL: torch.where(empty, copies, moved), WRITES: state[WRITES] + 1}
