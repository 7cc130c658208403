"""Every chunk form is its definition in values, state and gradients; and what all rules promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import difference, operands, results

from memretrofit.ops import RULES
from memretrofit.ops.chunks import CHUNKS_AT_ONCE

RECURRENT, CHUNK = 0, 1
rules = pytest.mark.parametrize("rule", list(RULES))
forms = pytest.mark.parametrize("form", [RECURRENT, CHUNK], ids=["recurrent", "chunk"])


@rules
@pytest.mark.parametrize("decay", [1.0, 50.0], ids=["mild", "strong"])
@pytest.mark.parametrize("initial", [True, False], ids=["state", "empty"])
@pytest.mark.parametrize(
    ("time", "chunk_size"),
    [(2, 64), (7, 1), (63, 5), (64, 64), (65, 64), (100, 16), (130, 64), (131, 5)],
)
def test_chunk_is_recurrent_in_value_state_and_gradients(rule, decay, initial, time, chunk_size):
    """131 positions in chunks of 5 also cross from one group of chunks to the next."""
    inputs = operands(rule, time, decay=decay)
    if not initial:
        inputs["initial_state"] = None
    expected = results(RECURRENT, rule, inputs)
    found = results(CHUNK, rule, inputs, chunk_size=chunk_size)
    assert found.keys() == expected.keys()
    errors = {name: difference(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 1e-10, errors


def test_the_lengths_above_cross_groups_of_chunks():
    assert 5 * CHUNKS_AT_ONCE < 131


@rules
def test_the_tolerance_of_chunks_rejects_wrong_readers_and_states(rule):
    """Witnesses for 1e-10: q one position late, no scale, a state forgotten at position 32."""
    inputs = operands(rule, 65)
    expected, _ = RULES[rule][RECURRENT](**inputs)
    chunk = RULES[rule][CHUNK]
    late, _ = chunk(**inputs | {"q": inputs["q"].roll(1, 2)})
    unscaled, _ = chunk(**inputs, scale=1.0)
    tail = {n: x if x is None else x[:, :, 32:] for n, x in inputs.items() if n != "initial_state"}
    forgetful, _ = chunk(**tail)
    assert difference(late, expected) > 1e-3
    assert difference(unscaled, expected) > 1e-3
    assert difference(forgetful, expected[:, :, 32:]) > 1e-3


@rules
def test_float32_chunks_stay_near_the_float64_definition(rule):
    inputs = operands(rule, 257, decay=0.1)
    single = {n: None if x is None else x.float() for n, x in inputs.items()}
    for form in (RECURRENT, CHUNK):
        for found, expected in zip(
            RULES[rule][form](**single), RULES[rule][RECURRENT](**inputs), strict=True
        ):
            assert found.dtype == torch.float32
            assert difference(found, expected) < 5e-6
    half = {n: None if x is None else x.bfloat16() for n, x in inputs.items()}
    assert difference(RULES[rule][CHUNK](**half)[0], RULES[rule][RECURRENT](**inputs)[0]) > 5e-6


def test_small_decays_survive_large_ones():
    """g alternates between -60 and -1e-3. Differences of cumulative sums, the usual way to get the
    decays between positions, round the small ones away; sums over what lies between do not."""
    inputs = operands("gated_delta", 256)
    inputs["g"] = torch.where(torch.arange(256) % 4 == 0, -60.0, -1e-3).double().expand(2, 2, 256)
    expected = results(RECURRENT, "gated_delta", inputs)
    single = {n: None if x is None else x.float() for n, x in inputs.items()}
    found = results(CHUNK, "gated_delta", single)
    errors = {name: difference(found[name], expected[name]) for name in expected}
    assert max(errors.values()) < 3e-6, errors

    sums = inputs["g"][0, 0, :64].float().cumsum(0)
    wrong = (sums[63] - sums[61]).exp()
    assert abs(wrong.item() - torch.tensor(-2e-3).double().exp().item()) > 3e-6


@pytest.mark.parametrize("rule", ["gated_delta", "ssd"])
@forms
def test_a_full_reset_forgets_without_nan(rule, form):
    """g = -inf at one position: what follows is what an empty state would give."""
    inputs = operands(rule, 40)
    inputs["g"][:, :, 20] = -torch.inf
    found = results(form, rule, inputs)
    assert all(x.isfinite().all() for x in found.values())
    tail = {n: x[:, :, 20:] for n, x in inputs.items() if n != "initial_state"}
    expected, state = RULES[rule][RECURRENT](**tail)
    assert difference(found["o"][:, :, 20:], expected) < 1e-10
    assert difference(found["state"], state) < 1e-10


@given(
    rule=st.sampled_from(list(RULES)),
    form=st.sampled_from([RECURRENT, CHUNK]),
    time=st.integers(0, 40),
    data=st.data(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_split_is_one_pass(rule, form, time, data, seed):
    """Forbids a state that is read late, decayed twice or dropped where a sequence is cut."""
    inputs = operands(rule, time, seed=seed)
    cuts = sorted(data.draw(st.lists(st.integers(0, time), max_size=3)))
    options = {"chunk_size": data.draw(st.integers(1, 9))} if form == CHUNK else {}
    state, outputs = inputs.pop("initial_state"), []
    expected, final = RULES[rule][RECURRENT](**inputs, initial_state=state)
    for start, stop in zip([0, *cuts], [*cuts, time], strict=True):
        part = {n: None if x is None else x[:, :, start:stop] for n, x in inputs.items()}
        o, state = RULES[rule][form](**part, initial_state=state, **options)
        outputs.append(o)
    assert difference(torch.cat(outputs, 2), expected) < 1e-10
    assert difference(state, final) < 1e-10


@rules
@forms
def test_gradients_match_finite_differences(rule, form):
    inputs = operands(rule, 5, batch=1, heads=2, groups=1, key=3, value=2)
    names = [n for n, x in inputs.items() if x is not None]
    options = {"chunk_size": 2} if form == CHUNK else {}

    def call(*leaves):
        return RULES[rule][form](**inputs | dict(zip(names, leaves, strict=True)), **options)

    assert torch.autograd.gradcheck(call, [inputs[n].requires_grad_() for n in names])


@rules
@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_position_of_no_decay_and_no_strength_leaves_no_trace(rule, form, dtype):
    """Padding. The definition keeps every bit of the state; the witness is a strength of 1e-3."""
    inputs = operands(rule, 21, dtype=dtype)
    _, expected = RULES[rule][form](**inputs)
    at = torch.tensor([0, 0, 3, 9, 9, 9, 20])

    def padded(strength: float):
        kept = torch.ones(21 + len(at), dtype=torch.bool)
        kept[at + torch.arange(len(at))] = False
        longer = {}
        for n, x in operands(rule, 21 + len(at), dtype=dtype, seed=7).items():
            if n == "initial_state" or x is None:
                longer[n] = inputs[n]
            else:
                x[:, :, kept] = inputs[n]
                if n in ("g", "beta"):
                    x[:, :, ~kept] = strength if n == "beta" else 0.0
                longer[n] = x
        return RULES[rule][form](**longer)[1]

    if form == RECURRENT:
        assert torch.equal(padded(0.0), expected)
    assert difference(padded(0.0), expected) < 1e-6
    assert difference(padded(1e-3), expected) > 1e-5


@rules
@forms
def test_the_future_changes_nothing_before_it(rule, form):
    inputs = operands(rule, 70)
    before, _ = RULES[rule][form](**inputs)
    for n, x in inputs.items():
        if x is not None and n != "initial_state":
            x[:, :, 50] = x[:, :, 49] * 0.5
    after, _ = RULES[rule][form](**inputs)
    assert torch.equal(after[:, :, :50], before[:, :, :50])
    assert not torch.equal(after[:, :, 50:], before[:, :, 50:])


@rules
@forms
def test_query_heads_share_the_state_of_their_kv_head(rule, form):
    """Grouped heads are heads with k, v repeated (interleaved, as Transformers repeats them)."""
    inputs = operands(rule, 33, heads=6, groups=2)
    grouped, state = RULES[rule][form](**inputs)
    wide = {n: x if x is None or n == "q" else x.repeat_interleave(3, 1) for n, x in inputs.items()}
    expected, repeated = RULES[rule][form](**wide)
    assert state.shape == (2, 2, 8, 6)
    assert difference(grouped, expected) < 1e-12
    assert difference(state, repeated[:, ::3]) < 1e-12
    tiled = {
        n: x if x is None or n == "q" else x.repeat(1, 3, *[1] * (x.dim() - 2))
        for n, x in inputs.items()
    }
    assert difference(RULES[rule][form](**tiled)[0], grouped) > 1e-3


@rules
@forms
def test_half_precision_inputs_and_autocast_are_computed_in_float32(rule, form):
    half = operands(rule, 20, dtype=torch.bfloat16)
    single = {n: None if x is None else x.float() for n, x in half.items()}
    expected, final = RULES[rule][form](**single)
    o, state = RULES[rule][form](**half)
    with torch.autocast("cpu", torch.bfloat16):
        cast_o, cast_state = RULES[rule][form](**single)
        assert (single["k"] @ single["k"].mT).dtype == torch.bfloat16  # autocast was at work
    assert o.dtype == state.dtype == cast_o.dtype == cast_state.dtype == torch.float32
    assert torch.equal(o, expected)
    assert torch.equal(cast_o, expected)
    assert torch.equal(state, final)
    assert torch.equal(cast_state, final)


@rules
@forms
def test_no_position_returns_the_state_it_was_given(rule, form):
    inputs = operands(rule, 0)
    o, state = RULES[rule][form](**inputs)
    assert o.shape == (2, 4, 0, 6)
    assert torch.equal(state, inputs["initial_state"])


@rules
@forms
def test_optional_inputs_have_neutral_values(rule, form):
    """None means: nothing fades, all writes have strength 1, an empty state, scale K ** -0.5."""
    inputs = operands(rule, 19)
    bare, state = RULES[rule][form](inputs["q"], inputs["k"], inputs["v"])
    zeros = None if rule == "delta" else torch.zeros(2, 2, 19, dtype=torch.float64)
    told, told_state = RULES[rule][form](
        inputs["q"],
        inputs["k"],
        inputs["v"],
        zeros,
        torch.ones(2, 2, 19, dtype=torch.float64),
        scale=8**-0.5,
        initial_state=torch.zeros(2, 2, 8, 6, dtype=torch.float64),
    )
    assert difference(bare, told) < 1e-12
    assert difference(state, told_state) < 1e-12


@rules
@forms
def test_shapes_that_disagree_are_refused(rule, form):
    inputs = operands(rule, 65)
    call = RULES[rule][form]
    with pytest.raises(ValueError, match=r"v has shape \[2, 2, 60, 6\]"):
        call(**inputs | {"v": inputs["v"][:, :, :60]})
    with pytest.raises(ValueError, match="q has shape"):
        call(**inputs | {"q": inputs["q"][:, :, :60]})
    with pytest.raises(ValueError, match="beta has shape"):
        call(**inputs | {"beta": inputs["beta"][..., None]})
    with pytest.raises(ValueError, match="initial_state has shape"):
        call(**inputs | {"initial_state": inputs["initial_state"].mT})
    with pytest.raises(ValueError, match="3 query heads cannot share 2 KV heads"):
        call(**inputs | {"q": inputs["q"][:, :3]})
    if form == CHUNK:
        with pytest.raises(ValueError, match="chunk_size is 0"):
            call(**inputs, chunk_size=0)


@pytest.mark.parametrize("rule", ["gated_delta", "delta"])
def test_float32_does_not_drift_in_32k_steps(rule):
    """Witness for 1e-3: a state that is rounded to bfloat16 every 1024 positions."""
    time = 32768
    inputs = operands(rule, time, batch=1, heads=1, groups=1, key=16, value=16, decay=1e-3)
    q, *rest = inputs.values()
    single = [None if x is None else x.float() for x in (q, *rest)]
    rounded = {n: None if x is None else x.float() for n, x in inputs.items()}
    _, expected = RULES[rule][CHUNK](q, *rest[:-1], initial_state=rest[-1])
    for form in (RECURRENT, CHUNK):
        _, state = RULES[rule][form](*single[:-1], initial_state=single[-1])
        assert difference(state, expected) < 1e-3
    state = rounded.pop("initial_state")
    for start in range(0, time, 1024):
        part = {n: None if x is None else x[:, :, start : start + 1024] for n, x in rounded.items()}
        _, state = RULES[rule][CHUNK](**part, initial_state=state)
        state = state.bfloat16().float()
    assert difference(state, expected) > 1e-3
