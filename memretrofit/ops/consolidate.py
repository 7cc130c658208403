"""Consolidated modes: a bounded set of pairs, each the running mean of tokens that look alike.

M modes per head, each a mean pair x_m = [key, value], a count c_m of tokens in it and an age a_m;
a mode with c_m = 0 is empty. A token with the pair x writes (R is the threshold)::

    s_m  = cos(key of x, key of x_m),  over modes with c_m > 0
    m    = argmax s  if max s >= R,  else argmax a                the most alike, or the oldest
    c_m  = c_m + 1   if max s >= R,  else 1
    x_m  = x_m + (x - x_m) / c_m                                  running mean; at c_m = 1, x itself
    a    = a + 1,  a_m = 0

An empty mode is older than any other, so those are filled first. The first of equals is taken.
Source: CAMELoT, He et al., 2024, arXiv:2402.13449.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PIECE = 64
"""Tokens whose likeness to all modes is one product."""


class Modes(NamedTuple):
    """The state: float32, or float64 where keys are."""

    pairs: Tensor
    """[B, G, M, K + V] mean key and mean value, side by side."""
    counts: Tensor
    """[B, G, M] tokens in each mean; 0 where the mode is empty."""
    ages: Tensor
    """[B, G, M] writes of this row and head since the mode was last written."""


class Written(NamedTuple):
    """What each token did, in order."""

    pairs: Tensor
    """[B, G, T, K + V] the mode that token t wrote, as it stood after that."""
    modes: Tensor
    """[B, G, T] which mode that was; -1 where t does not write."""


def recurrent_consolidate(
    key: Tensor, value: Tensor, writes: Tensor, modes: Modes, threshold: float
) -> tuple[Written, Modes]:
    """The four lines above, one token at a time. This function is the definition.

    `key` [B, G, T, K] and `value` [B, G, T, V]; `writes` [B | 1, T] is bool: the other tokens leave
    no trace.
    """
    width, (pairs, counts, ages) = key.shape[-1], modes
    x = torch.cat([key, value], dim=-1).to(pairs.dtype)
    written, chosen = [torch.empty_like(x[:, :, :0])], [ages[:, :, :0].long()]
    for x_t, writes_t in zip(x.unbind(2), writes.unbind(1), strict=True):
        x_t, writes_t = x_t[:, :, None], writes_t[:, None, None]  # [B, G, 1, K + V], [B, 1, 1]
        alike = F.normalize(x_t[..., :width], dim=-1) * F.normalize(pairs[..., :width], dim=-1)
        best, nearest = alike.sum(-1).masked_fill(counts == 0, -torch.inf).max(-1, keepdim=True)
        merges = best >= threshold
        m = torch.where(merges, nearest, ages.argmax(-1, keepdim=True))  # [B, G, 1]
        count = torch.where(merges, counts.gather(-1, m) + 1, 1)
        old = pairs.gather(2, m[..., None].expand_as(x_t))
        new = torch.where(count[..., None] > 1, old + (x_t - old) / count[..., None], x_t)
        hit = F.one_hot(m[..., 0], counts.shape[-1]).bool() & writes_t
        pairs = torch.where(hit[..., None], new, pairs)
        counts = torch.where(hit, count, counts)
        ages = torch.where(hit, 0, ages + writes_t)
        written.append(new)
        chosen.append(torch.where(writes_t, m, -1))
    return Written(torch.cat(written, 2), torch.cat(chosen, 2)), Modes(pairs, counts, ages)


def consolidate(
    key: Tensor, value: Tensor, writes: Tensor, modes: Modes, threshold: float
) -> tuple[Written, Modes]:
    """The same, with the likeness of a piece of tokens to all modes in one product.

    A write changes one mode, hence one column of that product. Arguments as
    `recurrent_consolidate`; `modes` is not changed.
    """
    if not writes.any():
        nothing = torch.cat([key, value], dim=-1).to(modes.pairs.dtype)
        return Written(nothing, modes.ages.new_full(key.shape[:3], -1, dtype=torch.long)), modes
    modes, done = Modes(*(x.clone() for x in modes)), list[Written]()
    for low in range(0, key.shape[2], PIECE):
        part = slice(low, low + PIECE)
        piece = key[:, :, part], value[:, :, part], writes[:, part]
        done.append(_consolidate_into(modes, *piece, threshold))
    return Written(*(torch.cat(x, dim=2) for x in zip(*done, strict=True))), modes


def _consolidate_into(
    modes: Modes, key: Tensor, value: Tensor, writes: Tensor, threshold: float
) -> Written:
    (pairs, counts, ages), width = modes, key.shape[-1]
    x = torch.cat([key, value], dim=-1).to(pairs.dtype)
    unit = F.normalize(x[..., :width].detach(), dim=-1)
    alike = unit @ F.normalize(pairs[..., :width].detach(), dim=-1).mT  # [B, G, T, M]
    alike = alike.masked_fill(counts[:, :, None] == 0, -torch.inf)
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    head = torch.arange(x.shape[1], device=x.device)
    written, chosen = list[Tensor](), list[Tensor]()
    for t in range(x.shape[2]):
        x_t, writes_t = x[:, :, t], writes[:, t, None]
        best, nearest = alike[:, :, t].max(-1)
        merges = best >= threshold
        at = (row, head, torch.where(merges, nearest, ages.argmax(-1)))
        # by index, not gather: autograd would want the old pairs back, which the next write changes
        old, before = pairs[at], counts[at]
        count = torch.where(merges, before + 1, 1)
        new = torch.where(count[..., None] > 1, old + (x_t - old) / count[..., None], x_t)
        new = torch.where(writes_t[..., None], new, old)
        pairs[at] = new
        counts[at] = torch.where(writes_t, count, before)
        ages[at] = ages[at].masked_fill(writes_t, -1)
        ages += writes_t[..., None]
        direction = F.normalize(new[..., :width].detach(), dim=-1)
        column = (unit[:, :, t + 1 :] @ direction[..., None])[..., 0]
        empty = (counts[at] == 0)[..., None]
        alike[row, head, t + 1 :, at[2]] = column.masked_fill(empty, -torch.inf)
        written.append(new)
        chosen.append(at[2].masked_fill(~writes_t, -1))
    return Written(torch.stack(written, dim=2), torch.stack(chosen, dim=2))


def versions_seen(modes: Modes, written: Written) -> Tensor:
    """Which versions of the modes stand as token t has written: [B, G, T, M + T] bool.

    The first M are `modes` as they were before the T writes, the others are `written.pairs`. Of the
    versions of one mode, the last one written up to t is seen.
    """
    time = written.modes.shape[-1]
    at = torch.arange(time, device=written.modes.device)
    never = torch.tensor(time, device=at.device)
    # the write that ends each version: of those at the start, and of those written here
    index = torch.arange(modes.counts.shape[-1], device=at.device)
    ends = torch.where(written.modes[:, :, None] == index[:, None], at, never).amin(-1)
    again = (written.modes[:, :, None] == written.modes[..., None]) & (at > at[:, None])
    ends = torch.cat([ends, torch.where(again, at, never).amin(-1)], dim=-1)[:, :, None]
    begins = torch.cat([torch.zeros_like(index) - 1, at])
    held = torch.cat([modes.counts > 0, written.modes >= 0], dim=-1)[:, :, None]
    return held & (begins <= at[:, None]) & (at[:, None] < ends)
