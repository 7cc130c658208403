"""Some KV heads attend everything, the others sinks and window alone.

What leaves the window is stored for the chosen KV heads g in F, and their query heads read all of
it, in one softmax with the window::

    out_t = merge(attend(q_t, window), attend(q_t, all that left by t))     query heads of F
    out_t = attend(q_t, window)                                             the others

The stored tokens are read block by block where they lie, without a copy, and the blocks are merged
by their normalisers, a slice of blocks at a time, so that the memory of a read does not grow with
the text; its time is linear in it, as it must be. That is also why the store stays on the device:
elsewhere, every step would move all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memretrofit.modules.memory import AttentionMemory, Block, State
from memretrofit.modules.store import Store
from memretrofit.ops.attend import merge, merge_all

BLOCK = 64
"""Tokens of a block of the store: what is fetched at the least."""
NUMBERS = 2**22
"""What one KV head holds at a time: of each block in a slice, its queries, scores and outputs."""


class HeadPlanMemory(AttentionMemory):
    """A store for some KV heads, all of which their query heads attend."""

    shares_softmax = True

    def __init__(
        self,
        *,
        heads: tuple[int, ...],
        num_heads: int,
        num_key_value_heads: int,
        key_dim: int,
        value_dim: int,
        sliding_window: int,
        num_sink_tokens: int,
        numbers_at_once: int = NUMBERS,
    ) -> None:
        super().__init__(sliding_window=sliding_window, num_sink_tokens=num_sink_tokens)
        self.heads, self.state_heads = heads, len(heads)
        sharing = num_heads // num_key_value_heads
        self.query_heads = tuple(g * sharing + i for g in heads for i in range(sharing))
        self.key_dim, self.value_dim = key_dim, value_dim
        self.numbers_at_once = numbers_at_once

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """An empty store of the chosen heads; no state at all where none is chosen."""
        if not self.heads:
            return ()
        shape = (batch_size, self.state_heads, 0)
        return (
            Store.empty(
                BLOCK,
                like.new_empty(*shape, self.key_dim),
                like.new_empty(*shape, self.value_dim),
            ),
        )

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's store, without the room that it keeps for growth."""
        per_token = itemsize * self.state_heads * (self.key_dim + self.value_dim) + 8
        return -(-tokens // BLOCK) * BLOCK * per_token if self.heads else 0

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Store what leaves, and let the chosen heads attend all that ever left."""
        if not self.heads:
            return super().forward(block, state)
        (store,) = state
        assert isinstance(store, Store)
        chosen = torch.tensor(self.heads, device=block.writes.device)
        key, value = (x.index_select(1, chosen) for x in (block.leaving_key, block.leaving_value))
        grown = store.append(key, value, block.leaving_slots, block.writes)
        if block.query is None:
            return None, (grown,)
        if not grown.block_count():
            return block.local(), (grown,)
        readers = torch.tensor(self.query_heads, device=block.writes.device)
        near, near_lse = block.attend()
        query = block.query.index_select(1, readers)
        far = self._far(block, query, key, value, store)
        both, _ = merge(near.index_select(1, readers), near_lse.index_select(1, readers), *far)
        output = near.index_copy(1, readers, both)
        return output.transpose(1, 2).to(block.leaving_value.dtype), (grown,)

    def _far(
        self, block: Block, query: Tensor, key: Tensor, value: Tensor, store: Store
    ) -> tuple[Tensor, Tensor]:
        """Attention over what left as the block's own queries arrived, and over all of `store`,
        which left before the first of them.
        """
        count = query.shape[2]
        arrived = torch.ones(count, count, dtype=torch.bool, device=query.device).tril()
        found = block.attend_to(query, key, value, block.writes[:, None, None] & arrived)
        rows, width = query.shape[0], query.shape[-1]
        per_block = (
            count * query.shape[1] // self.state_heads * (width + self.value_dim + store.block_size)
        )
        step = max(1, self.numbers_at_once // (rows * per_block))
        for keys, values, held in store.slices(step):
            # blocks are rows of the batch: the queries are repeated, which are few, not the keys
            o, lse = block.attend_to(
                query.expand(len(keys), *query.shape).flatten(0, 1),
                keys.flatten(0, 1),
                values.flatten(0, 1),
                held.flatten(0, 1)[:, None, None],
            )
            part = merge_all(o.unflatten(0, (-1, rows)), lse.unflatten(0, (-1, rows)))
            found = merge(*found, *part)
        return found
