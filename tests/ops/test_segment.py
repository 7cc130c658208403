"""Segments: every vectorised rule against its definition, one token, edge or event at a time."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memretrofit.ops.segment import (
    LIMIT,
    STEP,
    best_cut,
    boundaries,
    choose_events,
    conductance,
    modularity,
    places,
    surprise,
)

NAN = math.nan
seeds = st.integers(0, 10**6)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Surprise and boundaries


def test_surprise_is_the_negative_log_of_what_was_predicted():
    """Two tokens with chances (1/2, 1/4, 1/4): ids 0 and 2 cost log 2 and log 4, in any dtype."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(1, 2, 3)
    expected = torch.tensor([[math.log(2), math.log(4)]])
    found = surprise(logits + 7.0, torch.tensor([[0, 2]]))
    assert torch.allclose(found, expected)
    half = surprise(logits.bfloat16(), torch.tensor([[0, 2]]))
    assert half.dtype == torch.float32
    assert torch.allclose(half, expected, atol=0.01)


def test_surprise_of_many_rows_is_that_of_each():
    logits, ids = torch.randn(2, 300, 11, generator=drawn(0)), torch.randint(11, (2, 300))
    expected = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    assert torch.allclose(surprise(logits, ids), expected, atol=1e-5)
    assert surprise(logits[:, :0], ids[:, :0]).shape == (2, 0)


def boundary_by_hand(surprises: list[float], window: int, gamma: float) -> list[bool]:
    """The rule for each t, with the standard deviation of a sample."""
    found = []
    for t, s in enumerate(surprises):
        before = [x for x in surprises[max(t - window, 0) : t] if not math.isnan(x)]
        if math.isnan(s) or len(before) < 2:
            found.append(False)
            continue
        found.append(s > statistics.mean(before) + gamma * statistics.stdev(before))
    return found


def test_boundaries_worked_by_hand():
    """Of (1, 3): mean 2, deviation sqrt 2. So 3.5 stands out at gamma 1 and 3.3 does not; the
    window (3, 3.5) then has mean 3.25 and deviation 0.354.
    """
    row = torch.tensor([[1.0, 3.0, 3.5, 3.7], [1.0, 3.0, 3.3, 3.0]])
    found = boundaries(row, window=2, gamma=1.0)
    assert found.tolist() == [[False, False, True, True], [False] * 4]
    # one surprise has no deviation: nothing stands out, however large
    assert not boundaries(torch.tensor([[NAN, 1.0, 100.0]]), window=4, gamma=1.0).any()


