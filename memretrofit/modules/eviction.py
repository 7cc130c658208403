"""Attention over sinks, window and a fixed number of tokens that were worth keeping.

What leaves the window enters a buffer. Whenever a row has buffered `interval` tokens (W window, N
sinks), the best of the kept and the buffered ones stay, and the buffer is empty again::

    out_t  = softmax over  sinks, (t - W, t], kept, buffer                         [V]
    at a prune, after query t:
    kept   = the capacity best of kept and buffer;  buffer = {}

Prunes stand at fixed places of a row and weigh only the queries up to there, so the result does
not depend on how a text is cut, and a prune changes nothing before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from memretrofit.errors import StateError
from memretrofit.modules.memory import AttentionMemory, Block, State, widened
from memretrofit.ops.attend import merge
from memretrofit.ops.eviction import best, pooled, received

NOTHING = 1e30
"""Normaliser of a query that attended nothing (padding, before the text): it pays nothing."""


PLACES = ("kept_key", "kept_value", "new_key", "new_value", "received")
"""What `Held` has of each place, on axis 2."""


class Held(NamedTuple):
    """The state. A row's tokens stand in order of age: kept ones at the end of M places, buffered
    ones at the beginning of I.
    """

    kept_key: Tensor
    """[B, G, M, K] after the rotary embedding, at their true positions."""
    kept_value: Tensor
    """[B, G, M, V]."""
    new_key: Tensor
    """[B, G, I, K] the buffer."""
    new_value: Tensor
    """[B, G, I, V]."""
    counts: Tensor
    """[B, 3] tokens kept, in the buffer, and ever left."""
    query: Tensor
    """[B, H, w, K] the last queries."""
    lse: Tensor
    """[B, H, w] log of their normalisers, over all that they attended."""
    received: Tensor | None = None
    """[B, G, M + I] attention that each token got so far (H2O)."""

    def state(self) -> State:
        """What the cache keeps."""
        return tuple(x for x in self if x is not None)

    def visible(self) -> Tensor:
        """[B, M + I] which places hold a token."""
        kept, new = (self.counts[:, n, None] for n in (0, 1))
        room, buffer = self.kept_key.shape[2], self.new_key.shape[2]
        places = torch.arange(room + buffer, device=self.counts.device)
        return (places >= room - kept) & (places < room + new)


class EvictionMemory(AttentionMemory):
    """Keeps what the last `observation_window` queries attended (SnapKV)."""

    shares_softmax = True
    observes_queries = True
    growing = MappingProxyType(
        dict.fromkeys((n for n, name in enumerate(Held._fields) if name in PLACES), 2)
    )

    def __init__(
        self,
        *,
        sliding_window: int,
        num_sink_tokens: int,
        capacity: Callable[[int], int],
        interval: int,
        observation_window: int,
        kernel_size: int,
        num_heads: int,
        num_key_value_heads: int,
        key_dim: int,
        value_dim: int,
    ) -> None:
        """`capacity` is the number of tokens to keep of a row that is so many tokens long."""
        super().__init__(sliding_window=sliding_window, num_sink_tokens=num_sink_tokens)
        self.capacity, self.interval = capacity, interval
        self.observation_window, self.kernel_size = observation_window, kernel_size
        self.num_heads, self.state_heads = num_heads, num_key_value_heads
        self.key_dim, self.value_dim = key_dim, value_dim

    def remembered(self) -> int:
        """How many queries the state holds."""
        return self.observation_window

    def _wanted(self, stretch: Stretch) -> int:
        """How many of the last queries are needed after `stretch`."""
        return self.remembered()

    def numbers_per_place(self) -> int:
        """Of one KV head."""
        return self.key_dim + self.value_dim

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """Nothing kept, nothing buffered, no query seen."""
        like, (rows, groups) = widened(like), (batch_size, self.state_heads)
        room = self.capacity(0)
        held = Held(
            like.new_zeros(rows, groups, room, self.key_dim),
            like.new_zeros(rows, groups, room, self.value_dim),
            like.new_zeros(rows, groups, self.interval, self.key_dim),
            like.new_zeros(rows, groups, self.interval, self.value_dim),
            like.new_zeros(rows, 3),
            like.new_zeros(rows, self.num_heads, self.remembered(), self.key_dim),
            like.new_full((rows, self.num_heads, self.remembered()), NOTHING),
        )
        return held.state()

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's state, float32."""
        room, pruned = self.capacity(0), tokens // self.interval * self.interval
        if pruned:
            length = pruned + self.sliding_window + self.num_sink_tokens
            room = max(room, self.capacity(length))
        held = self.state_heads * (room + self.interval) * self.numbers_per_place()
        return 4 * (held + 3 + self.num_heads * self.remembered() * (self.key_dim + 1))

    def packed(self, state: State) -> State:
        """The places that hold a token in some row."""
        held = Held(*cast("tuple[Tensor, ...]", state))
        kept, new = (int(count) for count in held.counts[:, :2].amax(0))
        room, told = held.kept_key.shape[2], held.received
        return held._replace(
            kept_key=held.kept_key[:, :, room - kept :],
            kept_value=held.kept_value[:, :, room - kept :],
            new_key=held.new_key[:, :, :new],
            new_value=held.new_value[:, :, :new],
            received=None if told is None else told[:, :, room - kept : room + new],
        ).state()

    def unpacked(self, state: State) -> State:
        """As many places as `initial_state` has, or more where more are kept."""
        held = Held(*cast("tuple[Tensor, ...]", state))
        kept, new = (int(count) for count in held.counts[:, :2].amax(0))
        found = [len(x[0, 0]) for name in PLACES if (x := getattr(held, name)) is not None]
        whole = bool((held.counts == held.counts.round()).all()) and bool((held.counts >= 0).all())
        expected = [kept, kept, new, new, kept + new][: len(found)]
        if not whole or found != expected or new >= self.interval:
            raise StateError(
                f"an eviction state with the counts {held.counts.tolist()} has {found} places for "
                f"{', '.join(PLACES[: len(found)])}; expected {expected}, fewer than "
                f"{self.interval} of them new"
            )
        before, behind = max(self.capacity(0) - kept, 0), self.interval - new
        told = held.received
        return held._replace(
            kept_key=F.pad(held.kept_key, (0, 0, before, 0)),
            kept_value=F.pad(held.kept_value, (0, 0, before, 0)),
            new_key=F.pad(held.new_key, (0, 0, 0, behind)),
            new_value=F.pad(held.new_value, (0, 0, 0, behind)),
            received=None if told is None else F.pad(told, (before, behind)),
        ).state()

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Attend over what is held, and prune where a row's buffer is full."""
        held = Held(*cast("tuple[Tensor, ...]", state))
        assert block.query is not None, "the seam shows every query to a memory that observes them"
        near, near_lse = block.attend()
        outputs: list[Tensor] = []
        for low, high, due in self._stretches(block, held):
            stretch = Stretch.cut(block, low, high, near.shape[0])
            held, first = self._buffered(held, stretch), held.counts[:, 1]
            seen = self._seen(held, stretch, first)
            output, lse = near[:, :, low:high], near_lse[:, :, low:high]
            room = held.kept_key.shape[2]
            for key, value, visible in (
                (held.kept_key, held.kept_value, seen[..., :room]),
                (held.new_key, held.new_value, seen[..., room:]),
            ):
                far = block.attend_to(stretch.query, key, value, visible)
                output, lse = merge(output, lse, *far)
            outputs.append(output)
            with torch.no_grad():
                lse = lse.masked_fill(lse == -torch.inf, NOTHING)
                held = self._observed(held, stretch, block, lse, first)
                places = self._places(held, block, stretch, due) if due.any() else None
            if places is not None:
                held = self._pruned(held, places, due)
        output = torch.cat(outputs, dim=2).transpose(1, 2)
        return output.to(block.leaving_value.dtype), held.state()

    def _stretches(self, block: Block, held: Held) -> Iterator[tuple[int, int, Tensor]]:
        """Queries low to high - 1, and the rows [B] that are pruned after the last of them."""
        writes = block.writes.expand(held.counts.shape[0], -1)
        count = held.counts[:, 1, None].long() + writes.cumsum(-1)
        due = writes & (count % self.interval == 0)
        ends = (due.any(0).nonzero()[:, 0] + 1).tolist()
        low, total = 0, writes.shape[1]
        for high in ends if ends and ends[-1] == total else [*ends, total]:
            yield low, high, due[:, high - 1]
            low = high

    def _buffered(self, held: Held, stretch: Stretch) -> Held:
        """`held` with what leaves in `stretch`, which fits the buffer."""
        row, column, place = stretch.written(held.counts[:, 1])
        if not row.numel():
            return held
        new_key, new_value = held.new_key.clone(), held.new_value.clone()
        new_key[row, :, place] = stretch.key[row, :, column].to(new_key.dtype)
        new_value[row, :, place] = stretch.value[row, :, column].to(new_value.dtype)
        left = F.pad(stretch.writes.sum(-1, keepdim=True).expand(-1, 2), (1, 0))
        return held._replace(new_key=new_key, new_value=new_value, counts=held.counts + left)

    def _seen(self, held: Held, stretch: Stretch, first: Tensor) -> Tensor:
        """[B, 1, C, M + I] what each query of `stretch` sees, of rows that had buffered `first`."""
        room, buffer = held.kept_key.shape[2], held.new_key.shape[2]
        places = torch.arange(room + buffer, device=first.device)
        arrived = room + first[:, None] + stretch.writes.cumsum(-1)  # [B, C]
        kept = places >= room - held.counts[:, :1]  # [B, M + I]
        return (kept[:, None] & (places < arrived[..., None]))[:, None]

    def _observed(
        self, held: Held, stretch: Stretch, block: Block, lse: Tensor, first: Tensor
    ) -> Held:
        """`held` after the queries of `stretch` attended, with normalisers `lse`; rows had buffered
        `first` [B] tokens before.
        """
        last = self._wanted(stretch)
        return held._replace(
            query=torch.cat([held.query, stretch.query.to(held.query.dtype)], 2)[:, :, -last:],
            lse=torch.cat([held.lse, lse.to(held.lse.dtype)], 2)[:, :, -last:],
        )

    def _scores(self, held: Held, block: Block) -> Tensor:
        """[B, G, M + I] how much each place is worth."""
        visible = held.visible()[:, None, None]
        key = torch.cat([held.kept_key, held.new_key], 2)
        found = received(block.scores(held.query, key), held.lse, visible, self.state_heads)
        return pooled(found, self.kernel_size)

    def _places(self, held: Held, block: Block, stretch: Stretch, due: Tensor) -> Tensor:
        """[B, G, M'] the places that stay, -1 where a row fills fewer than M'."""
        left = held.counts[:, 2].long().tolist()
        counts = [
            self.capacity(n + stretch.window + self.num_sink_tokens) if pruned else 0
            for n, pruned in zip(left, due.tolist(), strict=True)
        ]
        return best(
            self._scores(held, block),
            held.visible(),
            torch.tensor(counts, device=due.device),
            max(*counts, held.kept_key.shape[2]),
        )

    def _pruned(self, held: Held, places: Tensor, due: Tensor) -> Held:
        """`held` with `places` kept and an empty buffer, in the rows that are `due`."""
        more = places.shape[2] - held.kept_key.shape[2]

        def keep(kept: Tensor, new: Tensor) -> Tensor:
            every = torch.cat([kept, new], 2)
            index = places.clamp(min=0)[..., None].expand(-1, -1, -1, kept.shape[-1])
            chosen = every.gather(2, index).masked_fill(places[..., None] < 0, 0.0)
            return torch.where(due[:, None, None, None], chosen, F.pad(kept, (0, 0, more, 0)))

        def emptied(x: Tensor) -> Tensor:
            return x.masked_fill(due.view(-1, *(1,) * (x.ndim - 1)), 0.0)

        room, count = held.kept_key.shape[2], (places[:, 0] >= 0).sum(-1).to(held.counts.dtype)
        fresh = torch.stack([count, torch.zeros_like(count), held.counts[:, 2]], -1)
        told = held.received
        if told is not None:
            old, new = told[..., :room, None], told[..., room:, None]
            told = torch.cat([keep(old, new)[..., 0], emptied(new)[..., 0]], -1)
        return held._replace(
            kept_key=keep(held.kept_key, held.new_key),
            kept_value=keep(held.kept_value, held.new_value),
            new_key=emptied(held.new_key),
            new_value=emptied(held.new_value),
            counts=torch.where(due[:, None], fresh, held.counts),
            received=told,
        )


