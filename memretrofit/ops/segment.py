"""Events: where a text is cut by surprise, how an edge is refined, and which events a query takes.

One row of text; the tokens in its padding have no surprise (NaN) and count nowhere::

    s_t  = -log p(x_t | x_<t)                                              nats
    b_t  = s_t > mean(P_t) + gamma std(P_t),   P_t = {s_j : t - window <= j < t}   (two at least)
    t begins an event  <=>  the open event holds `most` tokens,  or b_t and it holds `least`

Refinement (`refine`) moves an edge to where the similarities A of the tokens around it fall apart
best. From an edge a, let e be the first token after the one that asked for a, and in [a + least,
a + most), that asks for a cut, and h = (e - a) // 2; the next edge is the best of a + least .. e
among the tokens a - h .. e + h - 1, and a + most if there is no such e::

    Q(t)   = 1/4m sum over both sides c of  sum_{i,j in c} (A_ij - k_i k_j / 2m)        modularity
    phi(t) = cut(t) / min(vol(before t), vol(from t))                                  conductance

A query takes the events with the best scores within a budget of tokens (similarity), then the
neighbours n + 1 and n - 1 of each of them, best first, within another (contiguity).

Fountas et al., 2024, arXiv:2407.09450, sections 3.1 to 3.3.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memretrofit.ops.select import choose_blocks

STEP = 2.0**-16
"""Nats by which surprises are counted: sums of whole numbers do not depend on how a text is cut."""

LIMIT = 128.0
"""Nats above which surprises are alike; keeps the sum of 2**15 squares in 64 bits."""

GRAIN = 2.0**-16
"""Steps in which the qualities of edges are compared: equal ones are equal in any order of sums."""

ROWS = 128
"""Rows of logits that are widened to float32 together."""


def surprise(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log p(token) in nats, [B, T] float32: row t of logits [B, T, vocabulary] predicted `tokens`
    [B, T] at t.
    """
    found = logits.new_zeros(tokens.shape, dtype=torch.float32)
    for low in range(0, tokens.shape[1], ROWS):
        rows = slice(low, low + ROWS)
        widened = logits[:, rows].float().mT
        found[:, rows] = F.cross_entropy(widened, tokens[:, rows], reduction="none")
    return found


def boundaries(
    surprises: Tensor, window: int, gamma: float, history: Tensor | None = None
) -> Tensor:
    """Where surprises [B, T] (NaN: no surprise) stand out of the `window` slots before them: bool.

    `history` [B, h] are the surprises of the slots before the first; all that is further back than
    `window` is ignored. The same surprises give the same bits however the text is cut.
    """
    new = surprises.shape[1]
    known = surprises if history is None else torch.cat([history, surprises], dim=1)
    valid = ~known.isnan()
    units = (known.nan_to_num(0.0).clamp(max=LIMIT).double() / STEP).round().long()
    begin = (torch.arange(known.shape[1], device=known.device) - window).clamp(min=0)

    def before(x: Tensor) -> Tensor:
        total = F.pad(x.cumsum(-1), (1, 0))
        return (total[:, :-1] - total[:, begin]).double()

    count, sums, squares = before(valid.long()), before(units), before(units.square())
    mean = sums / count.clamp(min=1)
    variance = (squares - mean * sums) / (count - 1).clamp(min=1)
    threshold = mean + gamma * variance.clamp(min=0).sqrt()
    return (valid & (count >= 2) & (units > threshold))[:, known.shape[1] - new :]


