"""Where the events of a text that is read in pieces begin: as cuts are asked for, or refined.

Both say of each token its place in its event before it leaves the window, from what was read before
the query at which it leaves. `Streamed` decides the place of a token from what is at or before it;
`Refined` also looks behind it, so its pieces are shorter (window W, `reach` slots from an edge on
decide the next one, half the span before an edge has a part in it)::

    piece <= W + 1 - reach(most) - (most - 1) // 2

Then an edge that is not decided when a piece begins lies in the window at its end, with all that
decides. Edges that a crop may have undone are decided again: all behind the last one whose next
edge was certain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from memretrofit.ops.segment import conductance, modularity, places, reach, refine

NOT_STORED = -1
"""As a cut, of a token that will not be in a memory: a sink, or padding. As a place, of such a
token, or of one whose event is not known yet.
"""


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The last n tokens of a text, T of them new, and what is known of them."""

    end: int
    """Slots read, the new ones included."""
    cuts: Tensor
    """[B, n] 1 where a token asks to begin an event, 0 where not, or `NOT_STORED`."""
    places: Tensor
    """[B, n - T] places of those that are not new."""
    origins: Tensor
    """[B, n - T] at an edge, slots from it to the token that asked for it; else 0."""
    similarity: Callable[[int, Tensor], Tensor]
    """(row, slots [m]) to the similarities of these tokens, [m, m]."""


class Edges(Protocol):
    """A rule for where events begin."""

    def piece(self, window: int) -> int:
        """Tokens that may be read at once in a window; below 1 if the window is too small."""
        ...

    def decide(self, tail: Tail) -> tuple[Tensor, Tensor]:
        """Places and origins of the last m <= n tokens, new ones included, [B, m] each."""
        ...


@dataclass(frozen=True)
class Streamed:
    """Events begin where a cut is asked for, `least` to `most` tokens each."""

    least: int
    most: int

    def piece(self, window: int) -> int:
        """See `Edges`."""
        return window

    def decide(self, tail: Tail) -> tuple[Tensor, Tensor]:
        """See `Edges`."""
        new = tail.cuts[:, tail.places.shape[1] :]
        before = pad(tail.places, (1, 0), value=NOT_STORED)
        index = torch.arange(before.shape[1], device=before.device)
        latest = (index * (before >= 0)).argmax(-1, keepdim=True)
        size = before.gather(1, latest)[:, 0] + 1
        found = places(new == 1, new >= 0, size, least=self.least, most=self.most)
        return found, torch.zeros_like(found)


@dataclass(frozen=True)
class Refined:
    """The same edges, each moved back to where the tokens around it fall apart best
    (`ops.segment.refine`).
    """

    least: int
    most: int
    quality: Callable[[Tensor], Tensor]

    def piece(self, window: int) -> int:
        """See `Edges`."""
        return window + 1 - reach(self.most) - (self.most - 1) // 2

    def decide(self, tail: Tail) -> tuple[Tensor, Tensor]:
        """See `Edges`. Row by row, event by event."""
        device, new = tail.cuts.device, tail.cuts.shape[1] - tail.places.shape[1]
        known = pad(tail.places, (0, new), value=NOT_STORED).cpu()
        origins = pad(tail.origins, (0, new)).cpu()
        for row, cuts in enumerate(tail.cuts.cpu()):
            self._decide(row, cuts, known[row], origins[row], tail)
        return known.to(device), origins.to(device)

    def _decide(self, row: int, cuts: Tensor, known: Tensor, origins: Tensor, tail: Tail) -> None:
        """Write what is known of one row into its places `known` and `origins` [n]."""
        fresh, first = tail.places.shape[1], tail.end - len(cuts)
        stored = (cuts >= 0).nonzero()[:, 0]
        begins = (known[stored] == 0).nonzero()[:, 0]
        unsure = begins[stored[begins] > fresh - reach(self.most)]
        # a row that has not begun does so with its first token
        found = torch.cat([unsure[:1], begins[-1:], (stored >= fresh).nonzero()[:1, 0]])
        if not len(found):
            return
        low = max(int(found[0]) - self.most, 0)  # what is before has no part in the next edge
        stored, begin = stored[low:], int(found[0]) - low
        slots = stored + first
        edges, decided = refine(
            (cuts[stored] == 1).tolist(),
            slots.tolist(),
            tail.end,
            (begin, begin + int(origins[stored[begin]])),
            lambda i, j: tail.similarity(row, slots[i:j]),
            self.quality,
            least=self.least,
            most=self.most,
        )
        known[stored[begin:]], origins[stored[begin:]] = NOT_STORED, 0
        for (edge, asker), (end, _) in zip(edges, [*edges[1:], (decided, 0)], strict=True):
            known[stored[edge:end]] = torch.arange(end - edge)
            origins[stored[edge]] = asker - edge


Refinement = Literal["none", "modularity", "conductance"]

EDGES: dict[Refinement, Callable[[int, int], Edges]] = {
    "none": Streamed,
    "modularity": lambda least, most: Refined(least, most, modularity),
    "conductance": lambda least, most: Refined(least, most, lambda found: -conductance(found)),
}
"""Rules by the name of what an edge is moved by, from the least and the most tokens of an event."""