class HeavyHitterMemory(EvictionMemory):
    """Keeps what all queries so far attended (H2O)."""

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """As for SnapKV, with the sums."""
        state = super().initial_state(batch_size, like)
        places = self.capacity(0) + self.interval
        return (*state, widened(like).new_zeros(batch_size, self.state_heads, places))

    def remembered(self) -> int:
        """Those that attended a token while it was in the window."""
        return self.sliding_window

    def _wanted(self, stretch: Stretch) -> int:
        # not `self.sliding_window`: a forward may run in another window (`window_override`)
        return stretch.window

    def numbers_per_place(self) -> int:
        """The sum is one more."""
        return super().numbers_per_place() + 1

    def _observed(
        self, held: Held, stretch: Stretch, block: Block, lse: Tensor, first: Tensor
    ) -> Held:
        assert held.received is not None
        # what left before: these queries are new to it
        room = held.kept_key.shape[2]
        places = torch.arange(held.received.shape[-1], device=first.device)
        old = held.visible() & (places < room + first[:, None])
        key = torch.cat([held.kept_key, held.new_key], 2)
        told = held.received + received(
            block.scores(stretch.query, key), lse, old[:, None, None], self.state_heads
        )
        # what leaves now: so were those that attended it in the window
        query = torch.cat([held.query, stretch.query.to(held.query.dtype)], 2)
        every_lse = torch.cat([held.lse, lse.to(held.lse.dtype)], 2)
        past = torch.arange(-held.query.shape[2], 0, device=first.device)
        slots = torch.cat([stretch.query_slots[0] + past, stretch.query_slots])
        saw = (slots[:, None] >= stretch.leaving_slots) & stretch.writes[:, None]
        left = received(block.scores(query, stretch.key), every_lse, saw[:, None], self.state_heads)
        row, column, place = stretch.written(first)
        told[row, :, room + place] = left[row, :, column].to(told.dtype)
        return super()._observed(held, stretch, block, lse, first)._replace(received=told)

    def _scores(self, held: Held, block: Block) -> Tensor:
        assert held.received is not None
        return held.received


class Stretch(NamedTuple):
    """The part of a block between two prunes."""

    query: Tensor
    key: Tensor
    value: Tensor
    writes: Tensor
    query_slots: Tensor
    leaving_slots: Tensor

    @property
    def window(self) -> int:
        """Tokens between a query and what leaves as it arrives."""
        return int(self.query_slots[0] - self.leaving_slots[0])

    @classmethod
    def cut(cls, block: Block, low: int, high: int, rows: int) -> Stretch:
        """Queries `low` to `high` - 1 of `block`, and what leaves as they arrive."""
        assert block.query is not None
        return cls(
            block.query[:, :, low:high],
            block.leaving_key[:, :, low:high],
            block.leaving_value[:, :, low:high],
            block.writes[:, low:high].expand(rows, -1),
            block.query_slots[low:high],
            block.leaving_slots[low:high],
        )

    def written(self, first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and place in the buffer of each token that leaves; a row's next place is
        `first` [B].
        """
        row, column = self.writes.nonzero(as_tuple=True)
        place = first[:, None].long() + self.writes.cumsum(-1) - 1
        return row, column, place[row, column]
