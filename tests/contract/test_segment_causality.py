"""Rule 4 for what is carried: a token changes nothing before it, and no other row of its batch."""

from __future__ import annotations

import torch
from contract.families import build, tokens
from contract.runs import apart, left_padded, one_pass
from contract.segment_arms import every_arm, every_live, reading, segment_of, text
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tolerances import REORDERED, WRONG

from memretrofit import patch
from memretrofit.methods.hmt import HMTConfig
from memretrofit.modules.segment_memory import Opening, Past
from memretrofit.patching.segment_visit import segment_ledger_of


def changed(ids: torch.Tensor, place: int) -> torch.Tensor:
    other = ids.clone()
    other[0, place] = other[0, place] % 100 + 1
    return other


@settings(max_examples=6)
@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
@example(share=0.2)
@example(share=0.5)
@every_arm
def test_a_token_changes_nothing_before_it(arm, share):
    """To the bit; and it changes what comes after it, to the end of the segment at least."""
    model, ids = reading("llama", arm), text(arm)
    place = int(share * ids.shape[1])
    before, after = one_pass(model, ids), one_pass(model, changed(ids, place))
    assert torch.equal(before[0, :place], after[0, :place])
    assert apart(before[0, place], after[0, place]) > WRONG
    assert torch.equal(before[1], after[1])  # the other row


@every_live
def test_every_place_in_every_family(family, arm):
    """Experts multiply what chose them together: to the last bits there."""
    model, ids, size = reading(family, arm), text(arm), segment_of(arm)
    before = one_pass(model, ids)
    for place in (1, size - 1, size, size + size // 2, 3 * size):
        after = one_pass(model, changed(ids, place))
        assert apart(before[0, :place], after[0, :place]) < REORDERED
        assert apart(before[0, place:], after[0, place:]) > WRONG


@every_arm
def test_the_first_token_is_heard_in_the_next_segment(arm):
    """Else nothing would be carried of a text, only of memory tokens. One whose segment keeps its
    last tokens alone hears it through them."""
    model, ids, size = reading("llama", arm), text(arm), segment_of(arm)
    before, after = one_pass(model, ids), one_pass(model, changed(ids, 0))
    assert apart(before[0, size : 2 * size], after[0, size : 2 * size]) > WRONG


@every_arm
def test_a_token_of_a_neighbour_changes_nothing(arm):
    """Rows whose segments end at different tokens are read in the same forwards."""
    model = reading("llama", arm)
    rows = [tokens(1, n, seed=n)[0] for n in (4 * segment_of(arm) + 3, 3 * segment_of(arm) + 1)]
    ids, mask = left_padded(rows)
    before = one_pass(model, ids, attention_mask=mask)
    after = one_pass(model, changed(ids, segment_of(arm) + 1), attention_mask=mask)
    real = mask[1].bool()
    assert torch.equal(before[1, real], after[1, real])
    assert apart(before[0], after[0]) > WRONG


def test_a_memory_that_leaks_is_found():
    """Witness: the published order, in which a summary of the first half stands in front of that
    half when it is answered, fails the property."""
    model = patch(
        build("llama"),
        HMTConfig(segment_length=8, num_sensory_tokens=0, queue_length=3, key_dim=4),
    )
    memory, ids = segment_ledger_of(model).memory, tokens(1, 24)
    first, seen = type(memory).opening, {}

    def leaking(span: int, past: Past) -> Opening | None:
        """Reads the text, as a method that embeds a whole segment first would."""
        found = first(memory, span, past)
        assert found is not None
        ahead = model.get_input_embeddings()(seen["ids"][:, -1:])
        return Opening(embeds=found.embeds + ahead.detach(), real=found.real)

    memory.opening = leaking  # type: ignore[method-assign]
    results = []
    for text_read in (ids, changed(ids, 23)):
        seen["ids"] = text_read
        results.append(one_pass(model, text_read))
    assert apart(results[0][0, :23], results[1][0, :23]) > WRONG
