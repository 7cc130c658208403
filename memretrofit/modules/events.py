"""Attention over the window and over events that are fetched from a store of what left it.

As `RecallMemory`, with events of `least` to `most` tokens, cut where the text surprised the model
(`ops.segment`), in the place of blocks of one size. The store keeps its tokens in blocks of
`least`, so that no block reaches into more than two events; event n of a row is its tokens
[ends[n - 1], ends[n]) in the order in which they left, L(t) of them before the query t::

    open(t) = { n : ends[n] < L(t),  or ends[n] = L(t) and event n is full }
    far(t)  = choose_events(open(t)),  and what has left the window in an event that is not open yet

so an event can be chosen once the token behind it has left, or nothing can join it any more.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from memretrofit.errors import StateError
from memretrofit.modules.memory import Block, State, widened
from memretrofit.modules.store import NEVER, Store
from memretrofit.modules.stored import QUERIES, Asking, StoreMemory, joined
from memretrofit.ops.attend import merge
from memretrofit.ops.segment import choose_events, coarse


class Events(NamedTuple):
    """The events of each row that are complete; zeros beyond a row's own number."""

    means: Tensor
    """[B, G, N, K] mean key of each, at the positions of the policy."""
    sizes: Tensor
    """[B, 1, N, 1] tokens of each."""
    begun: Tensor
    """[B, G, 1, K] sum of the keys of the event that is not complete."""


class _Read(NamedTuple):
    """What C queries see of the store."""

    wanted: Tensor
    """[B, G | 1, C, N + 1] the events; the last column is the one that is not complete."""
    left: Tensor
    """[B, C] tokens that have left before each query."""


