"""Modes against three tokens by hand, the definition, and the two limits of the threshold."""

from __future__ import annotations

import pytest
import torch
from ops.rule_cases import difference

from memretrofit.ops.consolidate import (
    PIECE,
    Modes,
    consolidate,
    recurrent_consolidate,
    versions_seen,
)

BATCH, GROUPS, KEY, VALUE = 2, 3, 5, 4
EXACT = 1e-12
every_form = pytest.mark.parametrize("form", [recurrent_consolidate, consolidate])


def empty(count: int, *, batch: int = BATCH, groups: int = GROUPS, width: int = KEY + VALUE):
    zeros = torch.zeros(batch, groups, count, dtype=torch.float64)
    return Modes(zeros[..., None].expand(-1, -1, -1, width).clone(), zeros, zeros.clone())


def drawn(time: int, seed: int = 0, silent: float = 0.2):
    """Keys around one direction, as those of a pretrained model are; and who writes."""
    make = torch.Generator().manual_seed(seed)
    key = 0.5 + torch.randn(BATCH, GROUPS, time, KEY, generator=make, dtype=torch.float64)
    value = torch.randn(BATCH, GROUPS, time, VALUE, generator=make, dtype=torch.float64)
    return key, value, torch.rand(BATCH, time, generator=make) > silent


@every_form
def test_four_tokens_by_hand(form):
    """The second resembles the first (cos 0.8), the third nothing and the fourth neither: it takes
    the place of the mode that was written longest ago, the first."""
    key = torch.tensor([[1.0, 0], [0.8, 0.6], [0, -2.0], [-1.0, 0]], dtype=torch.float64)
    value = torch.tensor([[10.0], [20.0], [30.0], [40.0]], dtype=torch.float64)
    writes = torch.ones(1, 4, dtype=torch.bool)
    start = empty(2, batch=1, groups=1, width=3)
    written, modes = form(key[None, None], value[None, None], writes, start, 0.75)
    assert written.modes[0, 0].tolist() == [0, 0, 1, 0]
    expected = [[1.0, 0, 10], [0.9, 0.3, 15], [0, -2.0, 30], [-1.0, 0, 40]]
    assert torch.equal(written.pairs[0, 0], torch.tensor(expected, dtype=torch.float64))
    assert modes.pairs[0, 0].tolist() == [expected[3], expected[2]]
    assert modes.counts[0, 0].tolist() == [1, 1]
    assert modes.ages[0, 0].tolist() == [0, 1]
    strict, _ = form(key[None, None], value[None, None], writes, start, 0.85)
    assert strict.modes[0, 0].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("threshold", [-2.0, 0.5, 0.9, 2.0])
@pytest.mark.parametrize("time", [1, PIECE - 1, 2 * PIECE + 3])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_pieces_are_the_definition(threshold, time, count):
    """Choices, versions, state and gradients, from a state that is partly filled."""
    _, start = recurrent_consolidate(*drawn(9, seed=1), empty(count), threshold)
    results = []
    for form in (recurrent_consolidate, consolidate):
        key, value, writes = drawn(time)
        leaves = [key.requires_grad_(), value.requires_grad_(), start.pairs.clone()]
        leaves[2].requires_grad_()
        written, modes = form(key, value, writes, start._replace(pairs=leaves[2]), threshold)
        shown = written.pairs * (written.modes >= 0)[..., None]
        ((shown**2).sum() + (modes.pairs**3).sum()).backward()
        results.append((written.modes, shown, modes, [x.grad for x in leaves]))
    (one, shown_one, state_one, grads_one), (two, shown_two, state_two, grads_two) = results
    assert torch.equal(one, two)
    for a, b in zip(
        (shown_two, *state_two, *grads_two), (shown_one, *state_one, *grads_one), strict=True
    ):
        assert difference(a, b) < EXACT
    assert difference(shown_two, shown_one.roll(1, 2)) > EXACT or time == 1


