"""Product keys: the k best of n² slots, found in 2n scores.

Slot a n + b has the score first_a + second_b: the sum of two numbers of which there are n each.
Whatever beats a pair in one half beats it with the same other half, so a pair whose halves stand at
ranks p and q (from 1) is beaten by p q - 1 others, and can be among the best k only if p q <= k::

    slots = top-k of { a n + b : rank(a) rank(b) <= k } by first_a + second_b

That is about k log k candidates instead of n² (or k²). Sums are compared as the real numbers that
they are, not as rounded, and of equal ones the lower slot is taken: so the choice is that of an
exhaustive search, for any scores, and does not depend on what else is in the batch. Scores must be
numbers.
Source: Lample et al., 2019, arXiv:1907.05242.
"""

from __future__ import annotations

import torch
from torch import Tensor


def exhaustive_topk(first: Tensor, second: Tensor, k: int) -> Tensor:
    """Slots [..., k] of the largest sums first_a + second_b, best first, of scores [..., n] each.

    This function is the definition.

    Raises:
        ValueError: k is not between 1 and n.
    """
    _check(first, second, k)
    sums = _exact_sum(first[..., :, None], second[..., None, :])
    rounded, rest = (x.flatten(-2) for x in sums)
    slots = torch.arange(rounded.shape[-1], device=rounded.device).expand(rounded.shape)
    return _best(rounded, rest, slots, k)


@torch.no_grad()
def product_topk(first: Tensor, second: Tensor, k: int) -> Tensor:
    """The same from the k best of each half. Arguments and errors as `exhaustive_topk`."""
    _check(first, second, k)
    n, device = first.shape[-1], first.device
    rank = torch.arange(1, k + 1, device=device)
    p, q = (rank[:, None] * rank <= k).nonzero(as_tuple=True)
    a, b = _leading(first, k)[..., p], _leading(second, k)[..., q]
    rounded, rest = _exact_sum(first.gather(-1, a), second.gather(-1, b))
    return _best(rounded, rest, a * n + b, k)


def slot_scores(first: Tensor, second: Tensor, slots: Tensor) -> Tensor:
    """first_a + second_b of each slot a n + b: [..., k], with gradients."""
    n = first.shape[-1]
    return first.gather(-1, slots // n) + second.gather(-1, slots % n)


def _leading(scores: Tensor, k: int) -> Tensor:
    """[..., k] where the largest scores stand, largest first; of equal ones the first."""
    index, tied = _top(scores, k)
    index[tied] = scores[tied].argsort(dim=-1, descending=True, stable=True)[:, :k]
    return index


def _top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest as `topk` finds them, and the rows [...] bool in which equal scores left it a
    choice: those are few, and sorted again.
    """
    values, index = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    return index[..., :k].contiguous(), (values[..., 1:] == values[..., :-1]).any(-1)


def _exact_sum(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + y as rounded, and what rounding took away: together exact (Knuth's two-sum)."""
    rounded = x + y
    y_kept = rounded - x
    return rounded, (x - (rounded - y_kept)) + (y - y_kept)


def _best(rounded: Tensor, rest: Tensor, slots: Tensor, k: int) -> Tensor:
    index, tied = _top(rounded, k)
    order = slots[tied].argsort(dim=-1)
    for key in (rest[tied], rounded[tied]):
        again = key.gather(-1, order).argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, again)
    index[tied] = order[:, :k]
    return slots.gather(-1, index)


def _check(first: Tensor, second: Tensor, k: int) -> None:
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"The halves have {first.shape[-1]} and {second.shape[-1]} keys; product keys need as "
            "many in each."
        )
    if not 1 <= k <= first.shape[-1]:
        raise ValueError(
            f"k is {k}, and each half has {first.shape[-1]} keys: choose between 1 and that many."
        )
