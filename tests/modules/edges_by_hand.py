"""The definition of refined events, over the whole row at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def begins_by_hand(
    cuts: Sequence[int],
    keys: Tensor,
    quality: Callable[[Tensor], Tensor],
    least: int,
    most: int,
) -> list[int]:
    """Places at which the events of tokens with `keys` [T, K] begin: the best edge by trying each.

    `cuts` is 1 where a token asks for a cut, 0 where not, and -1 before the first one that counts.
    """
    first = next(t for t, cut in enumerate(cuts) if cut >= 0)
    found, asker = [first], first
    while True:
        edge = found[-1]
        end = min(edge + most, len(cuts))
        asking = [t for t in range(edge + least, end) if cuts[t] == 1 and t > asker]
        if not asking:
            if edge + most >= len(cuts):
                return found
            found.append(edge + most)
            asker = edge + most
            continue
        asker = asking[0]
        half = (asker - edge) // 2
        if asker == edge + least:
            found.append(asker)
            continue
        if asker + half > len(cuts):
            return found
        around = list(range(max(edge - half, first), asker + half))
        a = keys[around] @ keys[around].T
        scores = {
            t: round(quality(a)[around.index(t)].item(), 5) for t in range(edge + least, asker + 1)
        }
        found.append(max(scores, key=lambda t: (scores[t], t)))
