"""Attention transfer: what it minimises, that it learns, and that it leaves the rest alone."""

from __future__ import annotations

import pytest
import torch
from training.tiny import awake, base, patched, rows

from memretrofit import AHNConfig, LoLCATsConfig, WindowSinksConfig
from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.patching.controls import memory_disabled, window_override, writes_disabled
from memretrofit.retrofit import memory_parameters
from memretrofit.training import TransferSettings, attention_transfer

METHODS = [AHNConfig(sliding_window=16, num_sink_tokens=2), LoLCATsConfig(sliding_window=16)]


@pytest.mark.parametrize(
    ("method", "below", "above"), [(METHODS[0], 0.99, 5e-3), (METHODS[1], 0.8, 0.15)]
)
def test_it_learns_what_depends_on_the_query(method, below, above):
    """The first step measures the untrained memory: silent, so a loss of 1 and an R2 of 0."""
    settings = TransferSettings(steps=40, windows=(8, 16), sinks=(2,), batch_size=4)
    steps = attention_transfer(patched(method), rows(count=160), settings)
    assert steps[0].loss == pytest.approx(1.0, abs=1e-4)
    assert all(abs(r2) < 1e-4 for r2 in steps[0].r2.values())
    last = steps[-8:]
    assert sum(step.loss for step in last) / 8 < below
    for layer in last[0].r2:
        assert sum(step.r2[layer] for step in last) / 8 > above
    assert {step.draw for step in steps} == {(8, 2), (16, 2)}


def attention_outputs(model, ids):
    """The input of each layer's output projection: [layers, B, T, H * V]."""
    outputs = []
    handles = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return outputs


def test_the_loss_is_its_definition_on_the_first_layer():
    """Only there is the stream the teacher's in every arm."""
    model = awake(patched(AHNConfig(sliding_window=16, layers_to_transform=(0,))))
    data = rows(count=2)
    ids = torch.stack([row["input_ids"] for row in data])
    window, sinks = 8, 3
    with window_override(model, sliding_window=window, num_sink_tokens=sinks):
        memory = attention_outputs(model, ids)[0]
        with writes_disabled(model):
            near = attention_outputs(model, ids)[0]
        with memory_disabled(model):
            full = attention_outputs(model, ids)[0]

    def loss(first):
        squares = [(x[:, first:] - full[:, first:]).square().sum() for x in (memory, near)]
        return (squares[0] / squares[1]).item()

    measured = []
    settings = TransferSettings(steps=1, windows=(window,), sinks=(sinks,))
    attention_transfer(model, data, settings, on_step=measured.append)
    exact = window + sinks
    assert measured[0].loss == pytest.approx(loss(exact), rel=1e-4)
    assert abs(loss(exact + 1) / loss(exact) - 1) > 1e-3
    # nothing has left one position earlier: the arms are equal there
    assert torch.equal(memory[:, :exact], near[:, :exact])
    assert not torch.equal(memory[:, exact], near[:, exact])


def test_the_base_and_its_modes_are_as_before():
    model, fresh = patched(), base()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.train()
    attention_transfer(model, rows(), TransferSettings(steps=3))
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    expected = fresh.state_dict()
    found = {k: v for k, v in model.state_dict().items() if ".memory." not in k}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_half_precision_gives_gradients_to_every_parameter():
    """Autocast caches cast weights: one made without gradient must not serve where it is needed."""
    model = patched()
    settings = TransferSettings(steps=4, bf16=True, windows=(8,), sinks=(2,))
    before = {name: p.detach().clone() for name, p in memory_parameters(model).items()}
    attention_transfer(model, rows(), settings)
    for name, parameter in memory_parameters(model).items():
        assert parameter.dtype is torch.float32
        assert not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("cut", [1, 4])
def test_it_goes_on_where_it_was(tmp_path, cut):
    settings = TransferSettings(steps=6, windows=(8, 16), sinks=(2,), save_steps=1)
    whole = patched()
    expected = attention_transfer(whole, rows(), settings)

    class Killed(Exception):
        pass

    def stop(step):
        if step.step == cut + 1:  # written up to `cut`
            raise Killed

    file = tmp_path / "transfer.pt"
    with pytest.raises(Killed):
        attention_transfer(patched(), rows(), settings, checkpoint=file, on_step=stop)
    resumed = patched(seed=0)
    done = attention_transfer(resumed, rows(), settings, checkpoint=file)
    assert done == expected[cut:]
    pairs = zip(memory_parameters(whole).values(), memory_parameters(resumed).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert attention_transfer(resumed, rows(), settings, checkpoint=file) == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "transfer.pt"
    attention_transfer(patched(), rows(), TransferSettings(steps=2), checkpoint=file)
    with pytest.raises(CheckpointError, match=r"steps: 2 -> 4"):
        attention_transfer(patched(), rows(), TransferSettings(steps=4), checkpoint=file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        attention_transfer(patched(), rows(), TransferSettings(steps=2), checkpoint=file)


def test_what_cannot_be_fitted():
    with pytest.raises(ConfigError, match="no parameters"):
        attention_transfer(
            patched(WindowSinksConfig(sliding_window=16)), rows(), TransferSettings()
        )
    with pytest.raises(ConfigError, match="at least one row"):
        attention_transfer(patched(), [], TransferSettings())
    with pytest.raises(StateError, match="never longer than the window"):
        # the rows fit into the window: nothing is ever folded
        attention_transfer(patched(), rows(length=18), TransferSettings(steps=3))