@every_form
def test_any_split_is_one_pass(form):
    key, value, writes = drawn(2 * PIECE)
    whole, end = form(key, value, writes, empty(6), 0.8)
    state, parts, begin = empty(6), [], 0
    for stop in (1, 2, PIECE - 1, PIECE + 5, 2 * PIECE):
        cut = slice(begin, stop)
        part, state = form(key[:, :, cut], value[:, :, cut], writes[:, cut], state, 0.8)
        parts.append(part.modes)
        begin = stop
    assert torch.equal(torch.cat(parts, 2), whole.modes)
    assert all(difference(a, b) < EXACT for a, b in zip(state, end, strict=True))


def test_a_token_that_does_not_write_leaves_no_trace():
    """And a state that is handed in stays as it is."""
    key, value, writes = drawn(40)
    start = empty(6)
    _, state = consolidate(key, value, writes, start, 0.8)
    assert all((x == 0).all() for x in start)
    for row in range(BATCH):
        kept = writes[row]
        own = key[row : row + 1, :, kept], value[row : row + 1, :, kept]
        every = torch.ones(1, int(kept.sum()), dtype=torch.bool)
        _, alone = consolidate(*own, every, empty(6, batch=1), 0.8)
        for a, b in zip(alone, state, strict=True):
            assert difference(a[0], b[row]) < EXACT
    before = [x.clone() for x in state]
    consolidate(key, value, writes, state, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))


def test_above_one_nothing_merges_and_the_last_tokens_are_kept():
    """R > 1: a ring buffer."""
    key, value, writes = drawn(50, silent=0.0)
    written, modes = consolidate(key, value, writes, empty(8), 1.5)
    places = (torch.arange(50) % 8).expand(BATCH, GROUPS, -1)
    assert torch.equal(written.modes, places)
    for t in range(42, 50):
        pair = torch.cat([key[:, :, t], value[:, :, t]], -1)
        assert torch.equal(modes.pairs[:, :, t % 8], pair)
    assert (modes.counts == 1).all()


def test_at_minus_one_everything_is_one_mean_in_any_order():
    """R <= -1, keys that point both ways included; the other modes stay empty."""
    key, value, writes = drawn(50, silent=0.0)
    key[:, :, ::3] *= -1
    pairs = torch.cat([key, value], -1)
    for order in (torch.arange(50), torch.randperm(50)):
        _, modes = consolidate(key[:, :, order], value[:, :, order], writes, empty(8), -1.0)
        assert difference(modes.pairs[:, :, 0], pairs.mean(2)) < EXACT
        assert (modes.counts[:, :, 0] == 50).all()
        assert (modes.counts[:, :, 1:] == 0).all()
        assert difference(modes.pairs[:, :, 0], pairs[:, :, 1:].mean(2)) > EXACT


def test_counts_are_the_tokens_that_are_still_in_a_mode():
    """With room for all, every token is in one mode, and the means are those of their tokens."""
    key, value, writes = drawn(60)
    written, modes = consolidate(key, value, writes, empty(60), 0.7)
    assert torch.equal(modes.counts.sum(-1), writes.sum(-1)[:, None].expand(-1, GROUPS).double())
    assert (modes.counts > 1).any()
    pairs = torch.cat([key, value], -1)
    for row in range(BATCH):
        for head in range(GROUPS):
            for m in range(int((modes.counts[row, head] > 0).sum())):
                members = pairs[row, head, written.modes[row, head] == m]
                assert difference(modes.pairs[row, head, m], members.mean(0)) < EXACT


@pytest.mark.parametrize("threshold", [0.6, 2.0])
def test_the_versions_seen_are_the_modes_at_that_token(threshold):
    """After each token: the same set of pairs as in the state of the definition."""
    key, value, writes = drawn(30)
    _, start = recurrent_consolidate(*drawn(4, seed=1), empty(5), threshold)
    written, _ = consolidate(key, value, writes, start, threshold)
    seen = versions_seen(start, written)
    versions = torch.cat([start.pairs, written.pairs], dim=2)
    for t in range(30):
        _, state = recurrent_consolidate(
            key[:, :, : t + 1], value[:, :, : t + 1], writes[:, : t + 1], start, threshold
        )
        for row in range(BATCH):
            for head in range(GROUPS):
                found = versions[row, head, seen[row, head, t]]
                expected = state.pairs[row, head, state.counts[row, head] > 0]
                assert found.shape == expected.shape
                apart = torch.cdist(found, expected)
                assert apart.min(0).values.max() < 1e-6 > apart.min(1).values.max()
