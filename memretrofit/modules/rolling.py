"""A tensor that grows at its end and loses its oldest columns, without a copy per step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SPARE_COLUMNS = 64
"""Room kept free at the end: appending one column copies the rest only once in this many steps."""


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
        if self._storage is None:
            return None
        return self._storage.narrow(-2, self._start, self._end - self._start)

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare room included."""
        return 0 if self._storage is None else self._storage.nbytes

    def append(self, new: Tensor) -> Tensor:
        """Add columns at the end and return all live columns."""
        if self._storage is None:
            self._hold(new)
            self._borrowed = True  # the caller may read its tensor again: never write into it
            return new
        count = new.shape[-2]
        differentiable = torch.is_grad_enabled() and (
            new.requires_grad or self._storage.requires_grad
        )
        if differentiable or count > SPARE_COLUMNS:
            self._hold(torch.cat([self.view, new], dim=-2))
        else:
            if self._end + count > self._storage.shape[-2]:
                self._repack()
            self._storage.narrow(-2, self._end, count).copy_(new)
            self._end += count
        return self._storage.narrow(-2, self._start, self._end - self._start)

    def drop(self, count: int, pinned: Tensor) -> None:
        """Remove the first `count` columns and put `pinned` (at most `count` columns) in front of
        what remains.
        """
        width = pinned.shape[-2]
        if torch.is_grad_enabled() and self._storage.requires_grad:
            self._hold(torch.cat([pinned, self.view[..., count:, :]], dim=-2))
            return
        pinned = pinned.clone()  # it may overlap the columns that it is written to
        if self._borrowed:
            self._start += count - width
            self._repack()
            self._storage.narrow(-2, self._start, width).copy_(pinned)
            return
        self._start += count - width
        self._storage.narrow(-2, self._start, width).copy_(pinned)
        live = self._end - self._start
        if self._storage.shape[-2] != live + SPARE_COLUMNS and self._start > SPARE_COLUMNS:
            self._repack()  # after a long prefill: do not keep the whole prompt alive

    def crop(self, count: int) -> None:
        """Remove the last `count` columns."""
        self._end -= count

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the live columns by `function` of them (a reordering of the batch)."""
        if self._storage is not None:
            self._hold(function(self.view))

    def _hold(self, storage: Tensor) -> None:
        self._borrowed = False
        self._storage, self._start, self._end = storage, 0, storage.shape[-2]

    def _repack(self) -> None:
        live = self._end - self._start
        *lead, _, width = self._storage.shape
        storage = self._storage.new_empty(*lead, live + SPARE_COLUMNS, width)
        storage[..., :live, :] = self.view
        self._storage, self._start, self._end, self._borrowed = storage, 0, live, False
