"""Hot rows: the rows of a table that were read last, kept on the device.

::

    kept' = the `capacity` last used of  kept  and  the rows that had to be read

Rows of a source never change, so nothing here can be stale.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from memretrofit.modules.row_sources import RowSource, row_nbytes


class HotRows:
    """Room for as many rows of `source` as fit in `nbytes`, on `device`."""

    def __init__(self, source: RowSource, nbytes: int, device: torch.device) -> None:
        self.capacity = min(nbytes // row_nbytes(source), source.rows)
        self.room = torch.empty(self.capacity, *source.shape, dtype=source.dtype, device=device)
        self._place: OrderedDict[int, int] = OrderedDict()
        """Place of each kept row, the one used last at the end."""

    def holds(self, rows: Tensor) -> Tensor:
        """Which of `rows` [n] (CPU) are kept, [n] bool; not a use of them."""
        return torch.tensor([row in self._place for row in rows.tolist()], dtype=torch.bool)

    def find(self, rows: Tensor) -> Tensor:
        """Place in `room` of each of `rows` [n] (CPU), -1 where it is not kept; these are used."""
        numbers = rows.tolist()
        place = [self._place.get(row, -1) for row in numbers]
        for row, found in zip(numbers, place, strict=True):
            if found >= 0:
                self._place.move_to_end(row)
        return torch.tensor(place, dtype=torch.long)

    def keep(self, rows: Tensor, values: Tensor) -> None:
        """Keep rows [n] (CPU) that are not kept yet: the last `capacity` of them."""
        first = max(0, len(rows) - self.capacity)
        places = []
        for row in rows[first:].tolist():
            full = len(self._place) == self.capacity
            place = self._place.popitem(last=False)[1] if full else len(self._place)
            self._place[row] = place
            places.append(place)
        if places:
            self.room[torch.tensor(places, device=self.room.device)] = values[first:]
