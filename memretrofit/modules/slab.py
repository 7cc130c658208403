"""A slab: room for blocks of one tensor, on the device, in CPU memory or in a file that is mapped.

A slab is [N, B, G, S, D]: N blocks of S tokens, for each of B rows and G heads. The block first,
so that a longer slab is the same memory with more behind it, and so that a block of one row and
head is contiguous. Such a piece is a *unit*; unit ``(n B + b) G + g`` is block n, row b, head g.

Three places (`Placement`), one interface: `reserve` room, `extend` every row by the same tokens or
`put` single tokens, `take` units to the device, `blocks` for whole blocks where they lie (to save
them, a few at a time), `rows` for a copy with other rows, `nbytes`.

========  ====================================================  ================================
device    a tensor beside the model                             differentiable
host      CPU memory; `take` gathers the wanted units into      no gradients
          pinned memory and sends them without waiting
disk      a file without a name in the folder of `tempfile`     no gradients; space is reserved
          (TMPDIR), mapped; it is gone with the slab, however   before it is mapped
          the process ends
========  ====================================================  ================================

`opened` starts a slab from a tensor of somebody else's, such as a mapping of a saved file, which is
never written and may be read-only. On host and disk its first `complete` blocks stay where they
are, are read only when wanted and are shared by copies; the blocks after them, which a row may
still fill, are copied into the room.

A slab is shared by all values of a store that grew from each other, and grows for all of them.
What stands behind a value's own length belongs to whoever wrote it last.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
import weakref
from typing import IO, Literal

import torch
from torch import Tensor

from memretrofit.errors import StateError

Placement = Literal["device", "host", "disk"]

STEP = 64 << 20
"""Bytes that a file grows by at most beyond what is needed: it grows without a copy."""

COPIED = 16 << 20
"""Bytes of a slab that are copied at once, so that a copy of a large file needs little memory."""


class Slab:
    """Blocks on the device. A write where gradients flow returns another slab."""

    placement: Placement = "device"

    def __init__(self, room: Tensor, device: torch.device, *, borrowed: bool = False) -> None:
        self.room = room
        """[N, B, G, S, D] blocks, those of an opened tensor excepted."""
        self.borrowed = borrowed
        """Whether the room is somebody else's: it is copied before it is written."""
        self.device = device
        """Where taken units go."""

    @classmethod
    def empty(cls, rows: int, heads: int, size: int, width: int, like: Tensor) -> Slab:
        """No blocks yet, of numbers like `like`, read on its device."""
        where = like.device if cls.placement == "device" else "cpu"
        return cls(
            torch.empty(0, rows, heads, size, width, dtype=like.dtype, device=where), like.device
        )

    @classmethod
    def opened(cls, blocks: Tensor, complete: int, device: torch.device) -> Slab:
        """A slab that begins with `blocks` [N, B, G, S, D], of which `complete` will not change."""
        room = blocks.to(device)
        return cls(room, device, borrowed=room is blocks)

    @property
    def first(self) -> int:
        """Blocks before those of the room."""
        return 0

    @property
    def units(self) -> int:
        """Units of a block: rows times heads."""
        return self.room.shape[1] * self.room.shape[2]

    @property
    def unit_nbytes(self) -> int:
        """Bytes of a unit."""
        return self.room.shape[3] * self.room.shape[4] * self.room.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes held, spare room and opened blocks included."""
        return self.room.nbytes

    def reserve(self, blocks: int) -> None:
        """Have room for so many blocks, empty places being zero; a little more when it grows.

        Raises:
            StateError: the disk is full. Nothing has changed.
        """
        held = self.room.shape[0]
        if self.first + held < blocks:
            self._grow(max(blocks - self.first, held + self._spare(held)))

    def _spare(self, held: int) -> int:
        return held // 2

    def _grow(self, blocks: int) -> None:
        more = self.room.new_zeros(blocks - self.room.shape[0], *self.room.shape[1:])
        self.room, self.borrowed = torch.cat([self.room, more]), False

    def extend(self, start: int, new: Tensor) -> Slab:
        """Tokens `new` [B, G, n, D] at places `start`, `start` + 1, ... of every row."""
        slab, count, size = self._to_write(new), new.shape[2], self.room.shape[3]
        room, new = slab.room, new.to(self.room)
        block, entry = divmod(start - self.first * size, size)
        done = min(size - entry, count) if entry else 0
        if done:
            room[block, :, :, entry : entry + done] = new[:, :, :done]
            block += 1
        whole = (count - done) // size
        if whole:
            blocks = new[:, :, done : done + whole * size].unflatten(2, (whole, size))
            room[block : block + whole] = blocks.movedim(2, 0)
            done += whole * size
        if done < count:
            room[block + whole, :, :, : count - done] = new[:, :, done:]
        return slab

    def put(self, block: Tensor, row: Tensor, entry: Tensor, new: Tensor) -> Slab:
        """Token i of `new` [n, G, D] at entry i of block i in row i, each index [n]."""
        slab, where = self._to_write(new), self.room.device
        at = (block.to(where) - self.first, row.to(where), slice(None), entry.to(where))
        slab.room[at] = new.to(self.room)
        return slab

    def _to_write(self, new: Tensor) -> Slab:
        """In place: what is overwritten is in no store that is still read. Gradients need both."""
        if torch.is_grad_enabled() and (self.room.requires_grad or new.requires_grad):
            return type(self)(self.room.clone(), self.device)
        if self.borrowed:  # the one copy has room for what follows
            self._grow(self.room.shape[0] + self._spare(self.room.shape[0]) + 1)
        return self

    def take(self, units: Tensor) -> Tensor:
        """Units of any shape [...] to [..., S, D] on the device."""
        found = self.room.flatten(0, 2).index_select(0, units.flatten())
        return found.view(*units.shape, *found.shape[1:])

    def blocks(self, low: int, high: int) -> Tensor:
        """Blocks `low` to `high`, [n, B, G, S, D], where they lie."""
        return self.room[low:high]

    def pieces(self, blocks: int) -> list[Tensor]:
        """The first `blocks` blocks in order, where they lie and without a copy of rows that were
        never moved: to be saved.
        """
        return [self.room[:blocks]]

    def rows(self, order: Tensor, blocks: int) -> Slab:
        """A slab of its own with the rows `order` [B'] of the first `blocks` blocks."""
        return type(self)(self.blocks(0, blocks).index_select(1, order), self.device)


class HostSlab(Slab):
    """Blocks in CPU memory, behind those that were opened."""

    placement: Placement = "host"

    def __init__(
        self,
        room: Tensor,
        device: torch.device,
        base: Tensor | None = None,
        base_rows: Tensor | None = None,
    ) -> None:
        super().__init__(room, device)
        self.base, self.base_rows = base, base_rows
        """Complete blocks [N, B', G, S, D] that were opened, and the row of each of our rows there:
        repeated rows share them.
        """

    @classmethod
    def opened(cls, blocks: Tensor, complete: int, device: torch.device) -> Slab:
        """See `Slab.opened`; `blocks` lie on the CPU, and complete ones stay where they are."""
        slab = cls(torch.empty(0, *blocks.shape[1:], dtype=blocks.dtype), device)
        slab.base, slab.base_rows = blocks[:complete], torch.arange(blocks.shape[1])
        slab.reserve(blocks.shape[0])
        slab.room[: blocks.shape[0] - complete] = blocks[complete:]
        return slab

    @property
    def first(self) -> int:
        """See `Slab.first`."""
        return 0 if self.base is None else self.base.shape[0]

    @property
    def nbytes(self) -> int:
        """See `Slab.nbytes`; opened blocks that rows share count once."""
        return self.room.nbytes + (0 if self.base is None else self.base.nbytes)

    def _grow(self, blocks: int) -> None:
        grown = torch.zeros(blocks, *self.room.shape[1:], dtype=self.room.dtype)
        grown[: self.room.shape[0]] = self.room
        self.room = grown

    def _to_write(self, new: Tensor) -> Slab:
        if torch.is_grad_enabled() and new.requires_grad:
            raise StateError(
                f"A store on the {self.placement} was given keys or values that require gradients, "
                "and gradients do not flow through it. Train with placement='device', or write "
                "under torch.no_grad()."
            )
        return self

    def take(self, units: Tensor) -> Tensor:
        """See `Slab.take`; the one wait is for the units themselves."""
        wanted = units.flatten().cpu()
        shape = (wanted.shape[0], *self.room.shape[3:])
        pinned = self.device.type == "cuda"
        found = torch.empty(shape, dtype=self.room.dtype, pin_memory=pinned)
        border = self.first * self.units
        from_base = wanted < border
        if not border or not from_base.any():
            self._take_room(wanted, found)
        elif from_base.all():
            self._take_base(wanted, found)
        else:
            for member, source in ((from_base, self._take_base), (~from_base, self._take_room)):
                at = member.nonzero()[:, 0]
                found[at] = source(wanted[at], found.new_empty(at.shape[0], *shape[1:]))
        # torch keeps pinned memory from being used again before the copy is done
        return found.view(*units.shape, *shape[1:]).to(self.device, non_blocking=True)

    def _take_room(self, units: Tensor, out: Tensor) -> Tensor:
        border = self.first * self.units
        return torch.index_select(self.room.flatten(0, 2), 0, units - border, out=out)

    def _take_base(self, units: Tensor, out: Tensor) -> Tensor:
        assert self.base is not None
        assert self.base_rows is not None
        _, rows, heads = self.base.shape[:3]
        row = self.base_rows[units // heads % self.room.shape[1]]
        units = (units // self.units * rows + row) * heads + units % heads
        return torch.index_select(self.base.flatten(0, 2), 0, units, out=out)

    def blocks(self, low: int, high: int) -> Tensor:
        """See `Slab.blocks`: on the CPU."""
        first = self.first
        room = self.room[max(low - first, 0) : max(high - first, 0)]
        if self.base is None or self.base_rows is None or low >= first:
            return room
        base = self._base_of(low, high)
        return torch.cat([base, room]) if len(room) else base

    def _base_of(self, low: int, high: int) -> Tensor:
        """Opened blocks with our rows; without a copy where these never moved."""
        assert self.base is not None
        assert self.base_rows is not None
        base = self.base[low:high]
        own = torch.equal(self.base_rows, torch.arange(base.shape[1]))
        return base if own else base.index_select(1, self.base_rows)

    def pieces(self, blocks: int) -> list[Tensor]:
        """See `Slab.pieces`."""
        room = self.room[: max(blocks - self.first, 0)]
        if self.base is None or self.base_rows is None:
            return [room]
        return [self._base_of(0, min(blocks, self.first)), room]

    def rows(self, order: Tensor, blocks: int) -> Slab:
        """See `Slab.rows`; opened blocks are shared, not copied.

        Raises:
            StateError: the disk is full.
        """
        order = order.cpu()
        shape = (0, order.shape[0], *self.room.shape[2:])
        copy = type(self)(torch.empty(shape, dtype=self.room.dtype), self.device)
        if self.base_rows is not None:
            copy.base, copy.base_rows = self.base, self.base_rows[order]
        copy.reserve(blocks)
        count, step = blocks - self.first, max(1, COPIED // (self.units * self.unit_nbytes))
        for low in range(0, count, step):
            part = slice(low, min(low + step, count))
            copy.room[part] = self.room[part].index_select(1, order)
        return copy


class DiskSlab(HostSlab):
    """Blocks in a mapped file that has no name."""

    placement: Placement = "disk"
    _file: IO[bytes] | None = None

    def _spare(self, held: int) -> int:
        return min(held // 2, STEP // (self.units * self.unit_nbytes))

    def _grow(self, blocks: int) -> None:
        shape = (blocks, *self.room.shape[1:])
        size, held, folder = blocks * self.units * self.unit_nbytes, 0, tempfile.gettempdir()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            held = os.fstat(self._file.fileno()).st_size
            _lengthen(self._file.fileno(), held, size)
            bytes_ = mmap.mmap(self._file.fileno(), size)
        except OSError as error:
            if self._file is not None:
                os.ftruncate(self._file.fileno(), held)
            free = shutil.disk_usage(folder).free
            raise StateError(
                f"A store on disk asked for {size - held} more bytes in {folder}: "
                f"{error.strerror}; {free} bytes are free there. Free some, set TMPDIR to a folder "
                "on a larger disk, or use placement='host'. The store is as it was."
            ) from error
        if hasattr(mmap, "MADV_RANDOM"):
            bytes_.madvise(mmap.MADV_RANDOM)  # a unit is smaller than what is otherwise read ahead
        # the mapping lives as long as the tensor
        self.room = torch.frombuffer(bytes_, dtype=self.room.dtype).view(shape)


def _lengthen(descriptor: int, held: int, size: int) -> None:
    """Reserve bytes `held` to `size`: writing to a mapped page that the disk has no room for would
    kill the process.
    """
    if hasattr(os, "posix_fallocate"):
        if size > held:
            os.posix_fallocate(descriptor, held, size - held)
        return
    while held < size:
        held += os.pwrite(descriptor, bytes(min(COPIED, size - held)), held)


PLACEMENTS: dict[Placement, type[Slab]] = {"device": Slab, "host": HostSlab, "disk": DiskSlab}
