"""Attention over the window and over blocks that are fetched from a store of what left it.

One softmax over two disjoint sets of tokens: sinks and window, as always, and the far tokens that
the query t fetches (Block size S, window W)::

    open(t)   = blocks whose last token has left the window at t
    score     = R(pos(t)) q_t . mean of R(pos(j)) k_j,  of one head, or summed over those that
                choose together
    far(t)    = the k best of open(t)  and  what has left the window and fills no block yet
    out_t     = merge(attend(q_t, window), attend(q_t, far(t)))

A query chooses from what it sees alone, so any split of a text gives the same choices. Where far
keys stand for the rotary embedding is the position policy's choice (`POSITIONS`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memretrofit.modules.memory import AttentionMemory, Block, State
from memretrofit.modules.slab import Placement
from memretrofit.modules.store import Store
from memretrofit.ops.attend import merge
from memretrofit.ops.select import choose_blocks, listed

Positions = Literal["absolute", "clamp"]
Granularity = Literal["head", "kv_head", "layer"]

QUERIES = 128
"""Queries that fetch the union of their blocks together."""


class Policy(NamedTuple):
    """Where a query at slot t and a far key at slot j stand for the rotary embedding."""

    query: Callable[[Tensor, Tensor], Tensor]
    """(t, W [1]) to the position of the query."""
    key: Callable[[Tensor], Tensor]
    """j to the position of the key."""


POSITIONS: dict[str, Policy] = {
    "absolute": Policy(lambda slot, window: slot, lambda slot: slot),
    # every far key stands at the border of the window (InfLLM, arXiv:2402.04617)
    "clamp": Policy(lambda slot, window: window.expand_as(slot), torch.zeros_like),
}


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


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention of consecutive queries, o [B, H, C, V] and lse [B, H, C], from that of parts."""
    if len(parts) == 1:
        return parts[0]
    outputs, normalisers = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(normalisers, dim=2)


class Far(NamedTuple):
    """Blocks that were fetched for C queries."""

    blocks: Tensor
    """[B, G, U] their numbers in the store."""
    keys: Tensor
    """[B, G, U, S, K] at the positions of the policy."""
    values: Tensor
    """[B, G, U, S, V]."""
    left: Tensor
    """[B, G, C, U, S] whether the token has left the query's window."""
    member: Tensor
    """[B, H | G | 1, C, U] whether the query wants the block."""


