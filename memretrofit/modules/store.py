"""A store: every token that left the window, in blocks that attention can fetch.

Row b numbers its own tokens 0, 1, ... in the order in which they left (no sinks, no padding); token
i is entry i mod S of block i // S, for blocks of S tokens. Keys are held before the rotary
embedding, so that where a fetched key stands is a choice of the reader.

A store is a value: `append` returns a new one, which shares the tokens that both hold. Tokens that
are appended to an older value take the place of those that were appended to it before (a trial
that was taken back). Keys and values lie on the device, in CPU memory or on disk (`slab`), with
the blocks fetched last on the device (`hot_blocks`); slots, lengths and summaries on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from memretrofit.errors import CheckpointError
from memretrofit.modules.hot_blocks import HotBlocks, Reads
from memretrofit.modules.memory import widened
from memretrofit.modules.slab import PLACEMENTS, Placement, Slab

NEVER = torch.iinfo(torch.int64).max
"""Slot of a place that holds no token: it leaves no window."""

Fetched = tuple[Tensor, Tensor, Tensor]
"""Keys [B, G, U, S, K], values [B, G, U, S, V] and slots [B, G, U, S] of some blocks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Store:
    """The tokens that left the window of one layer, row by row."""

    keys: Slab
    """[N, B, G, S, K]."""
    values: Slab
    """[N, B, G, S, V]."""
    slot_slab: Slab
    """[N, B, 1, S, 1]."""
    summary_slab: Slab
    """[N, B, G, 1, K] what stands for each full block in a search, at least float32."""
    lengths: Tensor
    """[B] tokens of each row."""
    counts: tuple[int, ...]
    """The same as numbers: to ask the device for them would be to wait for it."""
    summarised: tuple[int, ...]
    """Blocks of each row that have their summary."""
    hot: HotBlocks | None
    """Blocks fetched last; None on the device, where nothing is read from elsewhere."""

    @classmethod
    def empty(
        cls,
        block_size: int,
        key: Tensor,
        value: Tensor,
        *,
        placement: Placement = "device",
        key_placement: Placement | None = None,
        hot_bytes: int = 0,
    ) -> Store:
        """A store for tokens like `key` [B, G, *, K] and `value` [B, G, *, V]; with room for
        `hot_bytes` of fetched blocks on the device when they lie elsewhere. Keys lie where values
        do unless `key_placement` is given.
        """
        rows, heads = key.shape[:2]
        kinds = PLACEMENTS[key_placement or placement], PLACEMENTS[placement]
        keys, values = (
            kind.empty(rows, heads, block_size, like.shape[-1], like)
            for kind, like in zip(kinds, (key, value), strict=True)
        )
        lengths = key.new_zeros(rows, dtype=torch.long)
        return cls(
            keys=keys,
            values=values,
            slot_slab=Slab.empty(rows, 1, block_size, 1, lengths),
            summary_slab=Slab.empty(rows, heads, 1, key.shape[-1], widened(key[:, :, :0])),
            lengths=lengths,
            counts=(0,) * rows,
            summarised=(0,) * rows,
            hot=_hot_blocks(keys, values, hot_bytes),
        )

    @classmethod
    def opened(
        cls,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        summaries: Tensor,
        lengths: Tensor,
        *,
        placement: Placement,
        key_placement: Placement | None = None,
        hot_bytes: int = 0,
    ) -> Store:
        """A store of the tensors of `saved`, whole or mapped: on host and disk, complete blocks of
        keys and values stay where they are (`slab`). None is ever written. The store is read on the
        device of `lengths`.

        Raises:
            CheckpointError: the sizes contradict each other. StateError: the disk is full.
        """
        rows, size = slots.shape[1:]
        counts, device = tuple(lengths.tolist()), lengths.device
        full = tuple(count // size for count in counts)
        shape = (-(-max(counts) // size), rows, keys.shape[2], size)
        found = (keys.shape[:4], values.shape[:4], (*slots.shape[:2], shape[2], slots.shape[2]))
        if min(counts) < 0 or any(tuple(x) != shape for x in found):
            raise CheckpointError(
                f"A saved store of lengths {list(counts)} has keys {list(keys.shape)}, values "
                f"{list(values.shape)} and slots {list(slots.shape)}; expected blocks, rows, heads "
                f"and tokens {list(shape)}. The file is damaged: save it again."
            )
        if tuple(summaries.shape[1:]) != (*shape[1:3], keys.shape[4]):
            raise CheckpointError(
                f"A saved store with keys {list(keys.shape)} has summaries "
                f"{list(summaries.shape)}. The file is damaged: save it again."
            )
        kinds = PLACEMENTS[key_placement or placement], PLACEMENTS[placement]
        key_slab, value_slab = (
            kind.opened(blocks, min(full), device)
            for kind, blocks in zip(kinds, (keys, values), strict=True)
        )
        return cls(
            keys=key_slab,
            values=value_slab,
            slot_slab=Slab.opened(slots[:, :, None, :, None], 0, device),
            summary_slab=Slab.opened(summaries[:, :, :, None], 0, device),
            lengths=lengths,
            counts=counts,
            summarised=tuple(min(blocks, summaries.shape[0]) for blocks in full),
            hot=_hot_blocks(key_slab, value_slab, hot_bytes),
        )

    def saved(self) -> dict[str, list[Tensor]]:
        """What `opened` takes, each as pieces in order along the first axis, where they lie."""
        count = self.block_count()
        return {
            "keys": self.keys.pieces(count),
            "values": self.values.pieces(count),
            "slots": [self.slots[:count]],
            "summaries": [self.summaries[: max(self.summarised, default=0)]],
            "lengths": [self.lengths],
        }

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.slot_slab.room.shape[3]

    @property
    def slots(self) -> Tensor:
        """[N, B, S], with spare room behind the last block."""
        return self.slot_slab.room[:, :, 0, :, 0]

    @property
    def summaries(self) -> Tensor:
        """[N, B, G, K], with spare room behind the last full block."""
        return self.summary_slab.room[:, :, :, 0]

    @property
    def origin(self) -> Tensor:
        """[B] slot of the first token of each row, which is at place 0; 0 where a row has none."""
        if not self.slot_slab.room.shape[0]:
            return torch.zeros_like(self.lengths)
        return self.slots[0, :, 0].masked_fill(self.lengths == 0, 0)

    def origin_with(self, slots: Tensor, writes: Tensor) -> Tensor:
        """`origin` once tokens at `slots` [C] were appended where `writes` [B | 1, C] is true."""
        if not slots.numel():
            return self.origin
        return torch.where(self.lengths > 0, self.origin, slots[writes.byte().argmax(-1)])

    def block_count(self) -> int:
        """Blocks that hold a token in some row."""
        return -(-max(self.counts) // self.block_size)

    def append(self, key: Tensor, value: Tensor, slots: Tensor, writes: Tensor) -> Store:
        """This store and the tokens of key [B, G, C, K], value [B, G, C, V] and slots [C] where
        `writes` [B | 1, C] is true.

        Raises:
            StateError: the disk is full, or gradients are asked for where none flow. This store
            reads as before.
        """
        added = writes.sum(-1).tolist()
        if not any(added):
            return self
        if len(added) == 1:
            added = added * len(self.counts)
        counts = tuple(old + new for old, new in zip(self.counts, added, strict=True))
        shared = len(writes) == 1 or min(added) == writes.shape[1]
        if shared and len(set(self.counts)) == 1:
            slabs = self._extended(key, value, slots, writes[0], added[0], counts[0])
            return replace(self, **slabs, lengths=self.lengths + added[0], counts=counts)
        writes = writes.expand(len(counts), -1)
        slabs = self._scattered(key, value, slots, writes, max(counts))
        return replace(self, **slabs, lengths=self.lengths + writes.sum(-1), counts=counts)

    def _extended(
        self, key: Tensor, value: Tensor, slots: Tensor, writes: Tensor, added: int, count: int
    ) -> dict[str, Any]:
        """Slabs with the same `added` tokens in every row, all of which are as long."""
        if added < len(writes):
            wanted = writes.nonzero()[:, 0]
            key, value, slots = key[:, :, wanted], value[:, :, wanted], slots[wanted]
        start, size = count - added, self.block_size
        self._reserve(count)
        if self.hot is not None:
            units = self.keys.units
            self.hot.forget(torch.arange(start // size * units, -(-count // size) * units))
        return {
            "keys": self.keys.extend(start, key),
            "values": self.values.extend(start, value),
            "slot_slab": self.slot_slab.extend(start, slots[None, None, :, None]),
        }

    def _scattered(
        self, key: Tensor, value: Tensor, slots: Tensor, writes: Tensor, longest: int
    ) -> dict[str, Any]:
        """Slabs with each row's own tokens at its own end."""
        row, column = writes.nonzero(as_tuple=True)
        place = (self.lengths[:, None] + writes.cumsum(-1) - 1)[row, column]
        block, entry = place // self.block_size, place % self.block_size
        self._reserve(longest)
        if self.hot is not None:
            heads = self.keys.room.shape[2]
            unit = (block * len(self.counts) + row)[:, None] * heads
            self.hot.forget((unit.cpu() + torch.arange(heads)).flatten())
        return {
            "keys": self.keys.put(block, row, entry, key[row, :, column]),
            "values": self.values.put(block, row, entry, value[row, :, column]),
            "slot_slab": self.slot_slab.put(block, row, entry, slots[column, None, None]),
        }

    def _reserve(self, tokens: int) -> None:
        for slab in (self.keys, self.values, self.slot_slab):
            slab.reserve(-(-tokens // self.block_size))

    def summarise(self, summary: Callable[[Tensor, Tensor], Tensor]) -> Store:
        """This store with `summary` of the blocks that became full: keys [n, b, G, S, K] and
        places [n, b, S], which count from `origin`, to [n, b, G, K]; b is B, or 1 where rows fill
        blocks at different times.
        """
        full = tuple(count // self.block_size for count in self.counts)
        if full == self.summarised:
            return self
        self.summary_slab.reserve(max(full))
        device = self.lengths.device
        if len(set(zip(self.summarised, full, strict=True))) == 1:
            low, high = self.summarised[0], full[0]
            places = self.slots[low:high] - self.origin[:, None]
            new = summary(self.keys.blocks(low, high).to(device), places)
            known = self.summary_slab.extend(low, new.movedim(0, 2))
        else:
            ranges = list(zip(self.summarised, full, strict=True))
            block = torch.cat([torch.arange(low, high) for low, high in ranges])
            row = torch.arange(len(full)).repeat_interleave(
                torch.tensor([high - low for low, high in ranges])
            )
            block, row = block.to(device), row.to(device)
            places = self.slots[block, row] - self.origin[row, None]
            new = summary(self._of_rows(self.keys, block, row), places[:, None])
            known = self.summary_slab.put(block, row, torch.zeros_like(block), new[:, 0])
        return replace(self, summary_slab=known, summarised=full)

    def _of_rows(self, slab: Slab, block: Tensor, row: Tensor) -> Tensor:
        """All heads of block i of row i, [n, 1, G, S, D]."""
        heads = torch.arange(slab.room.shape[2], device=block.device)
        return slab.take(((block * len(self.counts) + row)[:, None] * len(heads) + heads)[:, None])

    def fetch(self, blocks: Tensor) -> Fetched:
        """Whole blocks by their indices [B, G, U]; places without a token have the slot `NEVER`."""
        rows, heads = blocks.shape[:2]
        row = torch.arange(rows, device=blocks.device)[:, None, None]
        head = torch.arange(heads, device=blocks.device)[None, :, None]
        entry = torch.arange(self.block_size, device=blocks.device)
        of_row = blocks * rows + row
        units = of_row * heads + head
        full = torch.tensor(self.counts) // self.block_size
        hot = [] if self.hot is None else self.hot.take(units, full)
        keys = hot[0] if len(hot) == 2 else self.keys.take(units)
        values = hot[-1] if hot else self.values.take(units)
        held = blocks[..., None] * self.block_size + entry < self.lengths[:, None, None, None]
        slots = self.slot_slab.take(of_row)[..., 0].masked_fill(~held, NEVER)
        return keys, values, slots

    def slices(self, most: int) -> Iterator[Fetched]:
        """All blocks in order, at most so many at a time, where they lie: keys [n, B, G, S, K],
        values [n, B, G, S, V], and bool [n, B, S], whether a place holds a token.
        """
        size, count = self.block_size, self.block_count()
        border = min(self.keys.first, count)
        # opened blocks and those behind them lie apart
        for begin, end in ((0, border), (border, count)):
            for low in range(begin, end, most):
                high = min(low + most, end)
                place = torch.arange(low * size, high * size, device=self.lengths.device)
                held = place.view(-1, 1, size) < self.lengths[:, None]
                yield self.keys.blocks(low, high), self.values.blocks(low, high), held

    def spans(self) -> tuple[Tensor, Tensor]:
        """Slots of the first and of the last token of each block, each [B, N]; `NEVER` where the
        block is not that full.
        """
        count = self.block_count()
        index = torch.arange(count, device=self.lengths.device) * self.block_size
        first, last = self.slots[:count, :, 0].T, self.slots[:count, :, -1].T
        length = self.lengths[:, None]
        return (
            first.masked_fill(index >= length, NEVER),
            last.masked_fill(index + self.block_size > length, NEVER),
        )

    def apply(self, function: Callable[[Tensor], Tensor]) -> Store:
        """`function`, which reorders or repeats rows of the first axis, of every tensor: a store of
        its own.

        Raises:
            StateError: the disk is full. This store is as it was.
        """
        order = function(torch.arange(len(self.counts), device=self.lengths.device))
        chosen = order.tolist()
        count, full = self.block_count(), max(self.summarised)
        keys, values = self.keys.rows(order, count), self.values.rows(order, count)
        return Store(
            keys=keys,
            values=values,
            slot_slab=self.slot_slab.rows(order, count),
            summary_slab=self.summary_slab.rows(order, full),
            lengths=self.lengths[order],
            counts=tuple(self.counts[i] for i in chosen),
            summarised=tuple(self.summarised[i] for i in chosen),
            hot=None if self.hot is None else _hot_blocks(keys, values, self.hot.limit),
        )

    def earlier(self, tokens: int) -> Store:
        """The same tokens, each at a slot that is lower by `tokens`: they stand before a new text.
        Keys and values are shared with this store.
        """
        moved = Slab(self.slot_slab.room - tokens, self.slot_slab.device)
        return replace(self, slot_slab=moved)

    def live(self) -> tuple[Tensor, Tensor]:
        """Keys [B, G, T, K] and values [B, G, T, V] of all T tokens of the longest row, on the
        device; zeros behind the end of a shorter row.
        """
        longest, count = max(self.counts), self.block_count()
        index = torch.arange(longest, device=self.lengths.device)
        beyond = (index >= self.lengths[:, None])[:, None, :, None]

        def of(slab: Slab) -> Tensor:
            tokens = slab.blocks(0, count).to(slab.device).movedim(0, 2).flatten(2, 3)
            return tokens[:, :, :longest].masked_fill(beyond, 0)

        return of(self.keys), of(self.values)

    def clone(self) -> Store:
        """A store of its own."""
        return self.apply(Tensor.clone)

    def __deepcopy__(self, memo: dict[int, Any]) -> Store:
        return self.clone()

    @property
    def reads(self) -> Reads:
        """What fetches have read from host or disk since the store was made or its rows moved."""
        return Reads() if self.hot is None else self.hot.reads

    def tier_nbytes(self) -> dict[Placement, int]:
        """Bytes allocated on each tier, spare room included. A saved file counts where its store
        was opened; the device of a model on the CPU is the CPU.
        """
        small = (self.slot_slab.nbytes, self.summary_slab.nbytes, self.lengths.nbytes)
        found: dict[Placement, int] = dict.fromkeys(PLACEMENTS, 0)
        found["device"] = sum(small) + (0 if self.hot is None else self.hot.nbytes)
        for slab in (self.keys, self.values):
            found[slab.placement] += slab.nbytes
        return found

    @property
    def device_nbytes(self) -> int:
        """Bytes on the device."""
        return self.tier_nbytes()["device"]

    @property
    def nbytes(self) -> int:
        """Bytes on all tiers."""
        return sum(self.tier_nbytes().values())


def _hot_blocks(keys: Slab, values: Slab, nbytes: int) -> HotBlocks | None:
    """Room for blocks of the slabs that are not on the device: none, values, or both."""
    elsewhere = [slab for slab in (keys, values) if slab.placement != "device"]
    return HotBlocks(elsewhere, nbytes) if elsewhere else None