def places(boundary: Tensor, member: Tensor, size: Tensor, *, least: int, most: int) -> Tensor:
    """The place of each token in its event [B, T]: 0 begins one; -1 where `member` is false.

    `boundary` [B, T] bool is where the text asks for a cut, `size` [B] the tokens that the open
    event holds already (0: there is none, and the first member begins one). Only what is at or
    before t decides t.

    Raises:
        ValueError: the sizes are not 1 <= least <= most.
    """
    if not 1 <= least <= most:
        raise ValueError(f"events of {least} to {most} tokens; give 1 <= least <= most.")
    time = boundary.shape[1]
    if not time:
        return torch.zeros_like(boundary, dtype=torch.long)
    order = (~member).byte().argsort(dim=-1, stable=True)  # members first, in their order
    index = torch.arange(time + 1, device=boundary.device)
    cut = F.pad(boundary & member, (0, 1), value=False).gather(1, F.pad(order, (0, 1), value=time))
    following = index.where(cut, index.new_tensor(time)).flip(-1).cummin(-1).values.flip(-1)

    def next_start(held: Tensor, at: Tensor) -> Tensor:
        asked = following.gather(1, (at + (least - held).clamp(min=0)).clamp(max=time))
        return asked.minimum(at + most - held).clamp(max=time)

    zero = torch.zeros_like(size)[:, None]
    first = next_start(size[:, None], zero).where(size[:, None] > 0, zero)
    jump = next_start(zero.expand(-1, time + 1), index.expand(len(size), -1))
    begins = torch.zeros_like(jump).scatter(1, first, 1)
    # all starts are the orbit of the first under `jump`: twice as much of it in each round
    for _ in range(time.bit_length()):
        begins = begins | torch.zeros_like(begins).scatter_reduce(1, jump, begins, "amax")
        jump = jump.gather(1, jump)
    latest = index.where(begins > 0, -size[:, None]).cummax(-1).values
    packed = (index - latest)[:, :time]
    return torch.full_like(packed, -1).scatter(1, order, packed).masked_fill(~member, -1)


def resampled(surprising: Tensor, ranks: Tensor, window: int, history: Tensor) -> Tensor:
    """Cuts at random, as many as surprise makes: token t asks for one if a token drawn among the
    `window` before it was `surprising` [B, T] bool.

    What is drawn depends on the rank of t among its row's real tokens, `ranks` [B, T], and on
    nothing else. `history` [B, h] is `surprising` of the slots before, at least `window` of them or
    all.
    """
    known = torch.cat([history, surprising], dim=1)
    mixed = (ranks + 1) * -7046029254386353131  # multiply and fold: a hash of 64 bits
    mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
    mixed = (mixed ^ (mixed >> 32)) & (2**62 - 1)
    back = 1 + mixed % ranks.clamp(min=1, max=window)
    place = torch.arange(surprising.shape[1], device=ranks.device) + history.shape[1]
    return known.gather(1, (place - back).clamp(min=0)) & (ranks > 0)


def modularity(similarity: Tensor) -> Tensor:
    """Q of the cut before each t, [..., n], for symmetric similarities [..., n, n]; 0 at t = 0."""
    inside_before, inside_after, total = _volumes(similarity)
    degree = similarity.double().sum(-1)
    before = degree.cumsum(-1) - degree
    expected = (before.square() + (total - before).square()) / total
    return ((inside_before + inside_after - expected) / (2 * total)).nan_to_num(0.0)


def conductance(similarity: Tensor) -> Tensor:
    """phi of the cut before each t, [..., n], for symmetric similarities [..., n, n].

    The volume of a side is the sum inside it; a side without a positive one is no community: inf.
    """
    inside_before, inside_after, total = _volumes(similarity)
    cut = (total - inside_before - inside_after) / 2
    smaller = inside_before.minimum(inside_after)
    return (cut / smaller).masked_fill(smaller <= 0, torch.inf)


