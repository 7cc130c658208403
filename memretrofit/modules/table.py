"""A table: rows of a bank that are read by number, of which only a small part may train.

::

    read(r) = delta[i]    where r = delta_index[i]
              source[r]   everywhere else

The source never changes. Rows that may move are opened: they are copied into the *delta*, a
parameter of only so many rows, so an optimizer has state for these alone, an edit is as small as
what it changed, and dropping the delta undoes it. The gradient is sparse, with the rows that a step
asked for: SparseAdam and SGD leave all others as they are, bit for bit (a dense Adam refuses it,
as does `clip_grad_norm_`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from memretrofit.errors import StateError
from memretrofit.modules.fresh_rows import FreshRows
from memretrofit.modules.hot_rows import HotRows
from memretrofit.modules.row_sources import HeldRows, MappedRows, RowSource, Tier
from memretrofit.modules.sparse_gather import SparseGather

__all__ = ["FreshRows", "HeldRows", "MappedRows", "RowSource", "Table"]

READERS = 2
"""Threads that read ahead, for all tables together."""

_NAMED = 5
"""Rows that an error names."""


class Table(nn.Module):
    """Rows of `source`, and a delta over some of them.

    Args:
        source: the rows as they are before anything is learned.
        hot_bytes: room for rows that were read last, on the device that asks; 0 keeps none. It
            pays where rows come over a bus or from a slow disk: on the CPU the system keeps the
            pages of a mapped file that are in use.
    """

    delta: nn.Parameter | None
    """[n, *shape] float32: the rows that may move; None before any was opened."""
    delta_index: Tensor | None
    """[n] their numbers, sorted."""
    place: Tensor

    def __init__(self, source: RowSource, *, hot_bytes: int = 0) -> None:
        super().__init__()
        self.source: RowSource = source
        self.hot_bytes = hot_bytes
        self.hits = self.misses = 0
        """Rows found among the hot ones, and rows read from the source."""
        self.register_parameter("delta", None)
        self.register_buffer("delta_index", None)
        # empty; it moves with the model, and a delta is made where it is
        self.register_buffer("place", torch.empty(0), persistent=False)
        self._hot: HotRows | None = None
        self._coming: tuple[Tensor, Future[Tensor]] | None = None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.source.rows

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        return self.source.shape

    @property
    def tier(self) -> Tier:
        """Where the rows that did not move are."""
        return self.source.tier

    @property
    def opened(self) -> int:
        """How many rows may train."""
        return 0 if self.delta_index is None else len(self.delta_index)

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held in each tier; `delta` and hot rows count for `device`."""
        device = 0 if self._hot is None else self._hot.room.nbytes
        if self.delta is not None and self.delta_index is not None:
            device += self.delta.nbytes + self.delta_index.nbytes
        held = {"device": device, "ram": 0, "disk": 0}
        if self.tier != "fresh":
            held[self.tier] += self.source.nbytes
        return held

    def forward(self, index: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows [..., *shape] of `index` [...] on its device, in `dtype`.

        The gradient reaches the rows of the delta that are asked for, and nothing else.

        Raises:
            StateError: a number is not one of a row. On a CUDA device that holds all rows nothing
                waits for such a check, and the device reports it.
        """
        source, flat = self.source, index.flatten()
        if not len(flat):
            return torch.empty(*index.shape, *self.shape, dtype=dtype, device=index.device)
        if self._beside(index) and isinstance(source, HeldRows):
            if index.device.type == "cpu":
                self._check(flat)
            self.misses += len(flat)
            rows = source.read(flat).to(dtype)
            if self.delta is not None:
                place, moving = self._open_places(flat)
                learned = self.delta.index_select(0, place).to(dtype)
                rows = torch.where(moving.view(-1, *[1] * len(self.shape)), learned, rows)
            return rows.view(*index.shape, *self.shape)
        distinct, inverse = flat.unique(return_inverse=True)
        rows, order = self._rows(distinct, dtype)
        inverse = inverse if order is None else order[inverse]
        if len(distinct) < len(flat) or not torch.equal(inverse, _counted(flat)):
            rows = rows.index_select(0, inverse)
        return rows.view(*index.shape, *self.shape)

    def _beside(self, index: Tensor) -> bool:
        """Whether a plain gather will do: only a gradient and a bus ask for distinct numbers."""
        if self.delta is not None and self.delta.requires_grad and torch.is_grad_enabled():
            return False
        held = isinstance(self.source, HeldRows) and self.source.tensor.device == index.device
        return held and not self.hot_bytes

    @property
    def whole(self) -> Tensor | None:
        """All rows, where they stand in one tensor and none is to learn from what is read."""
        if self.delta is not None and self.delta.requires_grad and torch.is_grad_enabled():
            return None
        if self.opened == self.rows and self.delta is not None:
            return self.delta.detach()
        held = self.delta is None and not self.hot_bytes and isinstance(self.source, HeldRows)
        return self.source.tensor if held and isinstance(self.source, HeldRows) else None

    def _open_places(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Where rows would stand in the delta, and which of them do."""
        assert self.delta_index is not None
        known = self.delta_index.to(index.device)
        place = torch.searchsorted(known, index).clamp_(max=len(known) - 1)
        return place, known[place] == index

    def _rows(self, distinct: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Rows of sorted distinct numbers, and where each stands among them; None: in order."""
        if self.delta is None or self.delta_index is None:
            return self._fixed(distinct).to(dtype), None
        place, moving = self._open_places(distinct)
        at, rest = moving.nonzero()[:, 0], (~moving).nonzero()[:, 0]
        if not len(at):
            return self._fixed(distinct).to(dtype), None
        learned = SparseGather.apply(self.delta, place[at]).to(dtype)
        if not len(rest):
            return learned, None
        order = torch.empty_like(distinct)
        order[torch.cat([rest, at])] = _counted(distinct)
        return torch.cat([self._fixed(distinct[rest]).to(dtype), learned]), order

    def _fixed(self, distinct: Tensor) -> Tensor:
        """Rows of the source, on the device of their sorted distinct numbers."""
        device, wanted = distinct.device, distinct.cpu()
        self._check(wanted)
        hot, coming = self._hot_rows(device), self._arrived(wanted)
        if hot is None and coming is None:
            self.misses += len(wanted)
            return self.source.read(wanted).to(device, non_blocking=True)
        rows = torch.empty(len(wanted), *self.shape, dtype=self.source.dtype, device=device)
        missing = torch.ones(len(wanted), dtype=torch.bool)
        if hot is not None:
            kept = hot.find(wanted)
            missing = kept < 0
            rows[(~missing).to(device)] = hot.room.index_select(0, kept[~missing].to(device))
        unread = missing.clone()
        if coming is not None:
            numbers, values = coming
            place = torch.searchsorted(numbers, wanted).clamp_(max=len(numbers) - 1)
            here = missing & (numbers[place] == wanted)
            rows[here.to(device)] = values.index_select(0, place[here]).to(device)
            unread &= ~here
        if unread.any():
            rows[unread.to(device)] = self.source.read(wanted[unread]).to(device)
        count = int(missing.sum())
        self.hits, self.misses = self.hits + len(wanted) - count, self.misses + count
        if hot is not None:
            hot.keep(wanted[missing], rows[missing.to(device)])
        return rows

    def _hot_rows(self, device: torch.device) -> HotRows | None:
        if self._hot is None or self._hot.room.device != device:
            hot = HotRows(self.source, self.hot_bytes, device) if self.hot_bytes else None
            self._hot = hot if hot is not None and hot.capacity else None
        return self._hot

    def prefetch(self, index: Tensor) -> None:
        """Start to read rows that a coming forward will ask for; it waits for them. The last call
        counts, until a forward asks for one of its rows. What is read is the same without it.

        Raises:
            StateError: a number is not one of a row.
        """
        wanted = index.flatten().unique().cpu()
        self._check(wanted)
        wanted = wanted[~self.is_open(wanted)]
        if self._hot is not None:
            wanted = wanted[~self._hot.holds(wanted)]
        self._coming = None
        if len(wanted):
            self._coming = wanted, _readers().submit(self.source.read, wanted)

    def _arrived(self, wanted: Tensor) -> tuple[Tensor, Tensor] | None:
        """What was read ahead, once, if one of `wanted` is in it."""
        if self._coming is None or not torch.isin(wanted, self._coming[0]).any():
            return None
        (numbers, future), self._coming = self._coming, None
        return numbers, future.result()

    @torch.no_grad()
    def open(self, index: Tensor) -> None:
        """Let rows train: they join the delta with the values that they have. A row that is open
        keeps what it learned. With new rows `delta` is another parameter, for a new optimizer.

        Raises:
            StateError: a number is not one of a row.
        """
        wanted = index.flatten().unique().cpu()
        self._check(wanted)
        if self.delta_index is not None:
            wanted = wanted[~torch.isin(wanted, self.delta_index.cpu())]
        if len(wanted):
            self._extend(wanted, self.source.read(wanted).to(torch.float32))

    def merge(self, other_index: Tensor, other_delta: Tensor) -> None:
        """Take over the delta of another table with the same source; the rows of both are open.

        Raises:
            StateError: see `check_merge`. Nothing has changed.
        """
        self.check_merge(other_index, other_delta)
        new = torch.ones(len(other_index), dtype=torch.bool)
        if self.delta_index is not None:
            new = ~torch.isin(other_index.cpu(), self.delta_index.cpu())
        if new.any():
            rows = other_delta.detach().to(torch.float32)
            self._extend(other_index.cpu()[new], rows[new.to(rows.device)])

    def check_merge(self, other_index: Tensor, other_delta: Tensor) -> None:
        """Raise what `merge` would raise, and change nothing.

        Raises:
            StateError: it is no delta of this table, or a row is in both with other values.
        """
        self.check_delta(other_index, other_delta)
        if self.delta is None or self.delta_index is None:
            return
        index = self.delta_index.cpu()
        shared = torch.isin(other_index.cpu(), index)
        both = other_index.cpu()[shared]
        mine = self.delta.detach()[torch.searchsorted(index, both).to(self.delta.device)]
        theirs = other_delta.detach()[shared.to(other_delta.device)].to(mine)
        clash = both[(mine != theirs).flatten(1).any(1).cpu()]
        if len(clash):
            raise StateError(
                f"Two deltas hold other values for {len(clash)} rows: {_first(clash)}. Merge "
                "deltas that were trained on different rows, or drop() one of them."
            )

    @torch.no_grad()
    def _extend(self, index: Tensor, rows: Tensor) -> None:
        index, rows = index.to(self.place.device), rows.to(self.place.device)
        trains = self.delta is None or self.delta.requires_grad
        if self.delta is not None and self.delta_index is not None:
            index = torch.cat([self.delta_index, index])
            rows = torch.cat([self.delta.detach(), rows.to(self.delta)])
        self.delta_index, order = index.sort()
        self.delta = nn.Parameter(rows.index_select(0, order), requires_grad=trains)

    def is_open(self, index: Tensor) -> Tensor:
        """Which of the rows `index` [...] may train, [...] bool on its device."""
        if self.delta_index is None:
            return torch.zeros_like(index, dtype=torch.bool)
        return self._open_places(index.contiguous())[1]

    def drop(self) -> None:
        """Forget the delta: every row is that of the source again."""
        self.delta, self.delta_index = None, None

    def attach(self, source: RowSource) -> None:
        """Read from another source: the same rows in another tier, or other rows of that shape.

        Raises:
            StateError: see `check_attach`.
        """
        self.check_attach(source)
        self.source, self._hot, self._coming = source, None, None

    def check_attach(self, source: RowSource) -> None:
        """Raise what `attach` would raise, and change nothing.

        Raises:
            StateError: another shape or dtype, or other rows while some are open.
        """
        mine, other = self.source, source
        if (mine.rows, mine.shape, mine.dtype) != (other.rows, other.shape, other.dtype):
            raise StateError(
                f"A table of {mine.rows} rows {list(mine.shape)} {mine.dtype} cannot read from a "
                f"source of {other.rows} rows {list(other.shape)} {other.dtype}. Attach a copy of "
                "its own rows."
            )
        if self.opened and mine.identity != other.identity:
            raise StateError(
                f"{self.opened} rows of this table learned over {mine.identity}, and the source "
                f"holds other rows ({other.identity}). drop() what was learned first."
            )

    def _check(self, index: Tensor) -> None:
        if not len(index):
            return
        low, high = index.aminmax()
        if low < 0 or high >= self.rows:
            outside = index[(index < 0) | (index >= self.rows)].unique()
            raise StateError(
                f"A table of {self.rows} rows was asked for {_first(outside)}. Ask for 0 to "
                f"{self.rows - 1}; leave out what reads nothing."
            )

    def check_delta(self, index: Tensor, delta: Tensor, name: str = "") -> None:
        """Refuse rows `delta` [n, *shape] of numbers `index` [n] that are no delta of this table.

        Raises:
            StateError: a dtype or shape, numbers out of order or twice, or beyond the last row.
        """
        problem = ""
        if index.ndim != 1 or index.dtype != torch.int64 or not len(index):
            problem = f"delta_index is {index.dtype} {list(index.shape)}, not int64 [n]"
        elif tuple(delta.shape) != (len(index), *self.shape) or not delta.is_floating_point():
            problem = (
                f"delta is {delta.dtype} {list(delta.shape)}, not floats "
                f"{[len(index), *self.shape]}"
            )
        elif len(index) > 1 and not bool((index[1:] > index[:-1]).all()):
            problem = "delta_index is not sorted, or names a row twice"
        elif int(index[0]) < 0 or int(index[-1]) >= self.rows:
            outside = int(index[0] if index[0] < 0 else index[-1])
            problem = f"delta_index names row {outside} of {self.rows}"
        if problem:
            raise StateError(
                f"{name}this is no delta of a table of {self.rows} rows {list(self.shape)}: "
                f"{problem}. Load the one that was saved for this bank."
            )

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        names = [prefix + "delta_index", prefix + "delta"]
        found = [name for name in names if name in state_dict]
        if len(found) == 1:
            raise StateError(f"{found[0]} without the other of {names}: a delta needs both.")
        if found:
            index, delta = state_dict[names[0]], state_dict[names[1]]
            self.check_delta(index, delta, f"{prefix}delta: ")
            if self.delta is None or self.opened != len(index):
                where = self.place.device
                self.delta_index = torch.empty(len(index), dtype=torch.long, device=where)
                self.delta = nn.Parameter(torch.empty(len(index), *self.shape, device=where))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Table:
        super()._apply(fn, recurse)
        if isinstance(self.source, HeldRows):
            self.source = self.source.on(self.place.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be read again, for a copy."""
        return {**self.__dict__, "_hot": None, "_coming": None}


def _counted(like: Tensor) -> Tensor:
    return torch.arange(len(like), device=like.device)


def _first(rows: Tensor) -> str:
    named = ", ".join(map(str, rows[:_NAMED].tolist()))
    return f"row {named}" + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(READERS, thread_name_prefix="memretrofit-rows")
