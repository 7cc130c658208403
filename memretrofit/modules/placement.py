"""Which layers get a read: rules from the number of layers L to indices."""

from __future__ import annotations


def uniform(count: int) -> tuple[int, ...]:
    """Every layer."""
    return tuple(range(count))


def late_third(count: int) -> tuple[int, ...]:
    """The last third, where topics are known (arXiv:2510.02375: as good as all layers)."""
    return tuple(range(count - max(1, count // 3), count))


def middle(count: int) -> tuple[int, ...]:
    """The layer in the middle."""
    return (count // 2,)


def centred_stride(count: int, number: int = 3) -> tuple[int, ...]:
    """`number` layers, each in the middle of its part (arXiv:2412.09764: 4, 12 and 20 of 24)."""
    return tuple(dict.fromkeys((2 * part + 1) * count // (2 * number) for part in range(number)))


def early(count: int) -> tuple[int, ...]:
    """The second layer and the middle one: local patterns (arXiv:2601.07372)."""
    return tuple(dict.fromkeys((min(1, count - 1), count // 2)))
