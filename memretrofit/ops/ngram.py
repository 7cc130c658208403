"""Hashed n-grams: which rows of a table the last few tokens of a text name.

x a token, m one odd multiplier for each place, p one prime for each order n and head k::

    mix_n(t)  = x_t m_0 xor x_{t-1} m_1 xor ... xor x_{t-n+1} m_{n-1}
    row_nk(t) = mix_n(t) mod p_nk

No product reaches 2^63 (`odd_multipliers`), so that 64-bit integers give the same rows everywhere,
none below zero. The heads of one order share its mix: they are not independent hashes.
Cheng et al., 2026, arXiv:2601.07372, section 2.2; constants as the authors' demo draws them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_LAYER_STRIDE = 10007
"""Distance between the seeds of two neighbouring layers."""
_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
"""Witnesses that decide primality of every number below 2^64 (Sorenson and Webster, 2015)."""


def odd_multipliers(seed: int, layers: Sequence[int], places: int, num_ids: int) -> Tensor:
    """[layers, places] int64: odd, and small enough that no product with an id < `num_ids`
    overflows.
    """
    half = max(1, int(np.iinfo(np.int64).max) // num_ids // 2)
    drawn = [
        np.random.default_rng(seed + _LAYER_STRIDE * layer).integers(half, size=places).tolist()
        for layer in layers
    ]
    return 2 * torch.tensor(drawn, dtype=torch.int64) + 1


def distinct_primes(least: int, layers: int, orders: int, heads: int) -> Tensor:
    """[layers, orders * heads] int64: the smallest primes >= `least`, each once, in this order."""
    primes: list[int] = []
    candidate = least
    while len(primes) < layers * orders * heads:
        if is_prime(candidate):
            primes.append(candidate)
        candidate += 1
    return torch.tensor(primes, dtype=torch.int64).view(layers, orders * heads)


def is_prime(number: int) -> bool:
    """Whether `number` < 2^64 is a prime (Miller and Rabin)."""
    if number < 2 or any(number % base == 0 for base in _BASES):
        return number in _BASES
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    return all(_may_be_prime(number, pow(base, odd, number), twos) for base in _BASES)


def _may_be_prime(number: int, power: int, twos: int) -> bool:
    if power in (1, number - 1):
        return True
    for _ in range(twos - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def recent_tokens(ids: Tensor, new: int, places: int, absent: int) -> Tensor:
    """The last `places` tokens at each of the `new` last columns of ids [B, P + T], the newest
    first: [B, T, places].

    `absent` stands where a row has no token; from the first such place on, looking back, all are
    `absent`: nothing reaches over padding.
    """
    needed = new + places - 1
    ids = ids[:, -needed:]
    ids = F.pad(ids, (needed - ids.shape[1], 0), value=absent)
    windows = ids.unfold(1, places, 1).flip(-1)
    return windows.masked_fill((windows == absent).cumsum(-1) > 0, absent)


def hash_ngrams(
    recent: Tensor, multipliers: Tensor, primes: Tensor, orders: Sequence[int]
) -> Tensor:
    """Rows of the n-grams of each order that end at each token.

    Args:
        recent: [B, T, N] ids >= 0, the newest first.
        multipliers: [L, N] of each layer.
        primes: [L, orders * heads].
        orders: ascending, the largest is N.

    Returns:
        [B, T, L, orders * heads], each below its prime.
    """
    terms = recent[..., None, :] * multipliers
    mixes: list[Tensor] = []
    mix = torch.zeros_like(terms[..., 0])
    for place in range(terms.shape[-1]):
        mix = mix ^ terms[..., place]
        if place + 1 in orders:
            mixes.append(mix)
    heads = primes.shape[-1] // len(orders)
    return torch.stack(mixes, dim=-1).repeat_interleave(heads, dim=-1) % primes
