"""Which tokens a fixed budget keeps: scores from the attention that they received.

A query i pays the key j the weight p_ij = exp(s_ij - lse_i); over the query heads of one KV head
(H / G of them) and the queries of a set Q the key receives::

    r_j = mean over heads  sum_{i in Q, i >= j}  p_ij                               [B, G, S]

    SnapKV      Q: the last w queries;  score = mean of r over kernel_size neighbours
    H2O         Q: all queries so far;  score = r

Neighbours beyond either end count as zeros. The keys with the highest scores stay; of two equal
ones, the older. Weights are normalised over all that a query attends, not over the candidates.

PyramidKV gives the layers budgets that fall in equal steps around the same mean m::

    low = m // beta,  high = 2 m - low,  n_l = high - l * ((high - low) // (L - 1))

Sources: arXiv:2404.14469 (listing 1), arXiv:2306.14048 (section 4.2), arXiv:2406.02069 (section
4.2), and the released code of the three.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memretrofit.ops.attend import scores as attention_scores


def received(scores: Tensor, lse: Tensor, visible: Tensor, groups: int) -> Tensor:
    """The attention that S keys receive from C queries: [B, groups, S].

    Scores [B, H, C, S] before the softmax, the log of each query's normaliser lse [B, H, C], and
    which keys a query sees, visible [B | 1, 1, C, S].
    """
    weights = (scores - lse[..., None]).exp().masked_fill(~visible, 0.0)
    found = weights.sum(-2)
    return found.view(found.shape[0], groups, -1, found.shape[-1]).mean(2)


def pooled(scores: Tensor, kernel_size: int) -> Tensor:
    """Mean of each score and its neighbours along the last axis; zeros beyond the ends."""
    return F.avg_pool1d(
        scores.flatten(0, -2)[:, None], kernel_size, stride=1, padding=kernel_size // 2
    ).view_as(scores)


def best(scores: Tensor, valid: Tensor, counts: Tensor, width: int) -> Tensor:
    """Places [B, G, width] of the `counts` [B] best scores [B, G, S] among the `valid` [B, S] ones.

    In rising order at the end of the last axis; -1 fills the front where there are fewer.
    """
    ranked = scores.masked_fill(~valid[:, None], -torch.inf)
    # stable, so that of two equal ones the older stays however the batch is cut
    order = ranked.argsort(dim=-1, descending=True, stable=True)[..., :width]
    chosen = torch.arange(order.shape[-1], device=order.device) < counts[:, None, None]
    chosen = chosen & valid[:, None].expand_as(scores).gather(-1, order)
    places = order.masked_fill(~chosen, -1).sort(dim=-1).values
    return F.pad(places, (width - places.shape[-1], 0), value=-1)


def pyramid_budget(
    mean: int, layer: int, layers: int, beta: int, *, length: int | None = None, window: int = 0
) -> int:
    """Tokens that `layer` of `layers` keeps beside its window, so that all keep about `mean` each.

    `beta` 1 gives every layer the mean. With the `length` of the text known, no layer is given
    more than `length - window`: the first is cut down to that and the others rise in turn; a text
    shorter than 2 mean gives every layer the mean.
    """
    low = mean // beta
    high = 2 * mean - low
    if length is not None:
        available = max(0, length - window)
        if length < 2 * mean:
            return min(mean, available)
        if high >= available:
            high, low = available, 2 * mean - available
    return mean if layers == 1 else high - layer * ((high - low) // (layers - 1))


def snapkv_scores(q: Tensor, k: Tensor, *, kernel_size: int, scale: float | None = None) -> Tensor:
    """Scores [B, G, T - w] of all keys k [B, G, T, K] but the last w, by the last w queries q
    [B, H, w, K]: one prompt as the paper treats it, with the last w tokens as its window.
    """
    window, length = q.shape[2], k.shape[2]
    found = _received_in_full_attention(q, k, scale)[..., : length - window]
    return pooled(found, kernel_size)


def h2o_scores(q: Tensor, k: Tensor, *, window: int, scale: float | None = None) -> Tensor:
    """Scores [B, G, T - window] of all keys k [B, G, T, K] but the last `window`, by all queries q
    [B, H, T, K]. Holds a T x T tensor: a definition to compare with.
    """
    return _received_in_full_attention(q, k, scale)[..., : k.shape[2] - window]


def _received_in_full_attention(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    count, length = q.shape[2], k.shape[2]
    slots = torch.arange(length, device=q.device)
    visible = (slots <= slots[length - count :, None])[None, None]
    logits = attention_scores(q, k, scale=scale)
    lse = logits.masked_fill(~visible, -torch.inf).logsumexp(-1)
    return received(logits, lse, visible, k.shape[1])
