"""Memory+: the gate against its equation, and one pool that all layers read and train."""

from __future__ import annotations

import pytest
import torch
from contract.bank_arms import activate, bank_of
from contract.families import build, tokens
from contract.runs import apart, one_pass
from methods.fed import ffns_of
from tolerances import ONE_LAYER, WRONG

from memretrofit.errors import ConfigError
from memretrofit.methods.memory_plus import MemoryPlusConfig
from memretrofit.methods.product_key import ProductKeyConfig
from memretrofit.modules.product_key import SHARED
from memretrofit.patching.ledger import ledger_of
from memretrofit.retrofit import memory_parameters, patch

SIZES = {"num_slots": 400, "num_heads": 2, "key_dim": 6, "value_dim": 5, "top_k": 2}
IDS = tokens(2, 5)


def model_with(layers: int = 1, *, live: bool = True, opened: bool = True, **fields):
    model = patch(build("llama", layers=layers), MemoryPlusConfig(**SIZES | fields))
    if opened:
        bank_of(model).open_rows([])
    return activate(model) if live else model


def reads_of(model):
    return [s.memory for s in ledger_of(model).seams.values() if s.layer_idx is not None]


@torch.no_grad()
def added_by_hand(model, x, *, gated=True, bias=True):
    """W2 (y * silu(W1 x + b1)) + b2 of tokens x [B, T, E]; the flags are witnesses."""
    (read,), values = reads_of(model), bank_of(model).table(SHARED).delta
    choice = read.keys(x)
    y = (values[choice.slots] * choice.weights[..., None]).sum((2, 3))
    inner = x @ read.gate.weight.T + read.gate.bias
    gate = inner * inner.sigmoid() if gated else 1
    return (y * gate) @ read.out.weight.T + (read.out.bias if bias else 0)


def test_values_pass_a_gate():
    model = model_with()
    ((x, out),) = ffns_of(model, IDS)
    with torch.no_grad():
        own = model.model.layers[0].mlp.forward(x)
    assert apart(out, own + added_by_hand(model, x)) < ONE_LAYER
    for change in ({"gated": False}, {"bias": False}):
        assert apart(out, own + added_by_hand(model, x, **change)) > WRONG, change


def test_one_pool_gets_the_gradients_of_all_layers():
    """Each layer reads slots that no other does, and all of them, only them, have a gradient."""
    model = model_with(layers=3)
    slots: list[set[int]] = []
    for read in reads_of(model):
        read.keys.register_forward_hook(
            lambda keys, args, choice: slots.append(set(choice.slots.flatten().tolist()))
        )
    model(IDS).logits.square().mean().backward()
    assert len(slots) == 3
    for layer in range(3):
        assert slots[layer] - set.union(*slots[:layer], *slots[layer + 1 :])
    gradient = bank_of(model).table(SHARED).delta.grad.to_dense()
    assert set(gradient.any(-1).nonzero().flatten().tolist()) == set.union(*slots)


def test_a_pool_is_one_parameter_and_is_saved_once():
    model = model_with(layers=3)
    pools = [name for name, p in memory_parameters(model).items() if p.shape == (400, 5)]
    assert pools == ["model.memory.tables.slots.delta"]
    assert [name for name in model.state_dict() if name.endswith(".delta")] == pools
    other = model_with(layers=3, live=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(one_pass(other, IDS), one_pass(model, IDS))


def test_it_stands_beside_three_ffns_a_third_of_the_depth_apart():
    model = model_with(layers=6, live=False, opened=False)
    assert [s.layer_idx for s in ledger_of(model).seams.values()] == [None, 1, 3, 5]


def test_both_maps_have_a_bias_and_the_last_starts_at_zero():
    (read,) = reads_of(model_with(live=False))
    assert not read.out.weight.any()
    assert not read.out.bias.any()
    assert read.gate.weight.std().sub(32**-0.5).abs() < 0.03
    (read,) = reads_of(model_with(live=False, starts_at_zero="rows"))
    assert read.out.weight.any()
    assert not read.out.bias.any()


def test_a_bias_that_learned_is_not_added_where_nothing_was_written():
    """Rows at zero and none open: the base model's bits, whatever the maps have become."""
    model = model_with(layers=3, opened=False, starts_at_zero="rows")
    assert all(read.out.bias.any() for read in reads_of(model))
    assert torch.equal(one_pass(model, IDS), one_pass(build("llama", layers=3), IDS))


def test_without_its_gate_it_is_a_product_key_memory():
    """At silu(g) = 1 and no bias, with the weights of the other."""
    model = model_with()
    other = patch(build("llama", layers=1), ProductKeyConfig(**SIZES))
    bank_of(other).open_rows([])
    (mine,), (theirs,) = reads_of(model), reads_of(other)
    with torch.no_grad():
        theirs.keys.load_state_dict(mine.keys.state_dict())
        theirs.out.weight.copy_(mine.out.weight)
        mine.out.bias.zero_()
        mine.gate.weight.zero_()
        mine.gate.bias.fill_(1.2784645)  # where silu is 1
        bank_of(other).table("slots_0").delta.copy_(bank_of(model).table(SHARED).delta)
    assert apart(one_pass(model, IDS), one_pass(other, IDS)) < ONE_LAYER


def test_sizes_that_do_not_fit_are_refused_together():
    with pytest.raises(ConfigError) as caught:
        MemoryPlusConfig(num_slots=10, key_dim=3, top_k=4)
    assert [problem.partition("=")[0] for problem in caught.value.problems] == [
        "num_slots",
        "key_dim",
        "top_k",
    ]