class RecallMemory(AttentionMemory):
    """A store of all that left the window, and attention over the blocks that a query chooses."""

    key_space = "pre_rope"
    shares_softmax = True

    def __init__(
        self,
        *,
        sliding_window: int,
        num_sink_tokens: int,
        block_size: int,
        top_k: int,
        granularity: Granularity,
        positions: Positions,
        num_key_value_heads: int,
        key_dim: int,
        value_dim: int,
        placement: Placement = "device",
        cache_bytes: int = 0,
    ) -> None:
        super().__init__(sliding_window=sliding_window, num_sink_tokens=num_sink_tokens)
        self.block_size, self.top_k, self.granularity = block_size, top_k, granularity
        self.placement: Placement = placement
        self.cache_bytes = cache_bytes
        self.policy = POSITIONS[positions]
        # where far keys stand nearer than they are, sinks do too: no distance is untrained
        self.positions = "absolute" if positions == "absolute" else "slot"
        self.state_heads, self.key_dim, self.value_dim = num_key_value_heads, key_dim, value_dim

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """An empty store."""
        shape = (batch_size, self.state_heads, 0)
        return (
            Store.empty(
                self.block_size,
                like.new_empty(*shape, self.key_dim),
                like.new_empty(*shape, self.value_dim),
                placement=self.placement,
                cache_bytes=self.cache_bytes,
            ),
        )

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's store, without the room that it keeps for growth."""
        blocks = -(-tokens // self.block_size)
        per_token = itemsize * self.state_heads * (self.key_dim + self.value_dim) + 8
        return blocks * (self.block_size * per_token + 4 * self.state_heads * self.key_dim)

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
        """The store of `state` with what leaves in `block`."""
        (store,) = state
        assert isinstance(store, Store)
        store = store.append(
            block.leaving_key, block.leaving_value, block.leaving_slots, block.writes
        )
        return store.summarise(lambda keys, slots: self.summary(keys, slots, block))

    def far_query(self, block: Block) -> Tensor:
        """The queries where they stand for far keys, [B, H, C, K]."""
        assert block.query is not None
        # not `self.sliding_window`: a forward may run in another window (`window_override`)
        window = (block.query_slots - block.leaving_slots)[:1]
        return block.rotate(block.query, self.policy.query(block.query_slots, window)[None])

    def far_keys(self, keys: Tensor, slots: Tensor, border: Tensor, block: Block) -> Tensor:
        """Fetched keys [B, G, U, S, K] where their slots [B, G, U, S] put them, [B, G, U S, K]."""
        # a place without a token may have any slot: its position only has to exist
        positions = self.policy.key(slots.clamp(max=border[-1].clamp(min=0))).flatten(2)
        keys = keys.flatten(2, 3)
        placed = block.rotate(keys.flatten(0, 1)[:, None], positions.flatten(0, 1))
        return placed.view_as(keys)

    def summary(self, keys: Tensor, slots: Tensor, block: Block) -> Tensor:
        """What stands for full blocks in a search, from their keys [n, B, G, S, K] and slots
        [n, B, S]: the mean key, [n, B, G, K].
        """
        placed = self._placed(keys.flatten(0, 1), slots.flatten(0, 1), block)
        return placed.mean(-2).view_as(keys[..., 0, :])

    def _placed(self, keys: Tensor, slots: Tensor, block: Block) -> Tensor:
        """Keys [n, h, S, K] at the positions that their slots [n, S] have for a far query."""
        return block.rotate(keys, self.policy.key(slots))

    def far(self, block: Block, store: Store) -> tuple[Tensor, Tensor]:
        """Attention over far tokens alone: o [B, H, C, V] and lse [B, H, C]."""
        query, border = self.far_query(block), block.leaving_slots
        wanted = self.choose(query, border, store)
        return joined(
            [
                self._attend(q, left, member, store, block)
                for q, left, member in zip(
                    query.split(QUERIES, dim=2),
                    border.split(QUERIES),
                    wanted.split(QUERIES, dim=2),
                    strict=True,
                )
            ]
        )

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

    def fetched(self, wanted: Tensor, border: Tensor, store: Store, block: Block) -> Far:
        """The blocks that any of the queries wants [B, H | G | 1, C, N]."""
        heads, count = wanted.shape[1:3]
        # the heads of a group fetch the union of what they want
        grouped = wanted.unflatten(1, (min(heads, self.state_heads), -1)).flatten(2, 3)
        index, member = listed(grouped)
        member = member.unflatten(2, (-1, count)).flatten(1, 2)
        index = index.expand(-1, self.state_heads, -1)
        keys, values, slots = store.fetch(index)
        placed = self.far_keys(keys, slots, border, block)
        left = slots[:, :, None] <= border[:, None, None]  # [B, G, C, U, S]
        return Far(index, placed.view_as(keys), values, left, member)

    def _attend(
        self, query: Tensor, border: Tensor, wanted: Tensor, store: Store, block: Block
    ) -> tuple[Tensor, Tensor]:
        far = self.fetched(wanted, border, store, block)
        sharing = query.shape[1] // self.state_heads
        left = far.left.repeat_interleave(sharing, dim=1)  # [B, H, C, U, S]
        member = far.member
        if member.shape[1] == self.state_heads:
            member = member.repeat_interleave(sharing, dim=1)
        visible = (member[..., None] & left).flatten(-2)
        return block.attend_to(query, far.keys.flatten(2, 3), far.values.flatten(2, 3), visible)
