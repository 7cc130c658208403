"""Where edges go: refinement worked by hand, and cuts at random that are as many as surprises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memretrofit.ops.segment import (
    coarse,
    conductance,
    modularity,
    places,
    reach,
    refine,
    resampled,
)

seeds = st.integers(0, 10**6)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Refinement


def topics(*sizes: int) -> torch.Tensor:
    """Similarities of tokens that are alike within a topic and have nothing in common otherwise."""
    topic = torch.cat([torch.full((size,), n) for n, size in enumerate(sizes)])
    return (topic[:, None] == topic).float()


def refined(asking, a, *, end=None, quality=modularity, least=2, most=8, slots=None):
    count = len(a)
    asks = [t in asking for t in range(count)]
    slots = list(range(count)) if slots is None else slots
    end = slots[-1] + 1 if end is None else end
    return refine(
        asks,
        slots,
        end,
        (0, 0),
        lambda i, j: a[i:j, i:j],
        quality,
        least=least,
        most=most,
    )


@pytest.mark.parametrize("quality", [modularity, lambda a: -conductance(a)])
def test_an_edge_moves_back_to_where_the_topic_changed(quality):
    """Asked for at 7, three tokens late: the window is 0 .. 9, the topics meet at 4. From there on
    7 has been used, and nothing asks before 12.
    """
    edges, known = refined({7}, topics(4, 9), quality=quality)
    assert edges == [(0, 0), (4, 7), (12, 12)]
    assert known == 13  # of the last event one token is there, and two are sure


def test_an_edge_stays_within_least_and_the_one_that_asked():
    """The topics meet outside of 3 .. 5."""
    assert refined({5}, topics(1, 12), least=3)[0][1] == (3, 5)
    assert refined({5}, topics(6, 7), least=3)[0][1] == (5, 5)


def test_one_cut_that_is_asked_for_makes_one_edge():
    """7 is more than `least` behind 4, yet does not ask again; 9 does, and goes back to 7."""
    assert refined({7}, topics(4, 3, 6))[0] == [(0, 0), (4, 7), (12, 12)]
    assert refined({7, 9}, topics(4, 3, 6))[0][:3] == [(0, 0), (4, 7), (7, 9)]


def test_what_decides_an_edge_must_have_been_read():
    """Asked for at 7, half of 7 is 3: decided once 9 has been read, and only two are known before.
    An edge without a choice, and one at `most`, wait for nothing.
    """
    a = topics(4, 9)
    assert refined({7}, a[:9, :9]) == ([(0, 0)], 2)
    assert refined({7}, a[:10, :10])[0] == [(0, 0), (4, 7)]
    assert refined({2}, a[:3, :3])[0] == [(0, 0), (2, 2)]
    assert refined(set(), a[:8, :8]) == ([(0, 0)], 8)
    assert refined(set(), a[:9, :9])[0] == [(0, 0), (8, 8)]
    assert reach(8) == 10  # asked for at 7 at the latest, and half of it behind that


def test_a_hole_ends_the_wait():
    """Slots 8 to 30 are padding: at slot 10 nothing more can decide, so what is there does; and an
    event that nobody asked to end goes on behind it.
    """
    a, slots = topics(4, 9), [*range(8), *range(31, 36)]
    assert refined({7}, a, slots=slots)[0][:2] == [(0, 0), (4, 7)]
    assert refined({7}, a[:8, :8], slots=slots[:8], end=9) == ([(0, 0)], 2)
    assert refined({7}, a[:8, :8], slots=slots[:8], end=10)[0] == [(0, 0), (4, 7)]
    assert refined({7}, a[:6, :6], slots=[*range(4), 31, 32], end=10) == ([(0, 0)], 6)


def test_qualities_that_differ_by_rounding_are_alike():
    """All tokens alike: sums in another order must not move the edge from where it was asked."""
    a = torch.ones(13, 13) + 1e-7 * torch.rand(13, 13, generator=drawn(0))
    assert refined({7}, (a + a.T) / 2)[0][1] == (7, 7)
    # witness: a difference that counts does
    assert refined({7}, torch.ones(13, 13) + topics(4, 9))[0][1] == (4, 7)


def test_scores_that_differ_by_rounding_are_alike():
    """One column of keys many times, by products of any shape; and 11 bits are kept."""
    query, key = torch.randn(1, 64, generator=drawn(1)), torch.randn(1, 64, generator=drawn(2))
    apart = 0
    for count in range(1, 60):
        scores = query @ key.expand(count, -1).contiguous().mT
        shuffled = (query.flip(-1) * key.flip(-1)).sum()
        found = coarse(torch.cat([scores[0], shuffled[None]]))
        assert (found == found[0]).all()
        apart += int((scores != shuffled).any())
    assert apart  # witness: the products themselves are not alike
    numbers = torch.tensor([1.0, 1 + 2.0**-10, 1 + 2.0**-13, -3.0e30, 0.0])
    assert coarse(numbers).tolist() == [1.0, 1 + 2.0**-10, 1.0, pytest.approx(-3.0e30, 1e-3), 0.0]


# Cuts at random


def cut_at_random(seed: int, rows: int = 2, time: int = 4000, window: int = 200):
    surprising = torch.rand(rows, time, generator=drawn(seed)) < 0.15
    surprising[:, time // 2 :] |= torch.rand(rows, time // 2, generator=drawn(seed + 1)) < 0.2
    ranks = torch.arange(time).expand(rows, -1)
    return surprising, resampled(surprising, ranks, window, surprising[:, :0])


def test_random_cuts_are_as_many_and_as_far_apart_as_surprises():
    """In both halves of a text whose second half surprises twice as often."""
    surprising, found = cut_at_random(0, rows=8)
    for half in (slice(400, 2000), slice(2400, 4000)):
        expected = surprising[:, half].float().mean()
        assert abs(found[:, half].float().mean() / expected - 1) < 0.1
    gone = torch.zeros(8, dtype=torch.long)
    members = torch.ones_like(found)
    sizes = [
        (found_places == 0).sum().item()
        for found_places in (
            places(x, members, gone, least=4, most=32) for x in (surprising, found)
        )
    ]
    assert abs(sizes[1] / sizes[0] - 1) < 0.05
    surprising, found = surprising[:, 400:2000].float(), found[:, 400:2000].float()
    both = (surprising * found).mean() / found.mean()
    assert abs(both / surprising.mean() - 1) < 0.1  # together as by chance


def test_random_cuts_are_drawn_once_per_place():
    """Rows whose surprises differ draw the same tokens; each draws one before it."""
    every = torch.ones(1, 50).bool()
    ranks = torch.arange(50)[None]
    found = resampled(every, ranks, 8, every[:, :0])
    assert found.tolist() == [[False] + [True] * 49]  # the first has none before it
    drawn_from = []
    for place in range(50):
        alone = torch.zeros(1, 50).bool()
        alone[0, place] = True
        drawn_from.append(resampled(alone, ranks, 8, alone[:, :0])[0].nonzero().flatten())
    hits = torch.cat(drawn_from).sort().values
    assert hits.tolist() == list(range(1, 50))  # each token has one source
    assert all(((t - n >= 1) & (t - n <= 8)).all() for n, t in enumerate(drawn_from))


@given(seed=seeds, window=st.integers(1, 20), cuts=st.lists(st.integers(1, 59), max_size=6))
def test_random_cuts_depend_on_no_split_and_no_padding(seed, window, cuts):
    surprising = torch.rand(2, 60, generator=drawn(seed)) < 0.4
    ranks = torch.arange(60).expand(2, -1) - torch.tensor([[0], [9]])
    surprising[1, :9] = False
    ranks = ranks.clamp(min=-1)
    whole = resampled(surprising, ranks, window, surprising[:, :0])
    begin, parts = 0, []
    for end in [*sorted(set(cuts)), 60]:
        history = surprising[:, max(begin - window, 0) : begin]
        part = slice(begin, end)
        parts.append(resampled(surprising[:, part], ranks[:, part], window, history))
        begin = end
    assert torch.equal(torch.cat(parts, dim=1), whole)
    alone = resampled(surprising[1:, 9:], torch.arange(51)[None], window, surprising[1:, :0])
    assert torch.equal(whole[1, 9:], alone[0])
