"""I3 to I6: one pass equals any split of it, with and without padding, in any batch."""

from __future__ import annotations

import pytest
import torch
from contract.arms import EXACT, SINKS, WINDOW, every_arm, every_live, patched
from contract.families import tokens
from contract.runs import apart, in_pieces, left_padded, one_pass, positions_of, states
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import REORDERED, WRONG
from torch.nn import functional as F

LENGTH = 40
ends = st.lists(st.integers(1, LENGTH - 1), max_size=8, unique=True).map(sorted)


@every_live
def test_token_by_token_is_one_pass(family, arm):
    """I5, and I4 for each number of decode steps that touches the border of the window."""
    model, ids = patched(family, arm), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    stepped, cache = in_pieces(model, ids, range(1, LENGTH))
    assert apart(stepped, expected) < REORDERED
    for steps in (1, WINDOW - 1, WINDOW, WINDOW + 3, LENGTH - EXACT, LENGTH - EXACT - 1):
        found, split = in_pieces(model, ids, range(LENGTH - steps, LENGTH))
        assert apart(found, expected) < REORDERED
        for one, other in zip(states(split), states(cache), strict=True):
            assert apart(one, other) < REORDERED


@given(ends=ends)
@example(ends=[EXACT])
@example(ends=[EXACT + 1, EXACT + 2])
@example(ends=[WINDOW, WINDOW + 1])
@example(ends=[SINKS - 1, SINKS, SINKS + 1])
@every_arm
def test_any_split_is_one_pass(arm, ends):
    """I5. Forbids: a token folded twice or never when a chunk ends on, before or after the
    border."""
    model, ids = patched("llama", arm), tokens(2, LENGTH)
    assert apart(in_pieces(model, ids, ends)[0], one_pass(model, ids)) < REORDERED


@every_arm
def test_the_tolerance_of_splits_rejects_a_lost_token(arm):
    """Witness: the second piece starts one token late, and the rest is the same."""
    model, ids = patched("llama", arm), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    shorter = torch.cat([ids[:, :20], ids[:, 21:]], dim=1)
    found, _ = in_pieces(model, shorter, [20])
    assert apart(found[:, 25:], expected[:, 26:]) > WRONG


@every_arm
def test_long_pieces_are_one_pass(arm):
    """Pieces longer than a block of queries (128), and shorter ones after it."""
    model, ids = patched("llama", arm), tokens(1, 220)
    expected = one_pass(model, ids)
    for cuts in ([150], [20, 170], [129, 130, 131]):
        assert apart(in_pieces(model, ids, cuts)[0], expected) < REORDERED


@given(
    lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=3),
    extra=st.integers(0, 14),
    ends=ends,
)
@example(lengths=[LENGTH, 29], extra=3, ends=[5, 9, 10, 11, 12, 13, 25])
@example(lengths=[2, 30], extra=0, ends=[28, 29, 30])  # one row has no sinks while the other folds
@example(lengths=[1, 1], extra=14, ends=[14])
@every_arm
def test_left_padding_and_neighbours_do_not_matter(arm, lengths, extra, ends):
    """I6. Each row of a padded batch, in one pass and in pieces, is that row alone. The pads
    hold a real token id."""
    model = patched("llama", arm)
    rows = [tokens(1, length, seed=n)[0] for n, length in enumerate(lengths)]
    ids, mask = left_padded(rows, extra=extra)
    whole = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    pieces, _ = in_pieces(model, ids, ends, mask=mask)
    for n, row in enumerate(rows):
        alone = one_pass(model, row[None])[0]
        assert apart(whole[n, -len(row) :], alone) < REORDERED
        assert apart(pieces[n, -len(row) :], alone) < REORDERED


@every_live
def test_padded_rows_are_rows_alone_in_every_family(family, arm):
    model = patched(family, arm)
    rows = [tokens(1, length, seed=n)[0] for n, length in enumerate((33, 27, 12))]
    ids, mask = left_padded(rows, extra=2)
    whole = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    pieces, _ = in_pieces(model, ids, (13, 14, 20), mask=mask)
    for n, row in enumerate(rows):
        alone = one_pass(model, row[None])[0]
        assert apart(whole[n, -len(row) :], alone) < REORDERED
        assert apart(pieces[n, -len(row) :], alone) < REORDERED


@every_arm
def test_the_tolerance_of_padding_rejects_a_mask_that_is_off_by_one(arm):
    """Witness: one pad counts as a token."""
    model, row = patched("llama", arm), tokens(1, 30)[0]
    ids, mask = left_padded([row], extra=4)
    mask[0, 3] = 1
    found = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    assert apart(found[0, -10:], one_pass(model, row[None])[0, -10:]) > WRONG


@every_arm
def test_right_padding_does_not_reach_real_tokens(arm):
    """Training batches pad on the right."""
    model, row = patched("llama", arm), tokens(1, 30)[0]
    ids = torch.cat([row, row.new_full((9,), 7)])[None]
    mask = (torch.arange(39) < 30).long()[None]
    found = one_pass(model, ids, attention_mask=mask)
    assert apart(found[0, :30], one_pass(model, row[None])[0]) < REORDERED


@every_arm
def test_a_padded_row_keeps_its_state_while_neighbours_fold(arm):
    """The state of a row alone is its state in a padded batch."""
    model = patched("llama", arm)
    rows = [tokens(1, length, seed=n)[0] for n, length in enumerate((35, 18))]
    ids, mask = left_padded(rows)
    _, cache = in_pieces(model, ids, (10, 20), mask=mask)
    for n, row in enumerate(rows):
        _, alone = in_pieces(model, row[None], (7, 16))
        for together, single in zip(states(cache), states(alone), strict=True):
            if together.shape[1:] != single.shape[1:]:  # a store's row is as long as its tokens
                single = F.pad(single, (0, 0, 0, together.shape[2] - single.shape[2]))
            assert apart(together[n], single[0]) < REORDERED


@pytest.mark.parametrize("pad", [0, 5])
@every_arm
def test_a_conversation_continues_where_it_stopped(arm, pad):
    """Multi-turn: generate, then more text on the returned cache, equals one pass over all of
    it."""
    model = patched("llama", arm)
    ids, mask = left_padded([tokens(1, 20)[0]], extra=pad)
    turn = model.generate(
        ids, attention_mask=mask, max_new_tokens=9, do_sample=False, return_dict_in_generate=True
    )
    spoken, more = turn.sequences, tokens(1, 6, seed=9)
    everything = torch.cat([spoken, more], dim=1)
    mask = torch.cat([mask, mask.new_ones(1, everything.shape[1] - mask.shape[1])], dim=1)
    seen = turn.past_key_values.get_seq_length()
    with torch.no_grad():
        found = model(
            everything[:, seen:],
            attention_mask=mask,
            position_ids=positions_of(mask)[:, seen:],
            past_key_values=turn.past_key_values,
        ).logits
    expected = one_pass(model, everything[:, pad:])
    assert apart(found, expected[:, -found.shape[1] :]) < REORDERED
