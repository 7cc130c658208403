"""What a query sees exactly: the first tokens of its row (sinks) and the latest ones (window).

Slots count places in the (padded) sequence, ranks count the real tokens of a row::

    visible(t, s)  ⇔  rank_s ≥ 0  and  s ≤ t  and  (t − s < window  or  rank_s < sinks)

so a query sees itself and window − 1 tokens before it, and the sinks on top of these. What it does
not see is {s : sinks ≤ rank_s, s ≤ t − window}: exactly what a memory has to carry.
"""

from __future__ import annotations

from torch import Tensor


def window_mask(
    query_slots: Tensor, key_slots: Tensor, window: int, sinks: int, rank: Tensor | None = None
) -> Tensor:
    """True where a query sees a key: [B, 1, C, S], or [1, 1, C, S] without `rank`.

    `query_slots` [C] and `key_slots` [S] are integers. `rank` [B, S] is the index of each key among
    the real tokens of its row, -1 for padding; None means that no row has padding: rank = slot.
    """
    distance = query_slots[:, None] - key_slots[None, :]  # [C, S]
    rank = key_slots[None] if rank is None else rank
    sink = (rank < sinks)[:, None, None, :]
    real = (rank >= 0)[:, None, None, :]
    seen: Tensor = real & (distance >= 0) & ((distance < window) | sink)
    return seen
