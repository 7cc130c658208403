"""A route that the user pins: what each row reads, for the whole of its conversation."""

from __future__ import annotations

import pytest
import torch
from contract.bank_arms import ARMS, EXAMPLES, banked
from contract.families import build
from contract.runs import apart, in_pieces, one_pass
from tolerances import REORDERED, WRONG

from memretrofit import WindowSinksConfig, patch
from memretrofit.errors import ConfigError, StateError
from memretrofit.patching.controls import route_pinned, window_override, writes_disabled

ROWS = torch.stack(EXAMPLES[:2])
every_routed = pytest.mark.parametrize(
    "arm", [arm for arm, config in ARMS.items() if hasattr(config, "branching")]
)
ROUTES = torch.tensor([[0, 0], [1, 1]])
"""One for each row; the small trees have two levels of two."""


@every_routed
def test_a_pinned_row_reads_there_whatever_its_text(arm):
    """Two rows of one text differ by their routes alone; -1 is the base model, bit for bit."""
    model = banked("llama", arm)
    twice = ROWS[:1].expand(2, -1)
    with route_pinned(model, ROUTES):
        both = one_pass(model, twice)
    assert apart(both[0], both[1]) > WRONG
    for row, route in enumerate(ROUTES):
        with route_pinned(model, route):
            assert torch.equal(one_pass(model, twice)[row], both[row])
    with route_pinned(model, torch.tensor([-1, -1])):
        assert not torch.equal(one_pass(model, twice), both)


@every_routed
def test_a_cache_whose_route_changed_is_refused(arm):
    """Its keys were computed with the rows of the route that it began with."""
    model = banked("llama", arm)
    with route_pinned(model, ROUTES):
        _, cache = in_pieces(model, ROWS[:, :10], [5])
        expected = one_pass(model, ROWS)
    for other in (ROUTES.flip(0), torch.tensor([0, 0])):
        with route_pinned(model, other), pytest.raises(StateError, match="under another route"):
            model(ROWS[:, 10:], past_key_values=cache)
    with pytest.raises(StateError, match="under another route"):
        model(ROWS[:, 10:], past_key_values=cache)
    with route_pinned(model, ROUTES), torch.no_grad():
        found = model(ROWS[:, 10:], past_key_values=cache).logits
    assert apart(found, expected[:, 10:]) < REORDERED


@every_routed
def test_routes_move_with_their_rows(arm):
    """Reordered rows keep their own route, and beams that of the row they began as."""
    model = banked("llama", arm)
    swap = torch.tensor([1, 0])
    with route_pinned(model, ROUTES):
        _, cache = in_pieces(model, ROWS[:, :10], [5])
        expected = one_pass(model, ROWS)
        options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
        beams = model.generate(ROWS[:, :10], **options)
    cache.reorder_cache(swap)
    with route_pinned(model, ROUTES[swap]), torch.no_grad():
        found = model(ROWS[swap, 10:], past_key_values=cache).logits
    assert apart(found, expected[swap, 10:]) < REORDERED
    for row, route in enumerate(ROUTES):
        with route_pinned(model, route):
            assert torch.equal(model.generate(ROWS[row : row + 1, :10], **options)[0], beams[row])


@pytest.mark.parametrize("arm", ["engram", "hierarchical_ffn"])
def test_switches_that_mean_nothing_are_refused(arm):
    """An arm of a report that silently is another arm would be a false control."""
    model = banked("llama", arm)
    idle = [writes_disabled(model), window_override(model, sliding_window=4, num_sink_tokens=1)]
    for context in idle:
        with pytest.raises(StateError, match="means nothing"), context:
            pass
    window = patch(build("llama"), WindowSinksConfig(sliding_window=8))
    with pytest.raises(StateError, match="means nothing"), route_pinned(window, ROUTES):
        pass
    if arm == "engram":
        with route_pinned(model, ROUTES), pytest.raises(StateError, match="has no routes"):
            one_pass(model, ROWS)


@every_routed
def test_routes_that_do_not_fit_are_refused(arm):
    model = banked("llama", arm)
    with route_pinned(model, ROUTES[[0, 1, 0]]), pytest.raises(StateError, match="3 routes"):
        one_pass(model, ROWS)
    for wrong in ([0, 0], torch.tensor(0), torch.tensor([0.5, 0.0]), torch.empty(0, 2).long()):
        with pytest.raises(ConfigError, match="route_pinned needs"):
            route_pinned(model, wrong)
    for route in ([0], [0, 2], [0, 0, 0]):
        with route_pinned(model, torch.tensor(route)), pytest.raises(StateError, match="branching"):
            one_pass(model, ROWS)
