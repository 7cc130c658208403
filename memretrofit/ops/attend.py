"""Exact softmax attention that also returns its normaliser, and the exact merge of two of them.

For one query q over the visible keys j (one head)::

    s_j = softcap · tanh(scale · q·k_j / softcap)     (softcap None: s_j = scale · q·k_j)
    lse = log Σ_j exp(s_j)
    o   = Σ_j exp(s_j − lse) v_j                      [V]

Attention over two disjoint sets of keys is the mean of the two, weighted by their normalisers::

    lse = log(exp(lse1) + exp(lse2)),   o = exp(lse1 − lse) o1 + exp(lse2 − lse) o2

Where nothing is visible, o = 0 and lse = -inf: the neutral element of the merge.
Source of the merge: Milakov and Gimelshein, 2018, arXiv:1805.02867, section 3.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memretrofit.ops.chunks import full_precision

LOG2_E = math.log2(math.e)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B,H,T,K] over k [B,G,S,K], v [B,G,S,V]: o [B,H,T,V] and lse [B,H,T].

    H is a multiple of G; keys and values are not repeated. `mask` is bool, [B|1, 1|H, T, S], True
    where visible; None shows everything. Computes and returns float32 (float64 where q has it).
    `scale` is K**-0.5 unless given.

    Raises:
        ValueError: H is no multiple of G, or the mask is not boolean.
    """
    return weighted(scores(q, k, scale=scale, softcap=softcap), v, mask)


def weighted(s: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attention by given logits s [B,H,T,S] over v [B,G,S,V]: o [B,H,T,V] and lse [B,H,T].

    Raises:
        ValueError: the mask is not boolean.
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask has dtype {mask.dtype}; pass a boolean one, True where visible.")
    (batch, heads, time, keys), groups = s.shape, v.shape[1]
    if not keys:
        nothing = s.new_zeros(batch, heads, time, v.shape[-1])
        return nothing, s.new_full((batch, heads, time), -torch.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -torch.inf)
    with full_precision(s):
        # -inf - -inf is NaN: a row that sees nothing has a finite peak, and weights of zero
        peak = s.detach().amax(-1, keepdim=True).clamp_min(torch.finfo(s.dtype).min)
        # `exp` of -inf is ten times slower than of a number on a CPU, and `exp2` is not
        weights = (s - peak).mul_(LOG2_E).exp2_()
        total = weights.sum(-1)
        blind = total == 0  # the peak alone weighs 1
        total = total.masked_fill(blind, 1.0)
        o = weights.reshape(batch, groups, heads // groups * time, keys) @ v.to(s.dtype)
        o = o.view(batch, heads, time, v.shape[-1]) / total[..., None]
        lse = (peak[..., 0] + total.log()).masked_fill(blind, -torch.inf)
        return o, lse


def scores(
    q: Tensor, k: Tensor, *, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """s_j of q [B,H,T,K] on k [B,G,S,K]: [B,H,T,S], in float32 (float64 where q has it).

    Raises:
        ValueError: H is no multiple of G.
    """
    (batch, heads, time, width), groups = q.shape, k.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} query heads cannot share {groups} KV heads evenly.")
    dtype = torch.promote_types(q.dtype, torch.float32)
    with full_precision(q):
        q = q.to(dtype) * (width**-0.5 if scale is None else scale)
        # The heads that share a KV head are rows of one product.
        rows = q.reshape(batch, groups, heads // groups * time, width)
        s = (rows @ k.to(dtype).mT).view(batch, heads, time, k.shape[2])
        return s if softcap is None else softcap * (s / softcap).tanh()


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from `attend` of each.

    o [..., V], lse [...]; exact for any partition. A side that saw nothing has weight 0.
    """
    empty = (lse1 == -torch.inf) & (lse2 == -torch.inf)
    # -inf − -inf is NaN: where both sides are empty, any finite weights serve their two zeros.
    lse1, lse2 = lse1.masked_fill(empty, 0.0), lse2.masked_fill(empty, 0.0)
    lse = torch.logaddexp(lse1, lse2)
    o = (lse1 - lse).exp()[..., None] * o1 + (lse2 - lse).exp()[..., None] * o2
    return o, lse.masked_fill(empty, -torch.inf)


def merge_all(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` of n parts at once: o [n, ..., V] and lse [n, ...] to [..., V] and [...]."""
    total = lse.logsumexp(0)
    empty = total == -torch.inf
    # -inf - -inf is NaN: where all parts are empty, any finite weights serve their zeros
    weights = (lse.masked_fill(empty, 0.0) - total.masked_fill(empty, 0.0)).exp()
    return (weights[..., None] * o).sum(0), total
