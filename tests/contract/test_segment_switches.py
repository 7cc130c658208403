"""The switches of a model that reads in segments: what each leaves out, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass
from contract.segment_arms import (
    differ,
    every_arm,
    every_live,
    every_method,
    held,
    ledger,
    reading,
    segment_of,
    session,
    text,
)
from tolerances import REORDERED, WRONG

from memretrofit.errors import StateError
from memretrofit.patching.controls import (
    intercepted,
    memory_disabled,
    memory_silenced,
    route_pinned,
    state_carried,
    state_shuffled,
    window_override,
    writes_disabled,
)


@every_live
def test_disabled_is_the_base_model(family, arm):
    """Full attention over the whole text, bit for bit, with a cache of its own kind."""
    model, base, ids = reading(family, arm), build(family), text(arm)
    options = {"max_new_tokens": 5, "do_sample": False}
    with memory_disabled(model):
        found, cache = in_pieces(model, ids, [9])
        generated = model.generate(ids, **options)
        with torch.no_grad():
            assert torch.equal(model.base_model(ids)[0], base.base_model(ids)[0])
    expected, plain = in_pieces(base, ids, [9])
    assert torch.equal(found, expected)
    assert torch.equal(generated, base.generate(ids, **options))
    assert [type(x) for x in cache.layers] == [type(x) for x in plain.layers]
    assert apart(one_pass(model, ids), expected) > WRONG  # witness


@every_arm
def test_without_writes_every_segment_reads_what_the_first_does(arm):
    """The state never changes. A segment is then what a silenced one is: conversations that wrote
    nothing. What is read again (tokens) still is."""
    model, ids = reading("llama", arm), text(arm)
    with writes_disabled(model):
        found, cache = in_pieces(model, ids, [4])
    with memory_silenced(model):
        quiet, _ = in_pieces(model, ids, [4])
    fresh = ledger(model).begin(2)
    assert differ(dict(session(cache).state), fresh) == 0
    assert torch.equal(found, quiet)
    loud, _ = in_pieces(model, ids, [4])
    assert apart(found[:, segment_of(arm) :], loud[:, segment_of(arm) :]) > WRONG


@every_arm
def test_a_silenced_model_reads_nothing(arm):
    """Whatever the cache holds."""
    model, ids = reading("llama", arm), text(arm)
    cut = 2 * segment_of(arm)
    _, one = in_pieces(model, ids[:, :cut], [])
    state = {name: 3 * x + 1 for name, x in session(one).state.items()}
    _, other = in_pieces(model, ids[:, :cut], [])
    session(other).state = state
    with memory_silenced(model), torch.no_grad():
        first, second = (model(ids[:, cut:], past_key_values=x).logits for x in (one, other))
    segment = slice(0, segment_of(arm))
    assert torch.equal(first[:, segment], second[:, segment])
    with torch.no_grad():
        _, again = in_pieces(model, ids[:, :cut], [])
        heard = model(ids[:, cut:], past_key_values=again).logits
    assert apart(first[:, segment], heard[:, segment]) > WRONG


@every_arm
def test_a_shuffled_row_reads_what_the_next_one_wrote(arm):
    """Two rows that are at the same place. The first segment reads what nobody wrote."""
    model, size = reading("llama", arm), segment_of(arm)
    ids = tokens(2, 2 * size)
    with state_shuffled(model):
        found, cache = in_pieces(model, ids, [])
    plain = one_pass(model, ids)
    assert apart(found[:, :size], plain[:, :size]) < REORDERED
    assert apart(found[:, size:], plain[:, size:]) > WRONG
    # by hand: after the first segment, the rows of the state change places
    _, by_hand = in_pieces(model, ids[:, :size], [])
    if ledger(model).memory.kept_tokens:
        return  # tokens of a row's own text are read beside the state
    layer = session(by_hand)
    layer.state = {name: x.flip(0) for name, x in layer.state.items()}
    with torch.no_grad():
        expected = model(ids[:, size:], past_key_values=by_hand).logits
    first = ledger(model).memory.spans[0]
    assert apart(found[:, size : size + first], expected[:, :first]) < REORDERED
    assert session(cache).seen == 2 * size


@every_arm
def test_shuffled_rows_of_different_lengths(arm):
    """Rows with the same text read each other's, which is their own."""
    model, row = reading("llama", arm), text(arm, rows=1)[0]
    ids, mask = left_padded([row, row], extra=3)
    with state_shuffled(model):
        found = one_pass(model, ids, attention_mask=mask)
    assert apart(found[:1, 3:], one_pass(model, row[None])) < REORDERED


@every_arm
def test_a_carried_state_begins_a_new_text_and_stays_as_it_was(arm):
    model, first, second = reading("llama", arm), text(arm), text(arm, seed=1)
    _, left = in_pieces(model, first, [])
    before = {name: x.clone() for name, x in session(left).state.items()}
    with state_carried(model, left):
        carried, _ = in_pieces(model, second, [])
        pieces, _ = in_pieces(model, second, [1, segment_of(arm), segment_of(arm) + 2])
        alone = one_pass(model, second)
    assert differ(dict(session(left).state), before) == 0
    plain = one_pass(model, second)
    assert apart(carried, pieces) < REORDERED
    assert torch.equal(alone, plain)  # no cache: no new conversation
    begun = ledger(model).memory.spans[0]
    # the first span hears it, where a span reads what was written before it
    heard = apart(carried[:, : segment_of(arm)], plain[:, : segment_of(arm)])
    assert heard > WRONG, begun


@every_method
def test_a_carried_state_must_fit(arm):
    """From another model, or of other rows: refused, and nothing is begun."""
    model, ids = reading("llama", arm), text(arm)
    _, foreign = in_pieces(reading("llama", arm), ids, [])
    _, single = in_pieces(model, ids[:1], [])
    for cache, told in ((foreign, "another patched model"), (single, "no state of 2 rows")):
        with state_carried(model, cache), pytest.raises(StateError, match=told):
            in_pieces(model, ids, [])
    with state_shuffled(model), pytest.raises(StateError, match="at least two"):
        one_pass(model, ids[:1])


@every_method
def test_switches_of_other_families_are_refused(arm):
    model = reading("llama", arm)
    for name, switch in (
        ("window", lambda: window_override(model, sliding_window=8, num_sink_tokens=1)),
        ("routes", lambda: route_pinned(model, torch.tensor([0, 1]))),
        ("intercept", lambda: intercepted(model, lambda call: (call, None))),
    ):
        with pytest.raises(StateError, match=f"{name}: .* means nothing"), switch():
            pass
    assert one_pass(model, text(arm)).isfinite().all()


@every_method
def test_a_switch_in_the_middle_of_a_text(arm):
    """What was written stays when writing stops, and goes on when it is on again."""
    model, ids, size = reading("llama", arm), text(arm), segment_of(arm)
    _, cache = in_pieces(model, ids[:, :size], [])
    written = held(cache)
    with writes_disabled(model), torch.no_grad():
        model(ids[:, size : 3 * size], past_key_values=cache)
    state = dict(session(cache).state)
    assert all(torch.equal(state[name], written[name]) for name in state)
    with torch.no_grad():
        model(ids[:, 3 * size :], past_key_values=cache)
    assert any(not torch.equal(session(cache).state[name], x) for name, x in state.items())
