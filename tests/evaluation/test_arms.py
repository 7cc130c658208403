"""Each arm is what its name says, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memretrofit import AHNConfig, LoLCATsConfig, WindowSinksConfig, patch, unpatch
from memretrofit.evaluation.arms import arms_of, fresh_values, memory_values
from memretrofit.retrofit import memory_parameters

WINDOW, SINKS = 8, 3
IDS = torch.randint(0, 101, (3, 32), generator=torch.Generator().manual_seed(1))


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model, arm=None):
    if arm is None:
        return model(IDS, use_cache=False).logits
    with arm():
        return model(IDS, use_cache=False).logits


@pytest.fixture(
    params=[
        AHNConfig(sliding_window=WINDOW, num_sink_tokens=SINKS),
        LoLCATsConfig(sliding_window=WINDOW, num_sink_tokens=SINKS),
    ],
    ids=lambda config: config.method,
)
def trained(request):
    """A patched model whose memory speaks, and the values of a fresh one."""
    model = patch(small_model(), request.param)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in memory_parameters(model).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return model, fresh_values(model, seed=0)


def test_full_is_the_base_model(trained):
    model, untrained = trained
    assert torch.equal(logits(model, arms_of(model, untrained)["full"]), logits(small_model()))


def test_window_runs_none_of_the_memory(trained):
    model, untrained = trained
    window = patch(small_model(), WindowSinksConfig(sliding_window=8, num_sink_tokens=3))
    assert torch.equal(logits(model, arms_of(model, untrained)["window"]), logits(window))
    unpatch(window)
    wrong = patch(window, WindowSinksConfig(sliding_window=7, num_sink_tokens=3))
    assert not torch.allclose(logits(model, arms_of(model, untrained)["window"]), logits(wrong))


def test_silent_arms_are_the_window_and_the_others_are_not(trained):
    model, untrained = trained
    arms = arms_of(model, untrained)
    window = logits(model, arms["window"])
    for name in ("untrained", "no_write"):
        torch.testing.assert_close(logits(model, arms[name]), window, atol=1e-5, rtol=0)
    for name in ("trained", "shuffled"):
        assert (logits(model, arms[name]) - window).abs().max() > 1e-3
    assert (logits(model, arms["trained"]) - logits(model, arms["shuffled"])).abs().max() > 1e-3


def test_arms_leave_no_trace(trained):
    model, untrained = trained
    before = logits(model)
    values = {name: parameter.clone() for name, parameter in memory_parameters(model).items()}
    for arm in arms_of(model, untrained).values():
        logits(model, arm)
    assert torch.equal(logits(model), before)
    for name, parameter in memory_parameters(model).items():
        assert torch.equal(parameter, values[name])


def test_values_come_back_after_an_error(trained):
    model, untrained = trained
    before = logits(model)
    with pytest.raises(RuntimeError, match="stop"), memory_values(model, untrained):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), before)


def test_fresh_values_do_not_touch_the_random_state(trained):
    model, untrained = trained
    state = torch.random.get_rng_state()
    again = fresh_values(model, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(again[name], value) for name, value in untrained.items())
