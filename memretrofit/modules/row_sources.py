"""Where the rows of a bank come from: a tensor, files that are mapped, or a formula.

A source has `rows` rows of `shape`, which never change. The tiers give the same bits::

    fresh    FreshRows    rows that nobody wrote yet (`modules.fresh_rows`)
    ram      HeldRows     a tensor in CPU memory
    device   HeldRows     a tensor beside the model
    disk     MappedRows   spans of files: only rows that are asked for are read

On the way to a CUDA device rows are gathered into pinned memory. Files are mapped read-only: no
mistake can write to them, and a mapping larger than memory is not refused.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from memretrofit.errors import ConfigError, StateError

Tier = Literal["fresh", "ram", "device", "disk"]

ROW_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
"""Types of rows: float32 holds every value of each, so a row that is opened for training begins
with the very bits of the source."""

PIECE = 8 << 20
"""Bytes that are made or copied at once, so that a large table needs little memory beside it."""

READ_AHEAD = 128 << 10
"""Bytes of a row from which on the system may read ahead of the page that is asked for."""


class RowSource(Protocol):
    """Rows that never change."""

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, one of `ROW_DTYPES`."""
        ...

    @property
    def tier(self) -> Tier:
        """Where they are."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held in that tier."""
        ...

    @property
    def identity(self) -> str:
        """A name that only the same rows have, wherever they lie: edits belong to it."""
        ...

    @property
    def blank(self) -> bool:
        """Whether every row is known to be zero."""
        ...

    def read(self, index: Tensor) -> Tensor:
        """Rows of sorted distinct numbers [n] (CPU) as [n, *shape]; on the CPU, or where they are
        in tier `device`.
        """
        ...


def row_nbytes(source: RowSource) -> int:
    """Bytes of one row."""
    return math.prod(source.shape) * source.dtype.itemsize


