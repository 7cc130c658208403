"""What memories with a store share: what leaves is appended, what is fetched is placed and read.

Which of the stored tokens a query attends is left to the subclass. It asks for whole blocks
(`fetched`), says what each query attends of them and reads (`read`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memretrofit.errors import StateError
from memretrofit.modules.memory import AttentionMemory, Block, State
from memretrofit.modules.positions import POSITIONS, Positions
from memretrofit.modules.slab import Placement
from memretrofit.modules.store import Store
from memretrofit.ops.attend import weighted
from memretrofit.ops.select import listed

QUERIES = 128
"""Queries that fetch the union of their blocks together."""
TURNED = 2**22
"""Numbers of the queries that are turned to each fetched block, at a time."""


class Asking(NamedTuple):
    """C queries that look for far tokens."""

    query: Tensor
    """[B, H, C, K] before the rotary embedding."""
    placed: Tensor
    """[B, H, C, K] where they stand in a search."""
    positions: Tensor
    """[B | 1, C] that place."""
    border: Tensor
    """[C] the last slot that has left each query's window."""

    def split(self, size: int) -> list[Asking]:
        """Consecutive queries, `size` at a time."""
        parts = zip(
            self.query.split(size, dim=2),
            self.placed.split(size, dim=2),
            self.positions.split(size, dim=1),
            self.border.split(size),
            strict=True,
        )
        return [Asking(*part) for part in parts]