@given(seed=seeds, window=st.integers(1, 9), gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_boundaries_are_their_definition(seed, window, gamma):
    row = torch.rand(1, 40, generator=drawn(seed)) * 9
    row[torch.rand(1, 40, generator=drawn(seed + 1)) < 0.2] = NAN
    row = (row / STEP).round() * STEP  # sums of these are exact in the definition too
    expected = boundary_by_hand(row[0].double().tolist(), window, gamma)
    assert boundaries(row, window, gamma)[0].tolist() == expected
    assert boundary_by_hand(row[0].double().tolist(), window + 1, gamma) != expected or window > 1


@given(seed=seeds, window=st.integers(1, 12), cuts=st.lists(st.integers(1, 59), max_size=6))
def test_boundaries_do_not_depend_on_the_cut(seed, window, cuts):
    """Bit for bit, whatever the history holds beyond the window."""
    row = torch.randn(3, 60, generator=drawn(seed)).abs() * 5
    row[1, :7] = NAN
    whole = boundaries(row, window, 1.0)
    begin, parts = 0, []
    for end in [*sorted(set(cuts)), 60]:
        history = row[:, max(begin - window, 0) : begin]
        parts.append(boundaries(row[:, begin:end], window, 1.0, history))
        begin = end
    assert torch.equal(torch.cat(parts, dim=1), whole)
    short = boundaries(row[:, 30:], 12, 1.0, row[:, 19:30])
    assert short.shape == (3, 30)


def test_a_history_that_is_too_short_is_another_window():
    """Witness for the cut: one slot less of history moves a boundary."""
    row = torch.tensor([[9.0, 1.0, 1.0, 2.0]])
    whole = boundaries(row, window=3, gamma=1.0)[:, 3:]
    assert not whole.item()
    assert boundaries(row[:, 3:], 3, 1.0, row[:, 1:3]).item()


def test_padding_moves_no_boundary_of_its_row():
    row = torch.rand(1, 30, generator=drawn(3)) * 9
    padded = torch.cat([torch.full((1, 11), NAN), row], dim=1)
    assert torch.equal(boundaries(padded, 6, 1.0)[:, 11:], boundaries(row, 6, 1.0))


def test_surprises_beyond_the_limit_are_alike():
    """Infinite ones too: nothing overflows, nothing is NaN."""
    row = torch.tensor([[math.inf, 2 * LIMIT, LIMIT, LIMIT]]).repeat(1, 2000)
    assert not boundaries(row, window=2**15, gamma=0.0).any()


# Sizes of events


def places_by_hand(boundary, member, size, least, most):
    """The automaton of the module's docstring."""
    found = []
    for asked, real in zip(boundary, member, strict=True):
        if not real:
            found.append(-1)
            continue
        if size == 0 or size == most or (asked and size >= least):
            size = 0
        found.append(size)
        size += 1
    return found


def test_places_worked_by_hand():
    """Events of 2 to 4: a cut after one token waits, a long event is cut at four."""
    asked = torch.tensor([[0, 1, 1, 0, 0, 0, 0, 1, 1]]).bool()
    member = torch.ones_like(asked)
    found = places(asked, member, torch.tensor([0]), least=2, most=4)
    assert found.tolist() == [[0, 1, 0, 1, 2, 3, 0, 1, 0]]
    found = places(asked, member, torch.tensor([3]), least=2, most=4)
    assert found.tolist() == [[3, 0, 1, 2, 3, 0, 1, 0, 1]]


@given(
    seed=seeds,
    time=st.integers(0, 40),
    least=st.integers(1, 6),
    more=st.integers(0, 6),
    often=st.sampled_from([0.0, 0.2, 0.9]),
    held=st.lists(st.integers(0, 12), min_size=3, max_size=3),
)
@example(seed=0, time=33, least=1, more=0, often=0.0, held=[0, 1, 1])
def test_places_are_the_automaton(seed, time, least, more, often, held):
    """With gaps, for several rows, from any size of the open event."""
    most = least + more
    size = torch.tensor(held).clamp(max=most)
    asked = torch.rand(3, time, generator=drawn(seed)) < often
    member = torch.rand(3, time, generator=drawn(seed + 1)) < 0.8
    found = places(asked, member, size, least=least, most=most)
    for row in range(3):
        expected = places_by_hand(asked[row], member[row], int(size[row]), least, most)
        assert found[row].tolist() == expected


@given(seed=seeds, cut=st.integers(0, 30))
def test_places_go_on_where_they_stopped(seed, cut):
    asked = torch.rand(2, 30, generator=drawn(seed)) < 0.3
    member = torch.arange(30) >= torch.tensor([[0], [4]])
    none = torch.zeros(2, dtype=torch.long)
    whole = places(asked, member, none, least=2, most=7)
    size = none if cut == 0 else whole[:, cut - 1] + 1
    rest = places(asked[:, cut:], member[:, cut:], size, least=2, most=7)
    assert torch.equal(rest, whole[:, cut:])


def test_sizes_that_cannot_be_are_refused():
    flags, size = torch.zeros(1, 3).bool(), torch.zeros(1, dtype=torch.long)
    for least, most in ((0, 4), (5, 4)):
        with pytest.raises(ValueError, match="least"):
            places(flags, ~flags, size, least=least, most=most)


# Refinement


def modularity_by_hand(a: torch.Tensor, t: int) -> float:
    n, twice_m = len(a), a.sum().item()
    degree = a.sum(-1)
    total = sum(
        (a[i, j] - degree[i] * degree[j] / twice_m).item()
        for side in (range(t), range(t, n))
        for i in side
        for j in side
    )
    return total / (2 * twice_m)


def conductance_by_hand(a: torch.Tensor, t: int) -> float:
    smaller = min(a[:t, :t].sum().item(), a[t:, t:].sum().item())
    return a[:t, t:].sum().item() / smaller if smaller > 0 else math.inf


def two_blocks(first: int, second: int, across: float = 0.0) -> torch.Tensor:
    a = torch.full((first + second, first + second), across, dtype=torch.float64)
    a[:first, :first] = a[first:, first:] = 1.0
    return a


def test_quality_of_two_pairs_by_hand():
    """A of two blocks of two: 2m = 8, k = 2. At the edge Q = (8 - 2 * 16 / 8) / 16 = 1/4 and
    nothing is cut; one token off, Q = (1 + 5 - (4 + 36) / 8) / 16 = 1/16 and phi = 1 / 1.
    """
    a = two_blocks(2, 2)
    assert modularity(a).tolist() == [0.0, 1 / 16, 1 / 4, 1 / 16]
    assert conductance(a).tolist() == [math.inf, 1.0, 0.0, 1.0]


@given(seed=seeds, n=st.integers(2, 9))
def test_quality_is_its_definition(seed, n):
    keys = torch.randn(n, 4, generator=drawn(seed), dtype=torch.float64) + 0.5
    a = keys @ keys.mT
    for t in range(1, n):
        assert modularity(a)[t].item() == pytest.approx(modularity_by_hand(a, t), rel=1e-9)
        assert conductance(a)[t].item() == pytest.approx(conductance_by_hand(a, t), rel=1e-9)
    stacked = torch.stack([a, two_blocks(1, n - 1)])
    assert torch.equal(modularity(stacked)[0], modularity(a))
    assert torch.equal(conductance(stacked)[0], conductance(a))


@given(first=st.integers(1, 12), second=st.integers(1, 12), across=st.sampled_from([0.0, 0.1, 0.3]))
def test_two_blocks_are_cut_at_their_edge(first, second, across):
    """Both measures, exactly; with similarities between the blocks, for blocks of one size."""
    if across:
        first = second
    a = two_blocks(first, second, across)
    last = first + second - 1
    assert best_cut(modularity(a), 1, last).item() == first
    assert best_cut(-conductance(a), 1, last).item() == first


def test_an_edge_without_reason_to_move_stays():
    """All alike: every cut is as good, and the latest candidate is where surprise put it."""
    a = torch.zeros(6, 6)
    assert modularity(a).tolist() == [0.0] * 6
    assert best_cut(modularity(a), 2, 4).item() == 4


# Which events a query takes


def taken_by_hand(order, sizes, budget):
    taken, held = [], 0
    for n in order:
        if held >= budget or (
            held + sizes[n] > budget and held + sizes[n] - budget >= budget - held
        ):
            break
        taken.append(n)
        held += sizes[n]
    return taken


def choice_by_hand(scores, is_open, sizes, similar, near):
    order = sorted((n for n in range(len(scores)) if is_open[n]), key=lambda n: -scores[n])
    hits = taken_by_hand(order, sizes, similar)
    beside: list[int] = []
    for n in hits:
        for m in (n + 1, n - 1):
            if 0 <= m < len(scores) and is_open[m] and m not in hits and m not in beside:
                beside.append(m)
    return sorted(hits + taken_by_hand(beside, sizes, near))


def test_neighbours_worked_by_hand():
    """Events of 4 tokens, 8 for similarity: 5 and then 2; 12 for contiguity: 6 and 4, then 3."""
    scores = torch.tensor([0.0, 1.0, 8.0, 3.0, 2.0, 9.0, 0.5, 0.1])
    sizes = torch.full((8,), 4)
    found = choose_events(scores, torch.ones(8).bool(), sizes, similar=8, near=12, least=4)
    assert found.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


def test_the_nearest_fit_decides_at_the_border_of_the_budget():
    """8 of 10 tokens are taken: an event of 3 comes nearer (11), one of 4 (12) as near, which is no
    gain.
    """
    scores, every = torch.tensor([3.0, 2.0, 1.0]), torch.ones(3).bool()
    for size, expected in ((3, [True, True]), (4, [True, False])):
        sizes = torch.tensor([8, size, 2])
        found = choose_events(scores, every, sizes, similar=10, near=0, least=2)
        assert found[:2].tolist() == expected
        assert not found[2]  # nothing fills what an event left


@given(
    seed=seeds,
    count=st.integers(1, 12),
    similar=st.integers(1, 40),
    near=st.integers(0, 30),
)
def test_choices_are_their_definition(seed, count, similar, near):
    generator = drawn(seed)
    scores = torch.randn(2, 3, count, generator=generator)
    is_open = torch.rand(2, 1, count, generator=generator) < 0.7
    sizes = torch.randint(2, 9, (2, 1, count), generator=generator)
    found = choose_events(scores, is_open, sizes, similar=similar, near=near, least=2)
    for b in range(2):
        for c in range(3):
            expected = choice_by_hand(
                scores[b, c].tolist(), is_open[b, 0], sizes[b, 0].tolist(), similar, near
            )
            assert found[b, c].nonzero().flatten().tolist() == expected
