"""What all state rules share: shapes and precision of their operands, and the walk over chunks.

A rule is defined by its `recurrent_*` function. Its `chunk_*` function treats C positions at once:
inside a chunk the writes u_t are found together, and only the state walks from chunk to chunk::

    γ_i    = g_1 + … + g_i                                         log decay since the chunk began
    D_ij   = exp(g_{j+1} + … + g_i) for j ≤ i, else 0     [C, C]   what is left at i of a write at j
    S_next = exp(γ_C) S + Σ_j D_Cj k_j u_jᵀ               [K, V]
    o_i    = exp(γ_i) Sᵀ q_i + Σ_{j≤i} D_ij (q_i · k_j) u_j  [V]

Each D_ij is a sum of the g between j and i, not a difference of two γ: a difference of large sums
loses the small decays after a strong one, and is NaN where g = -inf (a full reset).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNKS_AT_ONCE = 8
"""Chunks whose [C, C] matrices exist together: bounds memory without gradients, and fits caches."""


def full_precision(x: Tensor) -> AbstractContextManager[object]:
    """Autocast would run the products of a float32 state in half precision; this turns it off."""
    kind = x.device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.autocast(kind, enabled=False) if on else nullcontext()


class Operands(NamedTuple):
    """Checked inputs of a rule in float32 (float64 where an input has it).

    `q` is scaled and split by the KV head that it reads: R = H / G.
    """

    q: Tensor  # [B, G, R, T, K]
    k: Tensor  # [B, G, T, K]
    v: Tensor  # [B, G, T, V]
    g: Tensor | None  # [B, G, T]
    beta: Tensor | None  # [B, G, T]
    state: Tensor  # [B, G, K, V]

    def steps(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | float, Tensor | float]]:
        """Per position: q [B,G,R,K], k [B,G,K,1], v [B,G,1,V], decay exp(g) and beta [B,G,1,1]."""
        time = self.k.shape[2]
        ones = [1.0] * time
        decay = ones if self.g is None else self.g.exp()[..., None, None].unbind(2)
        beta = ones if self.beta is None else self.beta[..., None, None].unbind(2)
        k, v = self.k[..., None].unbind(2), self.v[..., None, :].unbind(2)
        return zip(self.q.unbind(3), k, v, decay, beta, strict=True)

    def heads(self, reads: list[Tensor]) -> Tensor:
        """What each step read, [B, G, R, V] each, as [B, H, T, V]."""
        if not reads:
            batch, groups, repeats = self.q.shape[:3]
            return self.v.new_zeros(batch, groups * repeats, 0, self.v.shape[-1])
        return torch.stack(reads, 3).flatten(1, 2)

    def blocks(self, chunk_size: int) -> Iterator[Chunks]:
        """The sequence as consecutive groups of equally long chunks of at most `chunk_size`."""
        if chunk_size < 1:
            raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1.")
        width = chunk_size * CHUNKS_AT_ONCE
        for start in range(0, self.k.shape[2], width):
            length = min(width, self.k.shape[2] - start)
            count = -(-length // chunk_size)
            # Even chunks: 65 positions are 33 + 32, so that padding costs at most one row a chunk.
            size = -(-length // count)
            span = (start, length, count, size)
            q = _cut(self.q, 3, *span).transpose(2, 3).contiguous()
            k, v = _cut(self.k, 2, *span), _cut(self.v, 2, *span)
            g = None if self.g is None else _cut(self.g, 2, *span)
            beta = None if self.beta is None else _cut(self.beta, 2, *span)
            yield Chunks.of(q, k, v, g, beta, length)


def operands(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
) -> Operands:
    """Check the shapes of a rule's inputs and bring them to one precision.

    Raises:
        ValueError: shapes disagree, or the query heads are no multiple of the KV heads.
    """
    batch, groups, time, width = k.shape
    expected = {
        "q": (q, (batch, q.shape[1], time, width)),
        "v": (v, (batch, groups, time, v.shape[-1])),
        "g": (g, (batch, groups, time)),
        "beta": (beta, (batch, groups, time)),
        "initial_state": (initial_state, (batch, groups, width, v.shape[-1])),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise ValueError(
                f"{name} has shape {list(x.shape)}; with k {list(k.shape)} it must be {list(shape)}"
            )
    if groups == 0 or q.shape[1] % groups:
        raise ValueError(f"{q.shape[1]} query heads cannot share {groups} KV heads evenly.")
    dtype = reduce(torch.promote_types, (q.dtype, k.dtype, v.dtype), torch.float32)
    q = q.to(dtype) * (width**-0.5 if scale is None else scale)
    if initial_state is None:
        state = k.new_zeros(batch, groups, width, v.shape[-1], dtype=dtype)
    else:
        state = initial_state.to(dtype)
    return Operands(
        q.reshape(batch, groups, q.shape[1] // groups, time, width),
        k.to(dtype),
        v.to(dtype),
        None if g is None else g.to(dtype),
        None if beta is None else beta.to(dtype),
        state,
    )


class Chunks(NamedTuple):
    """N chunks of C positions, and the decays between them (see the equations above)."""

    q: Tensor  # [B, G, N, R, C, K]
    k: Tensor  # [B, G, N, C, K]
    v: Tensor  # [B, G, N, C, V]
    beta: Tensor | None  # [B, G, N, C, 1]
    pairs: Tensor  # D, [B, G, N, C, C] or [C, C] without decay
    since: Tensor | None  # exp(γ), [B, G, N, C, 1]: what position i still sees of the chunk's start
    length: int  # positions before padding

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None, length: int
    ) -> Chunks:
        """Chunks and the decays that follow from g [B, G, N, C]; beta has the same shape."""
        size = k.shape[3]
        if g is None:
            pairs, since = k.new_ones(size, size).tril(), None
        else:
            # Above the diagonal the sums are empty: nothing there can overflow before it is cut.
            between = g[..., None].expand(*g.shape, size).tril(-1)
            pairs = _decay(between.cumsum(-2)).tril()
            since = _decay(g.cumsum(-1))[..., None]
        return cls(q, k, v, None if beta is None else beta[..., None], pairs, since, length)

    def weigh(self, x: Tensor) -> Tensor:
        """β x, row by row."""
        return x if self.beta is None else self.beta * x

    def fade(self, x: Tensor) -> Tensor:
        """exp(γ) x, row by row."""
        return x if self.since is None else self.since * x

    def kept_keys(self) -> Tensor:
        """D_Cj k_j, transposed: what a write at j leaves at the end of its chunk.  [B,G,N,K,C]"""
        return (self.pairs[..., -1, :, None] * self.k).mT

    def kept_state(self) -> Tensor | None:
        """exp(γ_C): what is left of the state at the end of each chunk.  [B,G,N,1,1]"""
        return None if self.since is None else self.since[..., -1:, :]

    def read(self, states: Tensor, writes: Tensor) -> Tensor:
        """The outputs of all positions, from the states before each chunk.  [B, H, length, V]"""
        shape = self.q.shape
        # The heads that share k are rows of one product.
        q = self.q.flatten(3, 4)  # [B, G, N, R·C, K]
        scores = (q @ self.k.mT).view(*shape[:5], shape[4]) * self.pairs.unsqueeze(-3)
        within = (scores.flatten(3, 4) @ writes).view(*shape[:5], -1)
        before = (q @ states).view_as(within)
        if self.since is not None:
            before = self.since.unsqueeze(-3) * before
        o = (within + before).transpose(2, 3)  # [B, G, R, N, C, V]
        return o.flatten(3, 4).flatten(1, 2)[:, :, : self.length]


def _decay(log_decay: Tensor) -> Tensor:
    """exp, and 0 for what would be less than tiny ** 0.7 (3e-27 in float32).

    That little changes no sum of ordinary numbers, and CPUs are a hundred times slower where exp or
    a product meets denormal numbers.
    """
    least = 0.7 * math.log(torch.finfo(log_decay.dtype).tiny)
    return F.threshold(log_decay.clamp(min=least).exp(), 1.001 * math.exp(least), 0.0)


def _cut(x: Tensor, dim: int, start: int, length: int, count: int, size: int) -> Tensor:
    """Part of `dim` as `count` chunks, padded with zeros: no decay, and nothing written."""
    x = x.narrow(dim, start, length)
    short = count * size - length
    if short:
        x = F.pad(x, [0, 0] * (x.dim() - 1 - dim) + [0, short])
    # Contiguous, or each product of a chunk would copy it again.
    return x.reshape(*x.shape[:dim], count, size, *x.shape[dim + 1 :]).contiguous()
