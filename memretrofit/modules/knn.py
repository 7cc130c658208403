"""Attention over the window, and beside it over the stored tokens nearest to each query.

Two softmaxes, mixed per head; the store, and where far keys stand, are those of `modules.stored`,
with blocks of one token. A token has one place for all its readers, so its key is stored where it
stands, and the search reads the stored keys themselves: they stay on the device, while values may
lie elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memretrofit.modules.memory import Block, State, widened
from memretrofit.modules.slab import Placement
from memretrofit.modules.store import Store
from memretrofit.modules.stored import QUERIES, Asking, StoreMemory, joined
from memretrofit.ops.select import choose_blocks

SCORES = 2**20
"""Scores that one head holds at a time: queries times stored tokens."""
SEARCHED = 2**14
"""Stored keys that are searched at a time: what is widened of keys in half precision."""


class ReadGate(nn.Module):
    """out = (1 - g) local + g far, with g = tanh(max(b, 0)) per head; b starts at 0, so that the
    gate is closed and can open.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        self.opening = nn.Parameter(torch.zeros(num_heads))

    def forward(self, local: Tensor, far: Tensor, found: Tensor) -> Tensor:
        """`local` and `far` [B, C, H, V]; `found` [B, C, H] bool: where there is no far token,
        g = 0.
        """
        opening = widened(self.opening)
        opening = opening + (opening.clamp(min=0) - opening).detach()  # at zero it can still rise
        gate = (opening.tanh() * found)[..., None]
        near = widened(local)
        return (near + gate * (far - near)).to(local.dtype)


class KNNMemory(StoreMemory):
    """Each query head attends the `top_k` stored tokens whose keys score highest with its query."""

    def __init__(self, *, num_heads: int, top_k: int, **stored: Any) -> None:
        super().__init__(block_size=1, **stored)
        self.top_k = top_k
        self.sink_positions = "absolute"  # with closed gates it is the plain window, sinks and all
        self.read_gate = ReadGate(num_heads)

    @property
    def key_placement(self) -> Placement:
        """A search reads every key."""
        return "device"

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Store what leaves, and mix the window's attention with that over the nearest tokens."""
        store = self.filled(block, state)
        if block.query is None:
            return None, (store,)
        local = block.local()
        if store.block_count():
            far, lse = self.far(block, store)
            far, found = far.transpose(1, 2), lse.mT > -torch.inf
        else:  # the gate takes part all the same: every process has its gradient
            far, found = torch.zeros_like(widened(local)), local.new_zeros(local.shape[:3]).bool()
        return self.read_gate(local, far, found), (store,)

    def stored_key(self, block: Block, store: Store) -> Tensor:
        """The leaving keys where they stand."""
        origin = store.origin_with(block.leaving_slots, block.writes)
        places = (block.leaving_slots - origin[:, None]).clamp(min=0)
        return self.searched(block.leaving_key, places, block).to(block.leaving_key.dtype)

    def far(self, block: Block, store: Store) -> tuple[Tensor, Tensor]:
        """Attention over each query's nearest tokens alone: o [B, H, C, V] and lse [B, H, C]."""
        size = min(QUERIES, max(1, SCORES // store.block_count()))
        parts = self.asking(block, store).split(size)
        return joined(
            [
                self._read_own(part, *self.nearest(part.placed, part.border, store), store, block)
                for part in parts
            ]
        )

    @torch.no_grad()
    def nearest(self, query: Tensor, border: Tensor, store: Store) -> tuple[Tensor, Tensor]:
        """Numbers of the stored tokens that each query [B, H, C, K] reads, [B, H, C, k] in the
        order of the text, and which of these there are [B, H, C, k] bool. `border` [C] is the last
        slot that has left each query's window.
        """
        slots, _ = store.spans()  # [B, N]
        count = slots.shape[1]
        query = widened(query).unflatten(1, (self.state_heads, -1))
        scores = torch.cat(
            [
                torch.einsum("bgicd,nbgd->bgicn", query, widened(keys[..., 0, :]))
                for piece in store.keys.pieces(count)
                for keys in piece.split(SEARCHED)
            ],
            dim=-1,
        ).flatten(1, 2)
        left = (slots[:, None] <= border[:, None])[:, None]  # [B, 1, C, N]
        chosen = choose_blocks(scores, left, self.top_k)
        held, index = chosen.byte().topk(min(self.top_k, count), dim=-1)
        index = index.masked_fill(held == 0, count).sort(-1).values
        return index.clamp(max=count - 1), index < count

    def _read_own(
        self, asking: Asking, index: Tensor, held: Tensor, store: Store, block: Block
    ) -> tuple[Tensor, Tensor]:
        rows, heads, count, found = index.shape
        keys, values, _ = store.fetch(index.reshape(rows, self.state_heads, -1))

        def by_query(x: Tensor) -> Tensor:
            return x.transpose(1, 2).flatten(0, 1)

        # every query has tokens of its own: queries are rows of the batch
        alone = Asking(
            by_query(asking.query)[:, :, None],
            by_query(asking.placed)[:, :, None],
            asking.positions.expand(rows, -1).flatten()[:, None],
            asking.border,
        )
        keys, values = (
            by_query(x.reshape(rows, heads, count, found, 1, -1)) for x in (keys, values)
        )
        o, lse = self.read(alone, keys, values, by_query(held)[:, :, None, :, None], block)
        o, lse = (x.unflatten(0, (rows, count)).transpose(1, 2) for x in (o, lse))
        return o.squeeze(3), lse.squeeze(3)
