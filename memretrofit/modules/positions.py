"""Where a query and the far keys that it attends stand for the rotary embedding.

Places count the tokens of a row from the first one that left its window, so that neither padding
nor what was read before moves them. A query at place t sees, of window W and of far tokens::

    absolute    (R(t) q) . (R(j) k)         true distances
    clamp       (R(W) q) . (R(0) k)         every far key at the border of the window: InfLLM,
                                            arXiv:2402.04617
    grouped     (R(t // P + W - W // P) q) . (R(j // P) k)    beyond the window P neighbours share
                                            a position: Self-Extend, arXiv:2401.01325
    reindexed   (R(W + n - 1) q) . (R(i) k)    for key i of the n that this query attends, in the
                                            order of the text: as if the text between were not there

Distances reach t, W, W + t / P and W + n - 1. What is searched stands at the border under
`reindexed`: which tokens a query attends is known after the search. Of two blocks with equal keys
(the same text twice, in the first layer) a search may then take either, as rounding has it: under
`clamp` that changes nothing, under `reindexed` the order of what is attended.

Keys are fetched once for the union of what several queries attend, and under `reindexed` one key
has another position for each of them. Blocks move as a whole, so the key keeps its place in the
block, and the query turns to where the block stands: C U more rotations of a query for C queries
and U fetched blocks, U more numbers per query of width K than a search needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Positions = Literal["absolute", "clamp", "grouped", "reindexed"]


class Policy(NamedTuple):
    """Positions of a query and of keys, from places, the window W and the group size P."""

    query: Callable[[Tensor, Tensor, int], Tensor]
    """(places, W [1], P) to the query's position in a search."""
    key: Callable[[Tensor, int], Tensor]
    """(places, P) to the position of a key that is searched."""
    fetched: Callable[[Tensor, Tensor, int], Tensor]
    """(places, entries in the block, P) to the position of a key that is attended."""
    further: Callable[[Tensor], Tensor | None]
    """What each query attends of fetched blocks, oldest first, [B, H, C, U, S] bool, to how much
    further than in a search it stands from each block, [B, H, C, U]; None for nowhere.
    """
    longest: Callable[[int, int, int], int | None]
    """(positions of the model, W, P) to the tokens that can be read within them; None for any
    number.
    """


def packed(attended: Tensor) -> Tensor:
    """Steps from the first entry of each block to the last token that the query attends.

    What a query attends of one block has no gaps; blocks are in the order of the text.
    """
    count = attended.sum(-1)
    behind = count.flip(-1).cumsum(-1).flip(-1) - count
    entry = torch.arange(attended.shape[-1], device=attended.device)
    return behind + (attended * entry).amax(-1)


def _same(attended: Tensor) -> None:
    return None


def _any_number(positions: int, window: int, group: int) -> None:
    return None


def _at_border(places: Tensor, window: Tensor, group: int) -> Tensor:
    return window.expand_as(places)


POSITIONS: dict[str, Policy] = {
    "absolute": Policy(
        lambda places, window, group: places,
        lambda places, group: places,
        lambda places, entries, group: places,
        _same,
        lambda positions, window, group: positions,
    ),
    "clamp": Policy(
        _at_border,
        lambda places, group: torch.zeros_like(places),
        lambda places, entries, group: torch.zeros_like(places),
        _same,
        _any_number,
    ),
    "grouped": Policy(
        lambda places, window, group: places // group + window - window // group,
        lambda places, group: places // group,
        lambda places, entries, group: places // group,
        _same,
        lambda positions, window, group: (positions - window + window // group) * group,
    ),
    "reindexed": Policy(
        _at_border,
        lambda places, group: torch.zeros_like(places),
        lambda places, entries, group: entries.expand_as(places),
        packed,
        _any_number,
    ),
}
