"""What trains, by name; and the error when it does not."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from torch import nn
from training.tiny import patched

from memretrofit import AHNConfig, LoLCATsConfig, WindowSinksConfig
from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.methods.armt import ARMTConfig
from memretrofit.methods.rmt import RMTConfig
from memretrofit.methods.tokmem import TokMemConfig
from memretrofit.patching.vocabulary import open_procedures, vocabulary_ledger_of
from memretrofit.retrofit import memory_parameters
from memretrofit.training import (
    GradientWatch,
    load_parameters,
    save_parameters,
    trainable_parameters,
)
from memretrofit.training.trainable import parameter_groups


@pytest.mark.parametrize("method", [AHNConfig(sliding_window=16), LoLCATsConfig(sliding_window=16)])
def test_memory_alone(method):
    model = patched(method)
    same, promised = trainable_parameters(model)
    assert same is model
    assert list(promised) == list(memory_parameters(model))
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == set(promised)
    assert all(".memory." in name for name in learning)


@pytest.mark.parametrize(
    "method",
    [
        AHNConfig(sliding_window=16),
        RMTConfig(segment_length=16),  # beside the decoder
        ARMTConfig(segment_length=16),  # and in layers
        ARMTConfig(segment_length=16, layers_to_transform=(1,)),
    ],
    ids=["attention", "decoder", "layers", "one layer"],
)
def test_lora_reaches_every_projection_and_never_the_memory(method):
    model = patched(method)
    wrapped, promised = trainable_parameters(model, "memory+lora", lora_rank=2)
    assert isinstance(wrapped, PeftModel)
    lora = {name for name in promised if ".lora_" in name}
    expected = {
        f"model.layers.{layer}.self_attn.{projection}.lora_{side}.default.weight"
        for layer in range(2)
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj")
        for side in "AB"
    }
    assert lora == expected
    assert set(promised) - lora == set(memory_parameters(model))
    learning = {id(p) for p in wrapped.parameters() if p.requires_grad}
    assert learning == {id(p) for p in promised.values()}


def test_only_the_newest_procedures_train():
    """Rows that wait and rows that were learned keep their bits, however often this is asked, and
    inside an adapter, which freezes them all. Witness: the rows that are open."""
    model = patched(TokMemConfig(num_procedures=5))
    open_procedures(model, 2)
    open_procedures(model, 3)
    for mode in ("memory", "memory", "memory+lora", "memory+lora"):
        model, promised = trainable_parameters(model, mode, lora_rank=2)
        rows = vocabulary_ledger_of(model).memory.rows
        assert [row.requires_grad for row in rows] == [False, False, True, False, False]
        assert [name for name in promised if ".rows." in name] == [
            "model.embed_tokens.memory.rows.2"
        ]


def test_what_cannot_train():
    with pytest.raises(ConfigError, match="all 5 parameters of the method tokmem are closed"):
        trainable_parameters(patched(TokMemConfig(num_procedures=5)))
    with pytest.raises(ConfigError, match="window_sinks has no parameters"):
        trainable_parameters(patched(WindowSinksConfig(sliding_window=16)))
    with pytest.raises(ConfigError, match=r"expected memory or memory\+lora"):
        trainable_parameters(patched(), "lora")  # type: ignore[arg-type]


def test_decay_spares_gains_and_biases():
    matrix, gain = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    decayed, spared = parameter_groups([gain, matrix], 0.1)
    assert decayed == {"params": [matrix], "weight_decay": 0.1}
    assert spared == {"params": [gain], "weight_decay": 0.0}


def test_a_parameter_without_gradient_is_named():
    live, lost = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    watch = GradientWatch({"live": live, "a.memory.lost": lost})
    live.grad = torch.ones(2)
    watch.observe()
    watch.observe()
    with pytest.raises(StateError, match=r"in 3 steps: a\.memory\.lost"):
        watch.observe()


@pytest.mark.parametrize(
    ("gradients", "faulty"),
    [
        ([0.0, 0.0, 1.0], False),  # behind a zero-initialised output at first
        ([0.0, 0.0, 0.0], True),
        ([0.0, 0.0], True),
        ([0.0], False),  # one step cannot tell
        ([None], True),
        ([1.0], False),
    ],
)
def test_a_gradient_may_come_late_but_must_come(gradients, faulty):
    parameter = nn.Parameter(torch.ones(2))
    watch = GradientWatch({"p": parameter})

    def run():
        for value in gradients:
            parameter.grad = None if value is None else torch.full((2,), value)
            watch.observe()
        watch.finish()

    if faulty:
        with pytest.raises(StateError, match="p"):
            run()
    else:
        run()


def test_files_are_all_or_nothing(tmp_path):
    path = tmp_path / "trained.safetensors"
    _, saved = trainable_parameters(patched(seed=0))
    save_parameters(saved, path)
    _, loaded = trainable_parameters(patched(seed=1))
    load_parameters(loaded, path)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    fewer = dict(list(loaded.items())[1:])
    with pytest.raises(CheckpointError, match="1 differ"):
        load_parameters(fewer, path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_parameters(loaded, path)