def row_pieces(source: RowSource, low: int = 0, high: int | None = None) -> Iterator[Tensor]:
    """Rows `low` to `high` (the last) in order, [n, *shape] at a time, some `PIECE` bytes each."""
    step, high = max(1, PIECE // row_nbytes(source)), source.rows if high is None else high
    for first in range(low, high, step):
        yield source.read(torch.arange(first, min(first + step, high)))


def check_rows(name: str, rows: int, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Refuse sizes and types that rows cannot have, with a ConfigError about `name`."""
    problems = []
    if rows < 1 or any(size < 1 for size in shape):
        problems.append(f"{rows} rows of {list(shape)}; every size must be at least 1")
    if dtype not in ROW_DTYPES:
        legal = ", ".join(str(x).removeprefix("torch.") for x in ROW_DTYPES)
        problems.append(f"dtype {str(dtype).removeprefix('torch.')}; legal: {legal}")
    if problems:
        raise ConfigError.listing(name, problems)


def row_buffer(*shape: int, dtype: torch.dtype) -> Tensor:
    """Room on the CPU for rows; pinned where they may go on to a CUDA device."""
    return torch.empty(shape, dtype=dtype, pin_memory=torch.cuda.is_initialized())


class HeldRows:
    """Rows [rows, *shape] in a tensor, which must not be changed any more.

    Raises:
        ConfigError: a dtype that rows cannot have, or tier `ram` and a tensor elsewhere.
    """

    tier: Literal["ram", "device"]
    blank = False

    def __init__(
        self,
        tensor: Tensor,
        tier: Literal["ram", "device"] = "ram",
        *,
        identity: str | None = None,
    ) -> None:
        check_rows("HeldRows", len(tensor) if tensor.ndim else 0, tensor.shape[1:], tensor.dtype)
        if tier == "ram" and tensor.device.type != "cpu":
            raise ConfigError(
                f"HeldRows: tier='ram' and a tensor on {tensor.device}. Pass tensor.cpu(), or "
                "tier='device'."
            )
        self.tensor, self.tier = tensor.detach().contiguous(), tier
        self._identity = identity

    @classmethod
    def copy_of(
        cls, source: RowSource, tier: Literal["ram", "device"], device: torch.device | str = "cpu"
    ) -> HeldRows:
        """All rows of another source, read once, a piece at a time."""
        tensor, low = torch.empty(source.rows, *source.shape, dtype=source.dtype, device=device), 0
        for piece in row_pieces(source):
            tensor[low : low + len(piece)] = piece
            low += len(piece)
        return cls(tensor, tier, identity=source.identity)

    def on(self, device: torch.device) -> HeldRows:
        """The same rows for a model that moved: tier `device` moves with it."""
        if self.tier == "ram" or self.tensor.device == device:
            return self
        return HeldRows(self.tensor.to(device), self.tier, identity=self._identity)

    @property
    def rows(self) -> int:
        """See `RowSource.rows`."""
        return self.tensor.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """See `RowSource.shape`."""
        return tuple(self.tensor.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """See `RowSource.dtype`."""
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        """See `RowSource.nbytes`."""
        return self.tensor.nbytes

    @property
    def identity(self) -> str:
        """See `RowSource.identity`: a hash of all rows, taken once."""
        if self._identity is None:
            digest = hashlib.sha256(f"{self.rows} {self.shape} {self.dtype}".encode())
            for piece in row_pieces(self):
                digest.update(piece.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
            self._identity = f"sha256:{digest.hexdigest()}"
        return self._identity

    def read(self, index: Tensor) -> Tensor:
        """See `RowSource.read`; the numbers may be in any order and repeat."""
        if self.tensor.device.type != "cpu" or not torch.cuda.is_initialized():
            return self.tensor.index_select(0, index.to(self.tensor.device))
        rows = row_buffer(len(index), *self.shape, dtype=self.dtype)
        return torch.index_select(self.tensor, 0, index.cpu(), out=rows)

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldRows:
        return self  # of a copied model; rows never change


@dataclass(frozen=True)
class Span:
    """Rows `start` to `start` + `rows` of a table, which lie in `path` from byte `offset` on."""

    path: Path
    offset: int
    start: int
    rows: int


class MappedRows:
    """Rows in files, mapped read-only. Spans follow each other from row 0 on.

    A file that is truncated while it is mapped ends the process when a lost page is read; a file
    that is replaced by another of its name does not disturb.

    Raises:
        ConfigError: a dtype that rows cannot have.
        StateError: the spans do not follow each other, or one does not lie in its file.
        OSError: a file cannot be mapped.
    """

    tier: Tier = "disk"
    blank = False

    def __init__(
        self, spans: Sequence[Span], shape: tuple[int, ...], dtype: torch.dtype, identity: str
    ) -> None:
        self.spans, self.shape, self.dtype, self.identity = tuple(spans), shape, dtype, identity
        self.rows = sum(span.rows for span in spans)
        check_rows("MappedRows", self.rows, shape, dtype)
        self._ends = torch.tensor([span.start + span.rows for span in spans])
        if [span.start for span in spans] != [0, *self._ends.tolist()[:-1]]:
            raise StateError("MappedRows: the spans do not follow each other from row 0 on.")
        self._parts = [_mapped(span, row_nbytes(self)) for span in spans]

    @property
    def nbytes(self) -> int:
        """See `RowSource.nbytes`."""
        return self.rows * row_nbytes(self)

    def read(self, index: Tensor) -> Tensor:
        """See `RowSource.read`."""
        rows = row_buffer(len(index), row_nbytes(self), dtype=torch.uint8)
        numbers, out = index.numpy(), rows.numpy()
        cuts = [0, *torch.searchsorted(index, self._ends).tolist()]
        for span, part, low, high in zip(self.spans, self._parts, cuts, cuts[1:], strict=False):
            if low < high:
                # "raise" would copy to a buffer first; the table has checked the numbers
                own = numbers[low:high] - span.start
                np.take(part, own, axis=0, out=out[low:high], mode="clip")
        return rows.view(self.dtype).view(len(index), *self.shape)

    def __deepcopy__(self, memo: dict[int, Any]) -> MappedRows:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.spans, self.shape, self.dtype, self.identity)


def _mapped(span: Span, width: int) -> np.ndarray[Any, Any]:
    """The bytes of a span as [rows, width], read-only."""
    first = span.offset - span.offset % mmap.ALLOCATIONGRANULARITY
    length = span.offset + span.rows * width - first
    with span.path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=first)
        except ValueError as error:  # longer than the file
            raise StateError(f"{span.path} is too short for {span.rows} rows: {error}.") from error
    if width < READ_AHEAD and hasattr(mmap, "MADV_RANDOM"):
        content.madvise(mmap.MADV_RANDOM)  # what lies beside a short row is not asked for
    flat = np.frombuffer(content, np.uint8, span.rows * width, span.offset - first)
    return flat.reshape(span.rows, width)
