"""The base model is a guest: patching adds, unpatching leaves no trace, and models do not see
each other."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from contract.arms import (
    ARMS,
    activate,
    every_arm,
    every_live,
    every_memory,
    every_trainable,
    patched,
    reading_all,
)
from contract.families import FAMILIES, build, tokens
from contract.runs import apart, in_pieces, one_pass
from tolerances import REORDERED, WRONG

from memretrofit.errors import ConfigError, NoTargetError, StateError, UnsupportedModelError
from memretrofit.retrofit import (
    is_patched,
    memory_parameters,
    patch,
    patched_config,
    patched_for_now,
    unpatch,
)

LENGTH = 30


def belongings(model):
    """Everything that a patch could touch, with the objects themselves: modules, configs, hooks,
    attributes."""
    return {
        "modules": dict(model.named_modules()),
        "configs": {n: m.config for n, m in model.named_modules() if hasattr(m, "config")},
        "settings": copy.deepcopy(model.config.to_dict()),
        "pre-hooks": {n: dict(m._forward_pre_hooks) for n, m in model.named_modules()},
        "hooks": {n: dict(m._forward_hooks) for n, m in model.named_modules()},
        "always called": {
            n: dict(m._forward_hooks_always_called) for n, m in model.named_modules()
        },
        "with kwargs": {
            n: dict(m._forward_pre_hooks_with_kwargs) for n, m in model.named_modules()
        },
        "attributes": {n: set(vars(m)) for n, m in model.named_modules()},
        "modes": {n: m.training for n, m in model.named_modules()},
        "methods": {n: getattr(type(model), n) for n in ("generate", "forward")},
    }


def same_objects(before, after):
    assert before.keys() == after.keys()
    for kind in ("modules", "configs"):
        assert before[kind].keys() == after[kind].keys()
        for name, thing in before[kind].items():
            assert after[kind][name] is thing, (kind, name)
    for kind in before.keys() - {"modules", "configs"}:
        assert before[kind] == after[kind], kind


def same_weights(before, model):
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_live
def test_unpatching_leaves_no_trace(family, arm):
    """Modules and configs by identity, weights bit for bit and in order, hooks and `generate` as
    before; also twice."""
    model, ids = build(family), tokens(2, LENGTH)
    before = belongings(model)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    expected = one_pass(model, ids)
    for _ in range(2):
        activate(patch(model, ARMS[arm]))
        assert apart(one_pass(model, ids), expected) > WRONG
        model.generate(ids, max_new_tokens=3, do_sample=False)
        assert unpatch(model) is model
        same_objects(before, belongings(model))
        same_weights(weights, model)
        assert torch.equal(one_pass(model, ids), expected)


@every_live
def test_added_names_say_memory_and_nothing_else_changes(family, arm):
    model = build(family)
    before = model.state_dict()
    assert patch(model, ARMS[arm]) is model
    after = model.state_dict()
    added = after.keys() - before.keys()
    assert all(".memory." in name for name in added)
    assert before.keys() <= after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert set(memory_parameters(model)) == {n for n, _ in model.named_parameters() if n in added}
    # PEFT attaches LoRA by the last part of a name
    taken = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any(taken & set(name.partition(".memory.")[2].split(".")) for name in added)
    assert patched_config(model) == ARMS[arm]


@every_arm
def test_only_full_attention_is_patched(arm):
    """Gemma-3's sliding layers stay as they are: they have no memory, and their cache layer is
    their own."""
    model = patched("gemma3", arm)
    kinds = model.config.layer_types
    for kind, layer in zip(kinds, model.model.layers, strict=True):
        assert hasattr(layer.self_attn, "memory") == (kind == "full_attention")
    _, cache = in_pieces(model, tokens(1, LENGTH), (12,))
    names = [type(layer).__name__ for layer in cache.layers]
    assert names == [
        "MemoryLayer" if k == "full_attention" else "DynamicSlidingWindowLayer" for k in kinds
    ]


@every_arm
def test_chosen_layers_alone_are_patched(arm):
    model = patch(build("llama", layers=3), replace(ARMS[arm], layers_to_transform=(2, 0)))
    activate(model)
    assert [hasattr(x.self_attn, "memory") for x in model.model.layers] == [True, False, True]
    ids = tokens(2, LENGTH)
    assert apart(in_pieces(model, ids, (9, 13, 20))[0], one_pass(model, ids)) < REORDERED


@every_arm
def test_patching_twice_and_unpatching_nothing_are_errors(arm):
    model = build("llama")
    with pytest.raises(StateError, match="not patched"):
        unpatch(model)
    with pytest.raises(StateError, match="not patched"):
        memory_parameters(model)
    patch(model, ARMS[arm])
    before = belongings(model)
    with pytest.raises(StateError, match="patched already"):
        patch(model, ARMS["window_sinks"])
    same_objects(before, belongings(model))


def test_a_patch_for_now_is_gone_after_an_error_too():
    model = build("llama")
    before = belongings(model)
    context = patched_for_now(model, ARMS["ahn"])
    context.__enter__()
    assert is_patched(model)
    context.__exit__(KeyError, KeyError(), None)
    assert not is_patched(model)
    same_objects(before, belongings(model))


@every_live
def test_models_of_one_config_do_not_see_each_other(family, arm):
    """Transformers shares the config object between models that were built from it."""
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family](2)
    one, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    assert one.config is other.config
    settings, before, ids = copy.deepcopy(config.to_dict()), belongings(other), tokens(2, LENGTH)
    expected = one_pass(other, ids)
    patch(one, ARMS[arm])
    assert config.to_dict() == settings
    assert config._attn_implementation == "sdpa"
    same_objects(before, belongings(other))
    assert torch.equal(one_pass(other, ids), expected)
    one_pass(one, ids)
    patch(other, replace(ARMS[arm], sliding_window=5))
    unpatch(one)
    assert apart(one_pass(other, ids), expected) > WRONG
    unpatch(other)
    assert torch.equal(one_pass(other, ids), expected)


@every_arm
def test_a_config_changed_while_patched_stays_changed(arm):
    """Views share their attributes with the config, both ways."""
    model = patched("llama", arm)
    model.config.use_cache = False
    assert model.model.layers[0].self_attn.config.use_cache is False
    model.model.config.use_cache = True
    assert model.config.use_cache is True
    unpatch(model)
    assert model.config.use_cache is True


@every_live
def test_a_copy_of_a_patched_model_is_a_model_of_its_own(family, arm):
    model, ids = patched(family, arm), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(one_pass(twin, ids), expected)
    greedy = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(twin.generate(ids, **greedy), model.generate(ids, **greedy))
    unpatch(model)
    assert torch.equal(one_pass(twin, ids), expected)
    assert apart(one_pass(model, ids), expected) > WRONG
    unpatch(twin)
    same_weights(model.state_dict(), twin)
    assert torch.equal(one_pass(twin, ids), one_pass(model, ids))


@every_trainable
def test_a_copy_has_its_own_parameters(arm):
    model, ids = patched("llama", arm), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    twin = copy.deepcopy(model)
    activate(twin, seed=9)
    assert torch.equal(one_pass(model, ids), expected)
    assert apart(one_pass(twin, ids), expected) > WRONG


@every_memory
def test_the_seed_decides_how_a_memory_starts(arm):
    models = []
    for seed in (0, 0, 1):
        model = build("llama")
        torch.manual_seed(seed)
        models.append(memory_parameters(patch(model, ARMS[arm])))
    one, same, other = models
    assert all(torch.equal(one[n], same[n]) for n in one)
    if ARMS[arm].method == "ahn":
        assert any(not torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("training", [True, False])
@every_arm
def test_the_mode_of_the_model_is_kept(arm, training):
    model = build("llama").train(training)
    patch(model, ARMS[arm])
    assert {m.training for m in model.modules()} == {training}


FAILING = {
    "layer out of range": (
        lambda: build("llama"),
        {"layers_to_transform": (0, 7)},
        NoTargetError,
        "7",
    ),
    "window of all positions": (
        lambda: build("llama"),
        {"sliding_window": 256},
        ConfigError,
        "256",
    ),
    "a sliding layer": (
        lambda: build("gemma3"),
        {"layers_to_transform": (0, 1)},
        UnsupportedModelError,
        "native sliding window",
    ),
}


@pytest.mark.parametrize("case", list(FAILING))
@every_arm
def test_a_patch_that_fails_leaves_nothing_behind(arm, case):
    make, changes, error, found = FAILING[case]
    _fails(make(), replace(reading_all(arm), **changes), error, found)


def _fails(model, config, error, found):
    before = belongings(model)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    expected = one_pass(model, tokens(1, 9))
    with pytest.raises(error, match=found):
        patch(model, config)
    same_objects(before, belongings(model))
    same_weights(weights, model)
    assert torch.equal(one_pass(model, tokens(1, 9)), expected)


def _mistral():
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


def _bloom():
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=101, hidden_size=32, n_layer=2, n_head=4)).eval()


def _gptj():
    from transformers import GPTJConfig, GPTJForCausalLM

    config = GPTJConfig(
        vocab_size=101, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64
    )
    return GPTJForCausalLM(config).eval()


def _mamba():
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4)
    return MambaForCausalLM(config).eval()


CANNOT = {
    "every layer slides": (_mistral, "native sliding window"),
    "own attention: bloom": (_bloom, "never calls"),
    "own attention: gptj": (_gptj, "never calls"),
    "no attention": (_mamba, "never calls"),
}


@pytest.mark.parametrize("case", list(CANNOT))
def test_models_that_cannot_be_entered_are_refused_untouched(case):
    make, found = CANNOT[case]
    for arm in ("window_sinks", "ahn"):
        _fails(make(), replace(ARMS[arm], sliding_window=8), UnsupportedModelError, found)


def test_what_is_not_a_model_or_not_a_config_is_refused():
    with pytest.raises(ConfigError, match="AHNConfig"):
        patch(build("llama"), {"sliding_window": 8})
    with pytest.raises(UnsupportedModelError, match="Linear"):
        patch(torch.nn.Linear(2, 2), ARMS["window_sinks"])


@pytest.mark.parametrize("implementation", ["flex_attention"])
def test_another_attention_implementation_is_refused(implementation):
    model = build("llama")
    model.set_attn_implementation(implementation)
    with pytest.raises(UnsupportedModelError, match="set_attn_implementation"):
        patch(model, ARMS["window_sinks"])


def test_an_error_inside_the_model_does_not_poison_the_next_forward():
    """The hooks hold context; an exception in attention must give it back."""
    model, ids = patched("llama", "ahn"), tokens(1, LENGTH)
    expected = one_pass(model, ids)
    with pytest.raises(UnsupportedModelError):
        model(ids, use_cache=False, output_attentions=True)
    assert torch.equal(one_pass(model, ids), expected)
    base = build("llama")
    assert torch.equal(one_pass(base, ids), one_pass(build("llama"), ids))


def test_masks_that_say_more_than_padding_are_refused():
    """Packed sequences and 4-D masks would put tokens of one text into the state of another."""
    model, ids = patched("llama", "ahn"), tokens(1, LENGTH)
    with pytest.raises(StateError, match="one sequence per row"):
        model(ids, attention_mask=torch.zeros(1, 1, LENGTH, LENGTH), use_cache=False)
    packed = torch.arange(LENGTH // 2).repeat(2)[None]
    with pytest.raises(StateError, match="one sequence per row"):
        model(ids, position_ids=packed, use_cache=False)
