"""One forward equals any split of it, and a row of a padded batch equals that row alone: logits and
what is carried."""

from __future__ import annotations

import pytest
import torch
from contract.families import tokens
from contract.runs import apart, in_pieces, left_padded, one_pass, positions_of
from contract.segment_arms import (
    LENGTH,
    SEGMENT,
    differ,
    every_arm,
    every_live,
    held,
    reading,
    segment_of,
    session,
    text,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import REORDERED, WRONG

EXACT = 1e-8
"""The same sums in another order, float64."""
ends = st.lists(st.integers(1, LENGTH - 1), max_size=6, unique=True).map(sorted)


@every_live
def test_token_by_token_is_one_forward(family, arm):
    model, ids = reading(family, arm), text(arm)
    expected, whole = in_pieces(model, ids, [])
    found, split = in_pieces(model, ids, range(1, LENGTH))
    assert apart(found, expected) < REORDERED
    assert apart(one_pass(model, ids), expected) < REORDERED
    assert differ(held(split), held(whole)) < REORDERED


@settings(max_examples=6)
@given(ends=ends)
@example(ends=[SEGMENT])
@example(ends=[SEGMENT - 1, SEGMENT + 1])
@example(ends=[3, 2 * SEGMENT, 3 * SEGMENT])
@every_arm
def test_any_split_is_one_forward(arm, ends):
    """Forbids: a segment that ends with a call, or a write that is made twice or never."""
    model, ids = reading("llama", arm), text(arm)
    expected, whole = in_pieces(model, ids, [])
    found, split = in_pieces(model, ids, ends)
    assert apart(found, expected) < REORDERED
    assert differ(held(split), held(whole)) < REORDERED


@every_arm
def test_the_tolerance_of_splits_rejects_a_lost_token(arm):
    """Witness: one token of a segment is another, and the next reads another state."""
    model, ids, last = reading("llama", arm), text(arm), 3 * segment_of(arm) - 1
    other = ids.clone()
    other[:, last] = other[:, last] % 100 + 1
    (expected, whole), (found, split) = (in_pieces(model, x, []) for x in (ids, other))
    assert apart(found[:, last + 1 :], expected[:, last + 1 :]) > WRONG
    assert differ(held(split), held(whole)) > WRONG


@settings(max_examples=5)
@given(
    lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=3),
    extra=st.integers(0, 5),
    ends=ends,
)
@example(lengths=[LENGTH, 29], extra=3, ends=[5, 9, 10, 11, 25])
@example(lengths=[2, 30, 13], extra=0, ends=[28, 29])
@example(lengths=[16, 8], extra=0, ends=[8])
@every_arm
def test_left_padding_and_neighbours_do_not_matter(arm, lengths, extra, ends):
    """In one forward and in pieces. The padding holds a real token's id."""
    model = reading("llama", arm)
    rows = [tokens(1, length, seed=n)[0] for n, length in enumerate(lengths)]
    ids, mask = left_padded(rows, extra=extra)
    whole = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    pieces, cache = in_pieces(model, ids, ends, mask=mask)
    for n, row in enumerate(rows):
        alone, its = in_pieces(model, row[None], [])
        assert apart(whole[n, -len(row) :], alone[0]) < REORDERED
        assert apart(pieces[n, -len(row) :], alone[0]) < REORDERED
        own = {name: x[n : n + 1] for name, x in held(cache).items()}
        assert differ(own, held(its)) < REORDERED


@every_live
def test_padded_rows_are_rows_alone_in_every_family(family, arm):
    model = reading(family, arm)
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
    """Witness: one pad counts as a token, and every border of the row moves."""
    model, row = reading("llama", arm), tokens(1, 30)[0]
    ids, mask = left_padded([row], extra=4)
    mask[0, 3] = 1
    found = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    assert apart(found[0, -10:], one_pass(model, row[None])[0, -10:]) > WRONG


@every_arm
def test_right_padding_does_not_reach_real_tokens(arm):
    """Training batches pad on the right: the state, too, is that of the row's own tokens."""
    model = reading("llama", arm)
    rows = [tokens(1, length, seed=n)[0] for n, length in enumerate((LENGTH, 29, 16))]
    ids = torch.stack([torch.cat([row, row.new_full((LENGTH - len(row),), 7)]) for row in rows])
    mask = torch.stack([(torch.arange(LENGTH) < len(row)).long() for row in rows])
    with torch.no_grad():
        output = model(ids, attention_mask=mask, use_cache=True)
    for n, row in enumerate(rows):
        alone, its = in_pieces(model, row[None], [])
        assert apart(output.logits[n, : len(row)], alone[0]) < REORDERED
        own = {name: x[n : n + 1] for name, x in held(output.past_key_values).items()}
        assert differ(own, held(its)) < REORDERED


@every_arm
def test_padding_in_the_middle_is_not_there(arm):
    """A batch of turns: the second turn of a shorter row is padded too, in front or behind."""
    model = reading("llama", arm)
    turns = [tokens(2, 11), tokens(2, 12, seed=1)]
    ids, mask = torch.cat(turns, dim=1), torch.ones(2, 23, dtype=torch.long)
    mask[0, :2] = mask[0, 11:15] = mask[1, 8:11] = mask[1, 20:] = 0
    found, cache = in_pieces(model, ids, [11], mask=mask)
    for n in range(2):
        real = mask[n].bool()
        alone, its = in_pieces(model, ids[n : n + 1, real], [])
        assert apart(found[n, real], alone[0]) < REORDERED
        own = {name: x[n : n + 1] for name, x in held(cache).items()}
        assert differ(own, held(its)) < REORDERED


@every_arm
def test_long_texts_in_long_and_short_calls(arm):
    """float64, which GPT-NeoX keeps throughout: over many segments a last bit grows."""
    model = reading("gpt_neox", arm, dtype=torch.float64)
    ids = tokens(1, 12 * segment_of(arm) + 1, seed=5)
    expected, whole = in_pieces(model, ids, [])
    for cuts in ([segment_of(arm) * 7], [1, 2 * segment_of(arm) + 1]):
        found, split = in_pieces(model, ids, cuts)
        assert apart(found, expected) < EXACT
        assert differ(held(split), held(whole)) < EXACT
    assert session(whole).seen == ids.shape[1]


@pytest.mark.parametrize("pad", [0, 3])
@every_arm
def test_a_conversation_continues_where_it_stopped(arm, pad):
    """Generate, then more text on the returned cache, equals one forward over all of it."""
    model = reading("llama", arm)
    ids, mask = left_padded([tokens(1, 14)[0], tokens(1, 11, seed=1)[0]], extra=pad)
    turn = model.generate(
        ids, attention_mask=mask, max_new_tokens=9, do_sample=False, return_dict_in_generate=True
    )
    everything = torch.cat([turn.sequences, tokens(2, 6, seed=9)], dim=1)
    mask = torch.cat([mask, mask.new_ones(2, everything.shape[1] - mask.shape[1])], dim=1)
    seen = turn.past_key_values.get_seq_length()
    with torch.no_grad():
        found = model(
            everything[:, seen:], attention_mask=mask, past_key_values=turn.past_key_values
        ).logits
    expected = one_pass(model, everything, attention_mask=mask)
    assert apart(found, expected[:, seen:]) < REORDERED
