"""Attention over the window and over blocks that are fetched from a store of what left it.

One softmax over two disjoint sets of tokens: sinks and window, as always, and the far tokens that
the query t fetches (Block size S, window W)::

    open(t)   = blocks whose last token has left the window at t
    score     = R(pos(t)) q_t . mean of R(pos(j)) k_j,  of one head, or summed over those that
                choose together
    far(t)    = the k best of open(t)  and  what has left the window and fills no block yet
    out_t     = merge(attend(q_t, window), attend(q_t, far(t)))

A query chooses from what it sees alone, so any split of a text gives the same choices. Where far
keys stand for the rotary embedding is the position policy's choice (`modules.positions`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from memretrofit.modules.memory import Block, State
from memretrofit.modules.store import Store
from memretrofit.modules.stored import QUERIES, Asking, StoreMemory, joined
from memretrofit.ops.attend import merge
from memretrofit.ops.select import choose_blocks

Granularity = Literal["head", "kv_head", "layer"]


def block_faults(block_size: int, sliding_window: int) -> list[str]:
    """What is wrong with a block that is larger than the window: it would not be whole when its
    first token leaves.
    """
    if block_size <= sliding_window:
        return []
    return [
        f"block_size={block_size} is larger than sliding_window={sliding_window}; choose a block "
        "of at most the window"
    ]


class RecallMemory(StoreMemory):
    """A store of all that left the window, and attention over the blocks that a query chooses."""

    def __init__(self, *, top_k: int, granularity: Granularity, **stored: Any) -> None:
        super().__init__(**stored)
        self.top_k, self.granularity = top_k, granularity

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's store and its summaries, without the room that it keeps for growth."""
        blocks = -(-tokens // self.block_size)
        summaries = blocks * 4 * self.state_heads * self.key_dim
        return super().state_nbytes(tokens, itemsize) + summaries

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Store what leaves, and attend over the window and the blocks that each query chooses."""
        store = self.filled(block, state)
        if block.query is None:
            return None, (store,)
        if not store.block_count():
            return block.local(), (store,)
        output, _ = merge(*block.attend(), *self.far(block, store))
        return output.transpose(1, 2).to(block.leaving_value.dtype), (store,)

    def filled(self, block: Block, state: State) -> Store:
        """The store of `state` with what leaves in `block`, and what stands for its blocks."""
        store = super().filled(block, state)
        return store.summarise(lambda keys, places: self.summary(keys, places, block))

    def summary(self, keys: Tensor, places: Tensor, block: Block) -> Tensor:
        """What stands for full blocks in a search, from their keys [n, B, G, S, K] and places
        [n, B, S]: the mean key, [n, B, G, K].
        """
        found = self.searched(keys.flatten(0, 1), places.flatten(0, 1), block)
        return found.mean(-2).view_as(keys[..., 0, :])

    def far(self, block: Block, store: Store) -> tuple[Tensor, Tensor]:
        """Attention over far tokens alone: o [B, H, C, V] and lse [B, H, C]."""
        asking = self.asking(block, store)
        wanted = self.choose(asking.placed, asking.border, store)
        pairs = zip(asking.split(QUERIES), wanted.split(QUERIES, dim=2), strict=True)
        return joined([self._attend(part, member, store, block) for part, member in pairs])

    def choose(self, query: Tensor, border: Tensor, store: Store) -> Tensor:
        """Which blocks each query attends: [B, H | G | 1, C, N] bool. `border` [C] is the last
        slot that has left each query's window.
        """
        first, last = store.spans()  # [B, N]
        full = last[:, None, None] <= border[:, None]
        begun = first[:, None, None] <= border[:, None]
        summaries = store.summaries[: first.shape[1]]
        missing = first.shape[1] - summaries.shape[0]
        query = query.unflatten(1, (self.state_heads, -1)).to(summaries.dtype)  # [B, G, H/G, C, K]
        if self.granularity != "head":
            query = query.sum(2, keepdim=True)
        scores = torch.einsum("bgjcd,nbgd->bgjcn", query, summaries).flatten(1, 2)
        if self.granularity == "layer":
            scores = scores.sum(1, keepdim=True)
        scores = F.pad(scores, (0, missing))  # the last block may not be full yet
        return choose_blocks(scores, full, self.top_k) | (begun & ~full)

    def _attend(
        self, asking: Asking, wanted: Tensor, store: Store, block: Block
    ) -> tuple[Tensor, Tensor]:
        far = self.fetched(wanted, asking, store, block)
        attended = far.attended(asking.query.shape[1])
        return self.read(asking, far.keys, far.values, attended, block)
