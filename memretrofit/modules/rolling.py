"""A tensor that grows at its end and loses its oldest columns, without a copy per step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SPARE_COLUMNS = 64
"""Room kept at the end: appending one column copies the rest once in this many steps."""


class RollingBuffer:
    """Columns along the second-to-last axis: `append` at the end, `drop` at the front.

    Columns that were dropped leave room in front of the live ones. `drop` puts the pinned columns
    (the sinks) into that room, so that pinned and recent columns are always one contiguous slice
    and attention needs no gather.
    """

    def __init__(self) -> None:
        self._storage: Tensor | None = None
        self._start = 0
        self._end = 0
        self._borrowed = False

    @property
    def view(self) -> Tensor | None:
        """The live columns `[..., columns, D]`, or None before the first `append`."""
        return None if self._storage is None else self._live(self._storage)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare room included."""
        return 0 if self._storage is None else self._storage.nbytes

    def append(self, new: Tensor) -> Tensor:
        """Add columns at the end and return all live columns."""
        storage = self._storage
        if storage is None:
            self._hold(new)
            self._borrowed = True  # the caller may read its tensor again: never write into it
            return new
        count = new.shape[-2]
        differentiable = torch.is_grad_enabled() and (new.requires_grad or storage.requires_grad)
        if differentiable or count > SPARE_COLUMNS:
            storage = torch.cat([self._live(storage), new], dim=-2)
            self._hold(storage)
            return storage
        if self._borrowed or self._end + count > storage.shape[-2]:
            storage = self._repack(storage)
        storage.narrow(-2, self._end, count).copy_(new)
        self._end += count
        return self._live(storage)

    def drop(self, count: int, pinned: Tensor) -> None:
        """Remove the first `count` columns and put `pinned`, at most as many, in their place."""
        storage, width = self._storage, pinned.shape[-2]
        if storage is None:
            return
        if torch.is_grad_enabled() and storage.requires_grad:
            self._hold(torch.cat([pinned, self._live(storage)[..., count:, :]], dim=-2))
            return
        pinned = pinned.clone()  # it may overlap the columns that it is written to
        self._start += count - width
        # after a long prefill, do not keep the whole prompt alive
        too_long = storage.shape[-2] > self._end - self._start + SPARE_COLUMNS
        if self._borrowed or (too_long and self._start > SPARE_COLUMNS):
            storage = self._repack(storage)
        storage.narrow(-2, self._start, width).copy_(pinned)

    def crop(self, count: int) -> None:
        """Remove the last `count` columns."""
        self._end -= count

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the live columns by `function` of them (a reordering of the batch)."""
        if self._storage is not None:
            self._hold(function(self._live(self._storage)))

    def _live(self, storage: Tensor) -> Tensor:
        return storage.narrow(-2, self._start, self._end - self._start)

    def _hold(self, storage: Tensor) -> None:
        self._storage, self._borrowed = storage, False
        self._start, self._end = 0, storage.shape[-2]

    def _repack(self, storage: Tensor) -> Tensor:
        live = self._live(storage)
        *lead, columns, width = live.shape
        packed = storage.new_empty(*lead, columns + SPARE_COLUMNS, width)
        packed.narrow(-2, 0, columns).copy_(live)
        self._hold(packed)
        self._end = columns
        return packed
