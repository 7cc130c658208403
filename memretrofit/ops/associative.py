"""An associative memory with a normaliser, which is written several keys at a time.

State of one row: the matrix A [D, E] and the norm z [D]. Keys and queries are features >= 0, as
`dpfp` makes them. For the M keys of one write::

    r(q)  = A^T q / (z . q + eps)                                [E]  read
    e_i   = v_i - r(k_i)                                         [E]  what the key does not recall
    c_i   = clip(1 - z . k_i / (|k_i|^2 + eps), 0, 1)                 how much of it z lacks
    A'    = A + sum_i beta_i k_i e_i^T                           [D, E]
    z'    = z + sum_i c_i k_i                                    [D]

All keys of a write meet the state before it, not each other. No gradient goes through c_i. An empty
state reads exactly 0; a key that is overwritten with beta = 1 recalls the new value, and leaves z.

Reduces to: the delta rule for orthonormal keys, one in each write, as far as eps lets it.
Rodkin et al., 2024, arXiv:2407.04841. q is [B, T, D]; k [B, M, D], v [B, M, E], beta [B, M].
Results are float32, or float64 where an input has it.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from memretrofit.ops.chunks import full_precision

EPSILON = 1e-5


def dpfp(x: Tensor, shifts: int) -> Tensor:
    """Deterministic parameter-free projection: features [..., 2 shifts d] >= 0 of x [..., d].

    ::

        r = [relu(x) ; relu(-x)]                   [2 d]
        r * roll(r, 1) ; ... ; r * roll(r, shifts)

    Shift d gives zeros, and 2 d - s the products of shift s again: `shifts` < d wastes nothing.
    Schlag et al., 2021, arXiv:2102.11174.
    """
    (x,) = _widened(x)
    r = torch.cat([x.relu(), (-x).relu()], dim=-1)
    return torch.cat([r * r.roll(s, dims=-1) for s in range(1, shifts + 1)], dim=-1)


def associative_read(q: Tensor, matrix: Tensor, norm: Tensor) -> Tensor:
    """r(q) for queries [B, T, D]: [B, T, E]."""
    q, matrix, norm = _widened(q, matrix, norm)
    with full_precision(q):
        return (q @ matrix) / (q @ norm[..., None] + EPSILON)


def recurrent_associative_write(
    k: Tensor, v: Tensor, beta: Tensor, matrix: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """A' and z', one key at a time. This function is the definition."""
    k, v, beta, matrix, norm = _widened(k, v, beta, matrix, norm)
    new_matrix, new_norm = matrix, norm
    with full_precision(k):
        for k_i, v_i, beta_i in zip(k.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
            error = v_i - associative_read(k_i[:, None], matrix, norm)[:, 0]
            known = (norm * k_i).sum(-1) / (k_i.square().sum(-1) + EPSILON)
            new_matrix = new_matrix + k_i[:, :, None] * (beta_i[:, None] * error)[:, None]
            new_norm = new_norm + (1 - known).clamp(0, 1).detach()[:, None] * k_i
    return new_matrix, new_norm


def associative_write(
    k: Tensor, v: Tensor, beta: Tensor, matrix: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """Same result from matrix products over all M keys."""
    k, v, beta, matrix, norm = _widened(k, v, beta, matrix, norm)
    with full_precision(k):
        errors = v - associative_read(k, matrix, norm)
        known = (k @ norm[..., None])[..., 0] / (k.square().sum(-1) + EPSILON)
        lacks = (1 - known).clamp(0, 1).detach()
        matrix = matrix + k.mT @ (beta[..., None] * errors)
        return matrix, norm + (lacks[:, None] @ k)[:, 0]


def _widened(*operands: Tensor) -> tuple[Tensor, ...]:
    """All in one precision, float32 or more."""
    dtype = reduce(torch.promote_types, (x.dtype for x in operands), torch.float32)
    return tuple(x.to(dtype) for x in operands)
