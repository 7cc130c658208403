"""The controls of a reading model: silenced, shuffled under padding, carried over from another
text."""

from __future__ import annotations

import pytest
import torch
from contract.arms import every_memory, patched, window_alone
from contract.families import tokens
from contract.runs import in_pieces, left_padded, one_pass, positions_of, states
from tolerances import REORDERED, WRONG

from memretrofit.errors import StateError
from memretrofit.patching.controls import memory_silenced, state_carried, state_shuffled


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@every_memory
def test_silenced_is_the_window_method_bit_for_bit(arm):
    model, window = patched("llama", arm), window_alone("llama", arm)
    ids, mask = left_padded([tokens(1, 30)[0], tokens(1, 24, seed=1)[0]])
    with memory_silenced(model):
        quiet, _ = in_pieces(model, ids, [13, 14, 25], mask=mask)
        text = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    expected, _ = in_pieces(window, ids, [13, 14, 25], mask=mask)
    assert torch.equal(quiet, expected)
    assert torch.equal(
        text, window.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    )
    loud, _ = in_pieces(model, ids, [13, 14, 25], mask=mask)
    assert apart(loud, quiet) > WRONG  # witness: the memory says something


@every_memory
def test_a_shuffled_padded_row_reads_what_its_neighbour_wrote(arm):
    """One layer, so that the state depends on the tokens alone: a row whose neighbour has the same
    text reads its own; padding of the neighbour's is never in what it reads."""
    model = patched("llama", arm, layers=1)
    own, other = tokens(1, 30)[0], tokens(1, 25, seed=1)[0]
    ids, mask = left_padded([own, other])
    real = mask.bool()
    with state_shuffled(model):
        shuffled = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
        pieces, _ = in_pieces(model, ids, [11, 12, 27], mask=mask)
        noisy = one_pass(
            model,
            torch.where(real, ids, 7),
            attention_mask=mask,
            position_ids=positions_of(mask),
        )
        twice, twice_mask = left_padded([own, own], extra=3)
        same = one_pass(
            model, twice, attention_mask=twice_mask, position_ids=positions_of(twice_mask)
        )
    plain = one_pass(model, own[None])
    assert apart(shuffled[real], pieces[real]) < REORDERED
    assert apart(shuffled[real], noisy[real]) < REORDERED
    assert apart(same[:1, 3:], plain) < REORDERED
    assert apart(shuffled[:1], plain) > WRONG


@every_memory
def test_a_carried_state_is_folded_on_and_leaves_its_cache_alone(arm):
    model = patched("llama", arm, layers=1)
    first, second = tokens(2, 30), tokens(2, 30, seed=1)
    _, left = in_pieces(model, first, [9, 20])
    before = [x.clone() for x in states(left)]
    with state_carried(model, left):
        carried, cache = in_pieces(model, second, [9, 20])
        whole, _ = in_pieces(model, second, [])
    plain, fresh = in_pieces(model, second, [9, 20])
    assert all(torch.equal(a, b) for a, b in zip(before, states(left), strict=True))
    assert apart(carried, whole) < REORDERED
    assert apart(carried[:, 0], plain[:, 0]) > WRONG  # read from the first token on
    for one, other in zip(states(fresh), states(cache), strict=True):
        assert other.shape[-2] >= one.shape[-2]


@torch.no_grad()
def test_carried_over_a_sum_of_features_both_texts_add_up():
    """LoLCATs' state has no decay: what two texts leave is the sum of what each leaves."""
    model = patched("llama", "lolcats", layers=1)
    first, second = tokens(2, 30), tokens(2, 30, seed=1)
    one = in_pieces(model, first, [])[1].layers[0].state
    two = in_pieces(model, second, [])[1]
    with state_carried(model, in_pieces(model, first, [])[1]):
        both = in_pieces(model, second, [])[1].layers[0].state
    for a, b, c in zip(one, two.layers[0].state, both, strict=True):
        assert apart(a + b, c) < REORDERED * c.abs().max().item()
        assert apart(b, c) > WRONG  # witness: nothing carried


def test_controls_that_cannot_mean_anything_are_refused():
    model = patched("llama", "ahn")
    with state_shuffled(model), pytest.raises(StateError, match="at least two"):
        one_pass(model, tokens(1, 30))
    other = patched("llama", "ahn")
    _, foreign = in_pieces(other, tokens(1, 30), [])
    with state_carried(model, foreign), pytest.raises(StateError, match="this model filled"):
        in_pieces(model, tokens(1, 30), [])