class EventMemory(StoreMemory):
    """A store of all that left the window, and attention over the events that a query chooses."""

    growing = MappingProxyType({1: 2, 2: 2})

    def __init__(
        self,
        *,
        least: int,
        most: int,
        similar: int,
        near: int,
        granularity: Literal["kv_head", "layer"],
        **stored: Any,
    ) -> None:
        super().__init__(block_size=least, **stored)
        self.least, self.most, self.similar, self.near = least, most, similar, near
        self.granularity = granularity

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """An empty store and no events."""
        means = widened(like.new_zeros(batch_size, self.state_heads, 0, self.key_dim))
        sizes = means.new_zeros(batch_size, 1, 0, 1)
        begun = means.new_zeros(batch_size, self.state_heads, 1, self.key_dim)
        return (*super().initial_state(batch_size, like), means, sizes, begun)

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's state, if every event is as short as it may be."""
        events = tokens // self.least
        summaries = events * (4 * self.state_heads * self.key_dim + 4)
        return super().state_nbytes(tokens, itemsize) + summaries

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Store what leaves, and attend over the window and the events that each query chooses."""
        before, events = state[0], Events(*state[1:])  # type: ignore[arg-type]
        assert isinstance(before, Store)
        store = self.filled(block, state)
        if store is not before:
            events = self._grown(events, before.lengths, store, block)
        state = (store, *events)
        if block.query is None:
            return None, state
        if not store.block_count():
            return block.local(), state
        left = before.lengths[:, None] + block.writes.cumsum(-1)
        output, _ = merge(*block.attend(), *self._far(block, store, events, left))
        return output.transpose(1, 2).to(block.leaving_value.dtype), state

    def _grown(self, events: Events, lengths: Tensor, store: Store, block: Block) -> Events:
        """`events` after what leaves in `block`, which is in `store`; `lengths` [B] tokens had
        left before.
        """
        if block.leaving_places is None:
            raise StateError(
                "An event memory needs the surprise of every token that leaves its window, and "
                "this forward was not read in pieces. Call the patched model itself, not a part "
                "of it."
            )
        writes = block.writes.expand(len(lengths), -1)
        number = (writes & (block.leaving_places == 0)).cumsum(-1)  # 0 goes on with the last event
        last = int(number.max())
        held = lengths - events.sizes.sum((1, 2, 3)).long()
        sizes = torch.zeros_like(number[:, :1]).repeat(1, last + 1)
        sizes = sizes.scatter_add(1, number, writes.long())
        sizes[:, 0] += held
        places = (block.leaving_slots - store.origin[:, None]).clamp(min=0)
        key = self.searched(block.leaving_key, places, block)
        key = widened(key) * writes[:, None, :, None]
        sums = key.new_zeros(*key.shape[:2], last + 1, key.shape[-1])
        sums = sums.scatter_add(2, number[:, None, :, None].expand_as(key), key)
        sums = torch.cat([sums[:, :, :1] + events.begun, sums[:, :, 1:]], dim=2)
        index = torch.arange(last + 1, device=number.device)
        final = number[:, -1:]
        complete = (sizes > 0) & ((index < final) | (sizes == self.most))
        row, column = complete.nonzero(as_tuple=True)
        open_sum = sums.gather(2, final[:, None, :, None].expand_as(events.begun))
        is_full = complete.gather(1, final)[:, None, :, None]
        begun = open_sum.masked_fill(is_full, 0.0)
        if not row.numel():
            return events._replace(begun=begun)
        counts = (events.sizes > 0).sum((1, 2, 3))
        place = (counts[:, None] + complete.cumsum(-1) - 1)[row, column]
        more = max(int(place.max()) + 1 - events.sizes.shape[2], 0)
        means, known = (F.pad(x, (0, 0, 0, more)).clone() for x in events[:2])
        size = sizes[row, column, None].to(known)
        means[row, :, place] = sums[row, :, column] / size[:, None]
        known[row, :, place] = size[:, None]
        return Events(means, known, begun)

    def _far(
        self, block: Block, store: Store, events: Events, left: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Attention over far tokens alone: o [B, H, C, V] and lse [B, H, C]. `left` [B, C] tokens
        have left before each query.
        """
        asking = self.asking(block, store)
        sizes = events.sizes[:, 0, :, 0].long()
        ends = sizes.cumsum(-1)
        wanted = self._chosen(asking.placed, events, sizes, ends, left)
        ends = ends.masked_fill(sizes == 0, NEVER)  # beyond a row's events: the one that is open
        parts = [
            self._attend_events(part, ends, _Read(member, count), store, block)
            for part, member, count in zip(
                asking.split(QUERIES),
                wanted.split(QUERIES, dim=2),
                left.split(QUERIES, dim=1),
                strict=True,
            )
        ]
        return joined(parts)

    def _chosen(
        self, query: Tensor, events: Events, sizes: Tensor, ends: Tensor, left: Tensor
    ) -> Tensor:
        """The events that each query attends [B, G | 1, C, N + 1], the open one last."""
        behind = ends + (sizes < self.most)  # what must have left for the event to be open
        is_open = ((sizes > 0)[:, None] & (behind[:, None] <= left[..., None]))[:, None]
        summed = query.unflatten(1, (self.state_heads, -1)).sum(2).to(events.means)
        # a row of zeros: the product of one row alone sums equal keys in different orders
        scores = (F.pad(summed, (0, 0, 0, 1)) @ events.means.mT)[:, :, :-1]
        if self.granularity == "layer":
            scores = scores.sum(1, keepdim=True)
        chosen = choose_events(
            coarse(scores),
            is_open,
            sizes[:, None, None],
            similar=self.similar,
            near=self.near,
            least=self.least,
        )
        return F.pad(chosen | ~is_open, (0, 1), value=True)

    def _attend_events(
        self, asking: Asking, ends: Tensor, read: _Read, store: Store, block: Block
    ) -> tuple[Tensor, Tensor]:
        """Attention over the tokens of the wanted events that have left each query's window."""
        wanted, size = read.wanted, self.block_size
        first = torch.arange(store.block_count(), device=asking.border.device) * size
        blocks = _of(wanted, ends, first) | _of(wanted, ends, first + size - 1)
        blocks &= first < read.left[:, None, :, None]
        far = self.fetched(blocks, asking, store, block)
        entry = torch.arange(size, device=asking.border.device)
        place = (far.blocks[..., None] * size + entry).flatten(2)  # [B, G, U S]
        heads = asking.query.shape[1]
        of_event = _of(wanted, ends, place).unflatten(-1, (-1, size))
        of_event = of_event.repeat_interleave(heads // self.state_heads, dim=1)
        # an event has no gap, and a block has tokens of two events at most: see `packed`
        attended = of_event & far.attended(heads)
        return self.read(asking, far.keys, far.values, attended, block)


def _of(wanted: Tensor, ends: Tensor, place: Tensor) -> Tensor:
    """Whether each query wants the tokens at `place` [T] or [B, G, T]: [B, G | 1, C, T]."""
    rows, heads = wanted.shape[0], max(wanted.shape[1], place.shape[1] if place.dim() > 1 else 1)
    place = place.expand(rows, heads, -1).flatten(1)
    event = torch.searchsorted(ends.contiguous(), place.contiguous(), right=True)
    index = event.view(rows, heads, 1, -1).expand(-1, -1, wanted.shape[2], -1)
    return wanted.expand(-1, heads, -1, -1).gather(-1, index)
