"""Rows that nobody wrote yet: a function of a seed and a row's number, which takes no memory."""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor

from memretrofit.errors import ConfigError
from memretrofit.modules.row_sources import PIECE, Tier, check_rows, row_buffer


@dataclass(frozen=True)
class FreshRows:
    """Rows that nobody wrote yet. Row r depends on `seed` and r alone, and takes no memory.

    ::

        word_j = mix(mix(mix(seed) + (r + 1) g) + (j + 1) g)     mix, g of SplitMix64; 64 bits
        value_i = std * level[16 bits of word_{i / 4}]

    The 2^16 levels are equally likely quantiles of a normal distribution cut at two deviations:
    integers and one table, so any machine finds the same bits.

    Raises:
        ConfigError: a size, a dtype, `std` or `zero_part` that is not usable.
    """

    rows: int
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    seed: int = 0
    std: float = 0.0
    """Standard deviation before the cut; 0 makes every row zero."""
    zero_part: tuple[int, int] | None = None
    """(dimension, index): this part of every row is zero."""

    def __post_init__(self) -> None:
        check_rows("FreshRows", self.rows, self.shape, self.dtype)
        problems = []
        if not (math.isfinite(self.std) and self.std >= 0):
            problems.append(f"std={self.std}; it must be a number >= 0")
        if self.zero_part is not None:
            dimension, place = self.zero_part
            if not (0 <= dimension < len(self.shape) and 0 <= place < self.shape[dimension]):
                problems.append(f"zero_part={self.zero_part} is no part of {list(self.shape)}")
        if problems:
            raise ConfigError.listing("FreshRows", problems)

    @property
    def tier(self) -> Tier:
        """See `RowSource.tier`."""
        return "fresh"

    @property
    def nbytes(self) -> int:
        """See `RowSource.nbytes`: none."""
        return 0

    @property
    def identity(self) -> str:
        """See `RowSource.identity`: the formula, whose version is the number after `fresh`."""
        dtype = str(self.dtype).removeprefix("torch.")
        rest = "" if self.blank else f" seed={self.seed} std={self.std!r} zero={self.zero_part}"
        return f"fresh-1 {self.rows}x{list(self.shape)} {dtype}{rest}"

    @property
    def blank(self) -> bool:
        """See `RowSource.blank`."""
        return self.std == 0

    def read(self, index: Tensor) -> Tensor:
        """See `RowSource.read`."""
        width = math.prod(self.shape)
        rows = row_buffer(len(index), *self.shape, dtype=self.dtype).zero_()
        if self.blank:
            return rows
        levels = (_levels() * self.std).to(self.dtype)
        words = torch.arange(1, -(-width // 4) + 1) * _GOLDEN
        first = _mixed(_mixed(torch.tensor(self.seed)) + (index + 1) * _GOLDEN)
        step = max(1, PIECE // (8 * width))
        for low in range(0, len(index), step):
            bits = _mixed(first[low : low + step, None] + words).view(torch.int16)[:, :width]
            place = bits.reshape(-1).int() & 0xFFFF
            part = rows[low : low + step]
            part.copy_(levels.index_select(0, place).view(part.shape))
        if self.zero_part is not None:
            dimension, place = self.zero_part
            rows.select(dimension + 1, place).zero_()
        return rows


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))
_CUT = 2.0


def _mixed(words: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, 2014) on int64, modulo 2^64."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        words = _shifted(words, shift).bitwise_xor_(words).mul_(factor)
    return _shifted(words, 31).bitwise_xor_(words)


def _shifted(words: Tensor, bits: int) -> Tensor:
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)  # int64 would pull in the sign


@functools.cache
def _levels() -> Tensor:
    normal, half = statistics.NormalDist(), 1 << 15
    low = normal.cdf(-_CUT)
    below = [normal.inv_cdf(low + (k + 0.5) / half * (0.5 - low)) for k in range(half)]
    return torch.tensor([*below, *(-x for x in reversed(below))], dtype=torch.float64)