def _volumes(similarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums inside [0, t) and inside [t, n) for each t [..., n], and of all [..., 1]."""
    summed = F.pad(similarity.double().cumsum(-1).cumsum(-2), (1, 0, 1, 0))
    total = summed[..., -1:, -1]
    before = summed.diagonal(dim1=-2, dim2=-1)[..., :-1]
    strip = summed[..., -1, :-1]  # columns before t, all rows
    return before, total - 2 * strip + before, total


def best_cut(quality: Tensor, low: int, high: int) -> Tensor:
    """The t in [low, high] with the highest quality [..., n]; of equal ones the latest."""
    candidates = quality[..., low : high + 1].flip(-1)
    return high - candidates.argmax(-1)


def reach(most: int) -> int:
    """Slots from an edge on that decide where the next one is."""
    return max(most, most - 1 + (most - 1) // 2)


def refine(
    asks: Sequence[bool],
    slots: Sequence[int],
    end: int,
    begin: tuple[int, int],
    similarity: Callable[[int, int], Tensor],
    quality: Callable[[Tensor], Tensor],
    *,
    least: int,
    most: int,
) -> tuple[list[tuple[int, int]], int]:
    """The edges of one row's stored tokens, each with the token that asked for it, and how many
    tokens have a known event.

    `asks` and `slots` are those of the tokens, in order; the text has been read up to the slot
    `end`. `begin` is the first edge and who asked for it. `similarity(i, j)` gives A of the tokens
    i .. j - 1, [j - i, j - i], and `quality` of it that of the cut before each. Only slots below
    s + `reach(most)` have a part in the edge after s, so a hole in a row delays nothing.
    """
    edges, count = [begin], len(slots)
    while True:
        edge, asked = edges[-1]
        sure = slots[edge] + reach(most)
        last = bisect_left(slots, sure)
        candidates = range(max(edge + least, asked + 1), min(edge + most, last))
        found = next((t for t in candidates if asks[t]), None)
        if found is None and count > edge + most:
            edges.append((edge + most, edge + most))
        elif found is None:
            known = end >= sure or count == edge + most
            return edges, min(count, edge + (most if known else least))
        elif found == edge + least:
            edges.append((found, found))
        else:
            half = (found - edge) // 2
            if count < found + half and end < sure:
                return edges, min(count, edge + least)
            first = max(bisect_left(slots, slots[edge] - half), edge - half)
            found_quality = quality(similarity(first, min(found + half, last)))
            grains = (found_quality / GRAIN).round()
            cut = best_cut(grains, edge + least - first, found - first)
            edges.append((first + int(cut), found))


def coarse(scores: Tensor) -> Tensor:
    """float32 `scores` to the 11 leading bits, as many as half precision has: scores that differ by
    the order of their sums alone are equal, and ties are decided by age, not by rounding.
    """
    wide = scores * (2.0**13 + 1)  # Dekker's splitting
    return wide - (wide - scores)


def within(sizes: Tensor, budget: int) -> Tensor:
    """How many of the first events [..., k], in order, a budget of tokens takes, as membership.

    The one that crosses the budget is taken when that comes nearer to it than leaving it.
    """
    after = sizes.cumsum(-1)
    before = after - sizes
    return (before < budget) & ((after <= budget) | (after - budget < budget - before))


def choose_events(
    scores: Tensor, open_events: Tensor, sizes: Tensor, *, similar: int, near: int, least: int
) -> Tensor:
    """Membership [..., N] bool: the best open events by scores [..., N] within `similar` tokens,
    and their neighbours within `near` tokens.

    `open_events` bool and `sizes` (tokens; no open event has fewer than `least`) broadcast to
    `scores`. Neighbours are taken in the order of their hits' scores, n + 1 before n - 1, each
    once, if they are open.
    """
    count = scores.shape[-1]
    open_events, sizes = open_events.expand(scores.shape), sizes.expand(scores.shape)
    # as many as the budget could take, of equal scores the older: in order of age, then of score
    likely = choose_blocks(scores, open_events, _most(similar, least))
    order = likely.byte().topk(min(count, _most(similar, least)), dim=-1).indices.sort(-1).values
    limited = scores.masked_fill(~likely, -torch.inf).gather(-1, order)
    order = order.gather(-1, limited.argsort(dim=-1, descending=True, stable=True))
    taken = within(sizes.gather(-1, order), similar) & open_events.gather(-1, order)
    hits = torch.zeros_like(open_events).scatter(-1, order, taken)
    if not near or not count:
        return hits
    never = 2 * count + 2
    turn = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    turn = torch.full_like(sizes, never).scatter(-1, order, turn.masked_fill(~taken, never))
    after, before = F.pad(turn, (1, -1), value=never), F.pad(turn, (-1, 1), value=never)
    turn = (2 * after).minimum(2 * before + 1).masked_fill(hits | ~open_events, never)
    first = turn.topk(min(count, _most(near, least)), dim=-1, largest=False)
    taken = within(sizes.gather(-1, first.indices), near) & (first.values < never)
    return hits.scatter(-1, first.indices, taken | hits.gather(-1, first.indices))


def _most(budget: int, least: int) -> int:
    """Events of at least `least` tokens that a budget can touch."""
    return -(-budget // least) + 1