class Far(NamedTuple):
    """Blocks that were fetched for C queries."""

    blocks: Tensor
    """[B, G, U] their numbers in the store, oldest first."""
    keys: Tensor
    """[B, G, U, S, K] at the positions of the policy."""
    values: Tensor
    """[B, G, U, S, V]."""
    left: Tensor
    """[B, G, C, U, S] whether the token has left the query's window."""
    member: Tensor
    """[B, H | G | 1, C, U] whether the query wants the block."""

    def attended(self, heads: int) -> Tensor:
        """[B, H, C, U, S] the tokens of the wanted blocks that have left the query's window."""
        return _per_head(self.member, heads)[..., None] & _per_head(self.left, heads)


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] in (1, heads) else x.repeat_interleave(heads // x.shape[1], dim=1)


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention of consecutive queries, o [B, H, C, V] and lse [B, H, C], from that of parts."""
    if len(parts) == 1:
        return parts[0]
    outputs, normalisers = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(normalisers, dim=2)


def refuse_training(memory: nn.Module, placement: Placement) -> None:
    """Refuse to train `memory` beside a store at `placement`, which takes no gradients: what
    earlier layers learn from far tokens would be lost without a word.

    Raises:
        StateError: off the device, where a parameter of the memory would get a gradient.
    """
    if placement == "device" or not torch.is_grad_enabled():
        return
    if any(parameter.requires_grad for parameter in memory.parameters()):
        raise StateError(
            f"A {type(memory).__name__} that trains has its store at placement={placement!r}, "
            "through which no gradients flow. Train with placement='device', or run this under "
            "torch.no_grad()."
        )


class StoreMemory(AttentionMemory):
    """A store of all that left the window; subclasses choose what a query attends of it."""

    key_space = "pre_rope"
    shares_softmax = True

    def __init__(
        self,
        *,
        sliding_window: int,
        num_sink_tokens: int,
        block_size: int,
        positions: Positions,
        position_group: int,
        num_key_value_heads: int,
        key_dim: int,
        value_dim: int,
        placement: Placement = "device",
        hot_bytes: int = 0,
    ) -> None:
        super().__init__(sliding_window=sliding_window, num_sink_tokens=num_sink_tokens)
        self.block_size = block_size
        self.policy, self.position_group = POSITIONS[positions], position_group
        # where far keys stand nearer than they are, sinks do too: no distance is untrained
        self.sink_positions = "absolute" if positions == "absolute" else "slot"
        self.placement: Placement = placement
        self.hot_bytes = hot_bytes
        self.state_heads, self.key_dim, self.value_dim = num_key_value_heads, key_dim, value_dim

    @property
    def key_placement(self) -> Placement:
        """Where keys lie; values lie where `placement` says."""
        return self.placement

    def longest(self, positions: int) -> int | None:
        """That of the policy, where sinks do not stand at their own place."""
        if self.sink_positions == "absolute":
            return positions
        return self.policy.longest(positions, self.sliding_window, self.position_group)

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """An empty store."""
        shape = (batch_size, self.state_heads, 0)
        return (
            Store.empty(
                self.block_size,
                like.new_empty(*shape, self.key_dim),
                like.new_empty(*shape, self.value_dim),
                placement=self.placement,
                key_placement=self.key_placement,
                hot_bytes=self.hot_bytes,
            ),
        )

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's store on all tiers, without the room that it keeps for growth."""
        per_token = itemsize * self.state_heads * (self.key_dim + self.value_dim) + 8
        return -(-tokens // self.block_size) * self.block_size * per_token

    def tier_nbytes(self, tokens: int = 0, itemsize: int = 4) -> dict[str, int]:
        """`state_nbytes` by where they lie; the room of `hot_bytes` on the device excepted."""
        numbers = -(-tokens // self.block_size) * self.block_size * self.state_heads
        found = {"device": self.state_nbytes(tokens, itemsize)}
        for where, width in ((self.key_placement, self.key_dim), (self.placement, self.value_dim)):
            if where != "device":
                held = itemsize * numbers * width
                found["device"] -= held
                found[where] = found.get(where, 0) + held
        return found

    def filled(self, block: Block, state: State) -> Store:
        """The store of `state` with what leaves in `block`.

        Raises:
            StateError: the memory trains, and the store takes no gradients.
        """
        refuse_training(self, self.placement)
        store = state[0]
        assert isinstance(store, Store)
        key = self.stored_key(block, store)
        return store.append(key, block.leaving_value, block.leaving_slots, block.writes)

    def stored_key(self, block: Block, store: Store) -> Tensor:
        """What is kept as the leaving keys, [B, G, C, K]."""
        return block.leaving_key

    def searched(self, keys: Tensor, places: Tensor, block: Block) -> Tensor:
        """Keys [n, h, T, K] where their places [n | 1, T] put them in a search."""
        return block.rotate(keys, self.policy.key(places, self.position_group))

    def asking(self, block: Block, store: Store) -> Asking:
        """The queries of `block`, which has some, where they stand for the tokens of `store`."""
        assert block.query is not None
        # not `self.sliding_window`: a forward may run in another window (`window_override`)
        window = (block.query_slots - block.leaving_slots)[:1]
        places = block.query_slots - store.origin[:, None]
        # before anything has left a row, there is nothing that its queries stand apart from
        positions = self.policy.query(places.clamp(min=0), window, self.position_group)
        placed = block.rotate(block.query, positions)
        return Asking(block.query, placed, positions, block.leaving_slots)

    def placed(
        self, keys: Tensor, slots: Tensor, asking: Asking, store: Store, block: Block
    ) -> Tensor:
        """Fetched keys [B, G, U, S, K] where their slots [B, G, U, S] put them."""
        # a place without a token may have any slot: its position only has to exist
        places = slots.clamp(max=asking.border[-1]) - store.origin[:, None, None, None]
        entries = torch.arange(slots.shape[-1], device=slots.device)
        positions = self.policy.fetched(places.clamp(min=0), entries, self.position_group)
        flat = keys.flatten(0, 1).flatten(1, 2)[:, None]
        return block.rotate(flat, positions.flatten(0, 1).flatten(1)).view_as(keys)

    def fetched(self, wanted: Tensor, asking: Asking, store: Store, block: Block) -> Far:
        """The blocks that any of the queries wants [B, H | G | 1, C, N]."""
        heads, count = wanted.shape[1:3]
        # the heads of a group fetch the union of what they want
        grouped = wanted.unflatten(1, (min(heads, self.state_heads), -1)).flatten(2, 3)
        index, member = listed(grouped)
        member = member.unflatten(2, (-1, count)).flatten(1, 2)
        index = index.expand(-1, self.state_heads, -1)
        keys, values, slots = store.fetch(index)
        left = slots[:, :, None] <= asking.border[:, None, None]  # [B, G, C, U, S]
        return Far(index, self.placed(keys, slots, asking, store, block), values, left, member)

    def read(
        self, asking: Asking, keys: Tensor, values: Tensor, attended: Tensor, block: Block
    ) -> tuple[Tensor, Tensor]:
        """Attention over fetched blocks alone, o [B, H, C, V] and lse [B, H, C]: keys [B, G, U, S,
        K] as `placed`, values [B, G, U, S, V] and what each query sees, [B, H, C, U, S].
        """
        logits = self.logits(asking, keys, attended, block)
        return weighted(logits.flatten(-2), values.flatten(2, 3), attended.flatten(-2))

    def logits(self, asking: Asking, keys: Tensor, attended: Tensor, block: Block) -> Tensor:
        """[B, H, C, U, S'] the model's logits on keys [B, G, U, S', K] of fetched blocks: their
        tokens, or what stands for them, with the first token's place.
        """
        further = self.policy.further(attended)
        if further is None:
            return block.scores(asking.placed, keys.flatten(2, 3)).unflatten(-1, keys.shape[2:4])
        rows, heads, count, blocks = further.shape
        positions = asking.positions[:, None, :, None] + further
        step = max(1, TURNED // (rows * heads * count * keys.shape[-1]))
        parts = []
        for part in range(0, blocks, step):
            at = positions[..., part : part + step]
            wide = asking.query[..., None, :].expand(*at.shape, -1)
            turned = block.rotate(
                wide.reshape(rows * heads, 1, -1, wide.shape[-1]), at.reshape(rows * heads, -1)
            )
            # each block has queries of its own: blocks are rows of the batch
            by_block = turned.view(wide.shape).movedim(3, 1).flatten(0, 1)
            found = block.scores(
                by_block, keys[:, :, part : part + step].transpose(1, 2).flatten(0, 1)
            )
            parts.append(found.unflatten(0, (rows, -1)).movedim(1, 3))
        return torch.cat(parts, dim=3)
