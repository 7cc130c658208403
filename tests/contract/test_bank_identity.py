"""What a bank may change, and when: nothing at the start, nothing when it is off, nothing that came
before."""

from __future__ import annotations

import pytest
import torch
from contract.bank_arms import (
    EXAMPLES,
    LENGTH,
    activate,
    bank_of,
    banked,
    every_arm,
    every_live,
)
from contract.families import build, tokens
from contract.runs import apart, one_pass
from tolerances import WRONG

from memretrofit.modules.bank import Tokens
from memretrofit.patching.controls import memory_disabled, memory_silenced, state_shuffled
from memretrofit.retrofit import memory_parameters, unpatch

ROWS = torch.stack(EXAMPLES[:2])


@every_live
def test_a_fresh_bank_is_the_base_model(family, arm):
    """Rule 2: identity is full, whatever the text."""
    expected = one_pass(build(family), ROWS)
    assert torch.equal(one_pass(banked(family, arm, live=False), ROWS), expected)


@every_live
def test_a_live_bank_speaks_and_can_be_switched_off(family, arm):
    """Rule 3. What is off is the original forward, bit for bit; so is a bank that is unpatched."""
    base = build(family)
    expected = one_pass(base, ROWS)
    model = banked(family, arm)
    assert apart(one_pass(model, ROWS), expected) > WRONG
    for off in (memory_disabled, memory_silenced):
        with off(model):
            assert torch.equal(one_pass(model, ROWS), expected)
    assert torch.equal(one_pass(unpatch(model), ROWS), expected)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(
        torch.equal(x, y) for x, y in zip(model.parameters(), base.parameters(), strict=True)
    )


@every_arm
def test_a_later_token_changes_nothing_before_it(arm):
    """Causality, at every place. Forbids: a route that is chosen from the whole text."""
    model = banked("llama", arm)
    expected = one_pass(model, ROWS)
    for place in range(1, LENGTH, 5):
        changed = ROWS.clone()
        changed[:, place:] = tokens(2, LENGTH - place, seed=99)
        assert torch.equal(one_pass(model, changed)[:, :place], expected[:, :place])


@every_arm
def test_rows_do_not_meet(arm):
    """The other row of a batch changes nothing."""
    model = banked("llama", arm)
    expected = one_pass(model, ROWS)[:1]
    other = torch.cat([ROWS[:1], tokens(1, LENGTH, seed=50)])
    assert torch.equal(one_pass(model, other)[:1], expected)


@every_arm
def test_a_shuffled_bank_looks_up_another_rows_text(arm):
    """Two equal rows do not notice; two different ones do, where the text decides."""
    model = banked("llama", arm)
    equal = ROWS[:1].expand(2, -1)
    expected = one_pass(model, ROWS)
    with state_shuffled(model):
        shuffled, alike = one_pass(model, ROWS), one_pass(model, equal)
    assert torch.equal(alike, one_pass(model, equal))
    if bank_of(model).addresses(Tokens.of(ROWS[0])):
        assert apart(shuffled, expected) > WRONG
    else:  # hidden states decide: no control, and reports leave it out
        assert torch.equal(shuffled, expected)


@every_arm
def test_a_step_reaches_every_parameter_of_a_live_bank(arm):
    """Exactly one factor is zero at the start, so that the other ones follow."""
    model = activate(banked("llama", arm, live=False))
    model(torch.stack(EXAMPLES)).logits.square().mean().backward()
    gradients = {name: p.grad for name, p in memory_parameters(model).items()}
    silent = [name for name, g in gradients.items() if g is None or not g.to_dense().abs().sum()]
    assert not silent


@every_arm
def test_a_fresh_bank_can_learn(arm):
    """Some parameter has a gradient in the first step, and no base weight has one."""
    model = banked("llama", arm, live=False)
    model(torch.stack(EXAMPLES)).logits.square().mean().backward()
    live = [
        name
        for name, p in memory_parameters(model).items()
        if p.grad is not None and bool(p.grad.to_dense().abs().sum() > 0)
    ]
    assert live
    added = set(map(id, memory_parameters(model).values()))
    assert all(p.grad is None for p in model.parameters() if id(p) not in added)


@every_arm
def test_only_opened_rows_train(arm):
    """Without open rows a bank with addresses of its own has no rows among its parameters."""
    model = banked("llama", arm, opened=False, live=False)
    assert not [name for name in memory_parameters(model) if name.endswith(".delta")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@every_arm
def test_other_types_run(arm, dtype):
    """A bank follows its model's type, and its sums stay exact enough to be used."""
    model = banked("llama", arm).to(dtype)
    assert one_pass(model, ROWS).isfinite().all()
