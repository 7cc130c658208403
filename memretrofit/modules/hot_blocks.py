"""Hot blocks: the units of slabs that were fetched last, kept on the device.

A fetch of distinct units finds each here (a hit) or reads it from its slab (a miss)::

    kept'  = the `capacity` last used of  kept  and  missed units that are complete
    bytes read = misses * bytes of a unit, over all slabs

Used together means used in the order of their numbers. What is kept is what the slab holds: a
write forgets the units it touches, so a token that was folded on trial and taken back leaves
nothing behind, and all values of a store that share its slabs can share this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memretrofit.modules.slab import Slab


@dataclass
class Reads:
    """What fetches have cost so far."""

    hits: int = 0
    """Units found on the device."""
    misses: int = 0
    """Units read from host or disk; without room to keep any, a unit asked twice counts twice."""
    nbytes: int = 0
    """Bytes of the units read."""


class HotBlocks:
    """Room for `nbytes` of units of `slabs`, which are addressed alike; 0 only counts reads."""

    def __init__(self, slabs: Sequence[Slab], nbytes: int) -> None:
        self.slabs, self.limit = tuple(slabs), nbytes
        self.unit_nbytes = sum(slab.unit_nbytes for slab in slabs)
        self.capacity = nbytes // self.unit_nbytes
        self.reads = Reads()
        self._kept = [
            torch.empty(
                self.capacity, *slab.room.shape[3:], dtype=slab.room.dtype, device=slab.device
            )
            for slab in slabs
        ]
        self._unit = torch.full((self.capacity,), -1)
        """Unit of each place here; -1 for none."""
        self._used = torch.arange(self.capacity) - self.capacity
        """When it was used last."""
        self._place = torch.empty(0, dtype=torch.long)
        """Place of each unit; -1 for none."""
        self._clock = 0

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(kept.nbytes for kept in self._kept)

    def take(self, units: Tensor, full: Tensor) -> list[Tensor]:
        """Units of any shape [...] of each slab, [..., S, D]; `full` [B] blocks of each row are
        complete.
        """
        if not self.capacity:
            self._count(0, units.numel())
            return [slab.take(units) for slab in self.slabs]
        distinct, inverse = units.flatten().cpu().unique(return_inverse=True)
        self._make_room(distinct)
        place = self._place[distinct]
        hit, miss = (place >= 0).nonzero()[:, 0], (place < 0).nonzero()[:, 0]
        self._count(len(hit), len(miss))
        self._used[place[hit]] = self._clock + hit
        device = self.slabs[0].device
        if len(miss):
            fresh = [slab.take(distinct[miss]) for slab in self.slabs]
            order = torch.empty_like(distinct)
            order[torch.cat([hit, miss])] = torch.arange(len(order))
            order, held = order[inverse].to(device), place[hit].to(device)
            found = [
                torch.cat([kept.index_select(0, held), new]).index_select(0, order)
                for kept, new in zip(self._kept, fresh, strict=True)
            ]
            self._keep(distinct[miss], self._clock + miss, fresh, full, self.capacity - len(hit))
        else:
            order = place[inverse].to(device)
            found = [kept.index_select(0, order) for kept in self._kept]
        self._clock += len(distinct)
        return [x.view(*units.shape, *x.shape[1:]) for x in found]

    def _count(self, hits: int, misses: int) -> None:
        self.reads.hits += hits
        self.reads.misses += misses
        self.reads.nbytes += misses * self.unit_nbytes

    def _keep(
        self, units: Tensor, now: Tensor, fresh: Sequence[Tensor], full: Tensor, most: int
    ) -> None:
        """Keep the complete ones of `units`, the last `most` of them."""
        rows, heads = self.slabs[0].room.shape[1:3]
        complete = units // (rows * heads) < full[units // heads % rows]
        source = complete.nonzero()[:, 0]
        source = source[max(0, len(source) - most) :]
        if not len(source):
            return
        # the units that this fetch hit are the last used: `most` spares them
        spot = self._used.topk(len(source), largest=False).indices
        gone = self._unit[spot]
        self._place[gone[gone >= 0]] = -1
        self._unit[spot], self._used[spot] = units[source], now[source]
        self._place[units[source]] = spot
        for kept, new in zip(self._kept, fresh, strict=True):
            kept[spot.to(kept.device)] = new.index_select(0, source.to(new.device))

    def forget(self, units: Tensor) -> None:
        """Drop what is kept of `units`: they are being written."""
        units = units[units < self._place.shape[0]]
        place = self._place[units]
        place = place[place >= 0]
        self._unit[place] = -1
        self._used[place] = -self.capacity - 1
        self._place[units] = -1

    def _make_room(self, distinct: Tensor) -> None:
        held = self._place.shape[0]
        if len(distinct) and held < (needed := int(distinct[-1]) + 1):
            more = torch.full((max(needed, held + held // 2) - held,), -1)
            self._place = torch.cat([self._place, more])
