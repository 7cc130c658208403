"""Attention over the window, and beside it over the stored tokens nearest to each query.

Two softmaxes, mixed per head; the store, and where far keys stand, are those of
`modules.recall`, with blocks of one token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memretrofit.modules.memory import Block, State, widened
from memretrofit.modules.recall import QUERIES, Positions, RecallMemory, joined
from memretrofit.modules.store import Store
from memretrofit.ops.select import choose_blocks

SCORES = 2**20
"""Scores that one head holds at a time: queries times stored tokens."""


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


class KNNMemory(RecallMemory):
    """Each query head attends the `top_k` stored tokens whose keys score highest with its query."""

    def __init__(
        self,
        *,
        num_heads: int,
        num_key_value_heads: int,
        key_dim: int,
        value_dim: int,
        top_k: int,
        positions: Positions,
        sliding_window: int,
        num_sink_tokens: int,
    ) -> None:
        super().__init__(
            sliding_window=sliding_window,
            num_sink_tokens=num_sink_tokens,
            block_size=1,
            top_k=top_k,
            granularity="kv_head",
            positions=positions,
            num_key_value_heads=num_key_value_heads,
            key_dim=key_dim,
            value_dim=value_dim,
        )
        self.positions = "absolute"  # with closed gates it is the plain window, sinks and all
        self.read_gate = ReadGate(num_heads)

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

    def far(self, block: Block, store: Store) -> tuple[Tensor, Tensor]:
        """Attention over each query's nearest tokens alone: o [B, H, C, V] and lse [B, H, C]."""
        query, border = self.far_query(block), block.leaving_slots
        size = min(QUERIES, max(1, SCORES // store.block_count()))
        return joined(
            [
                self._read(q, *self.nearest(q, left, store), left, store, block)
                for q, left in zip(query.split(size, dim=2), border.split(size), strict=True)
            ]
        )

    @torch.no_grad()
    def nearest(self, query: Tensor, border: Tensor, store: Store) -> tuple[Tensor, Tensor]:
        """Numbers of the stored tokens that each query reads [B, H, C, k], and which of these there
        are [B, H, C, k] bool. `border` [C] is the last slot that has left each query's window.
        """
        slots, _ = store.spans()  # [B, N]
        keys = store.summaries[: slots.shape[1]]
        grouped = query.unflatten(1, (self.state_heads, -1)).to(keys.dtype)
        scores = torch.einsum("bgicd,nbgd->bgicn", grouped, keys).flatten(1, 2)
        left = (slots[:, None] <= border[:, None])[:, None]  # [B, 1, C, N]
        chosen = choose_blocks(scores, left, self.top_k)
        held, index = chosen.byte().topk(min(self.top_k, slots.shape[1]), dim=-1)
        return index, held.bool()

    def _read(
        self,
        query: Tensor,
        index: Tensor,
        held: Tensor,
        border: Tensor,
        store: Store,
        block: Block,
    ) -> tuple[Tensor, Tensor]:
        (rows, heads, count, found), groups = index.shape, self.state_heads
        keys, values, slots = store.fetch(index.reshape(rows, groups, -1))
        placed = self.far_keys(keys, slots, border, block)

        def by_query(x: Tensor) -> Tensor:
            return x.reshape(rows, heads, count, found, -1).transpose(1, 2).flatten(0, 1)

        # every query has tokens of its own: queries are rows of the batch
        o, lse = block.attend_to(
            query.transpose(1, 2).flatten(0, 1)[:, :, None],
            by_query(placed),
            by_query(values),
            by_query(held).transpose(-1, -2),
        )
        o, lse = (x.unflatten(0, (rows, count)).transpose(1, 2) for x in (o, lse))
        return o.squeeze(3), lse.squeeze(3)
