"""Which keys a query sees exactly."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memretrofit.ops import window_mask


def test_six_tokens_by_hand():
    """Window 2 on top of one sink: a query sees itself, the token before it, and token 0."""
    slots = torch.arange(6)
    expected = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 0, 1, 1, 0, 0],
            [1, 0, 0, 1, 1, 0],
            [1, 0, 0, 0, 1, 1],
        ]
    ).bool()
    assert torch.equal(window_mask(slots, slots, 2, 1), expected[None, None])
    # Witnesses: a window one wider, and a sink that counts as part of the window.
    assert not torch.equal(window_mask(slots, slots, 3, 1), expected[None, None])
    assert not torch.equal(window_mask(slots, slots, 1, 1), expected[None, None])


@given(
    pads=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    window=st.integers(0, 8),
    sinks=st.integers(0, 5),
    start=st.integers(0, 12),
    length=st.integers(0, 13),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_real_past_token_is_seen_or_carried(pads, window, sinks, start, length):
    """The partition that memories rely on, for any block of queries and any left padding.

    A real token s ≤ t is a sink, or fewer than `window` tokens back, or has left; only the
    first two are seen, and nothing else is.
    """
    slots = torch.arange(13)
    rank = torch.stack([(slots - pad).clamp(min=-1) for pad in pads])
    queries = slots[start : start + length]
    mask = window_mask(queries, slots, window, sinks, rank)
    assert mask.shape == (len(pads), 1, len(queries), 13)
    assert mask.dtype == torch.bool
    for b, pad in enumerate(pads):
        for i, t in enumerate(queries.tolist()):
            seen = {s for s in range(13) if mask[b, 0, i, s]}
            past = set(range(pad, t + 1))
            left = {s for s in past if s <= t - window and s - pad >= sinks}
            assert seen.isdisjoint(left)
            assert seen | left == past


def test_padding_moves_nothing():
    """A row padded by 4 sees what the unpadded row sees, 4 slots later."""
    slots = torch.arange(10)
    plain = window_mask(slots, slots, 3, 2)
    longer = torch.arange(14)
    padded = window_mask(longer, longer, 3, 2, (longer - 4).clamp(min=-1)[None])
    assert torch.equal(padded[..., 4:, 4:], plain)
    assert not padded[..., :4].any()
    assert not torch.equal(window_mask(longer, longer, 3, 2)[..., 4:, 4:], plain)  # pads as sinks


def test_without_ranks_slots_are_ranks():
    slots = torch.arange(8)
    assert torch.equal(
        window_mask(slots, slots, 3, 2), window_mask(slots, slots, 3, 2, slots[None])
    )
