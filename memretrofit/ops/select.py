"""Which blocks of a store a query attends: the best of those it may see, and lists of them.

A block is open to a query when every token in it has left the query's window. Of the open blocks a
query takes the k with the highest score (of two equal ones, the older)::

    chosen(t) = top-k { n : open(t, n) } by score(t, n)

Neighbouring queries choose much the same blocks, so attention fetches the union over a few
queries once and hides from each query what it did not choose (`listed`).
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose_blocks(scores: Tensor, open_blocks: Tensor, k: int) -> Tensor:
    """Membership [..., N] bool: at most the `k` best open blocks by scores [..., N].

    `open_blocks` is bool and broadcasts to `scores`. With k >= N every open block is chosen.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; choose at least one block.")
    open_blocks = open_blocks.expand(scores.shape)
    if k >= scores.shape[-1]:
        return open_blocks
    scores = scores.masked_fill(~open_blocks, -torch.inf)
    # `topk` takes any of equal scores, and which one may depend on how many blocks there are
    least = scores.topk(k, dim=-1).values[..., -1:]
    better, equal = scores > least, scores == least
    left = k - better.sum(-1, keepdim=True)
    return (better | (equal & (equal.cumsum(-1) <= left))) & open_blocks


def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks that any of C queries chose [..., C, N], oldest first, as indices [..., U], and
    the membership of each query among them [..., C, U].

    U is the largest number over the leading axes; shorter lists are filled with indices that no
    query chose.
    """
    used = chosen.any(-2)
    count = int(used.sum(-1).max())
    # stable: the used ones first, each part in order of age
    index = used.byte().argsort(dim=-1, descending=True, stable=True)[..., :count]
    wanted = index[..., None, :].expand(*chosen.shape[:-1], count)
    return index, chosen.gather(-1, wanted)
