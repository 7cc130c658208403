"""The fingerprint names the base model's weights: nothing else changes it, and other weights do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from saved_models import llama, memory_for, randomise

from memretrofit import patch, unpatch
from memretrofit.description import base_parameters
from memretrofit.errors import StateError
from memretrofit.hub import load_base, weight_fingerprint
from memretrofit.hub.fingerprint import SAMPLE


def test_a_patch_does_not_change_it() -> None:
    model = llama()
    names = [name for name, _ in base_parameters(model)]
    fingerprint = weight_fingerprint(model)
    randomise(patch(model, memory_for()), seed=1)
    assert [name for name, _ in base_parameters(model)] == names
    assert weight_fingerprint(model) == fingerprint
    assert weight_fingerprint(unpatch(model)) == fingerprint


def test_two_loads_in_float32_and_bfloat16_agree(base: Path) -> None:
    single, half = load_base(base), load_base(base, dtype=torch.bfloat16)
    assert next(half.parameters()).dtype is torch.bfloat16
    assert weight_fingerprint(single) == weight_fingerprint(half) == weight_fingerprint(llama())
    # the witness: the bytes themselves differ
    name, parameter = next(base_parameters(single))
    other = dict(base_parameters(half))[name]
    assert parameter.detach().numpy().tobytes() != other.detach().float().numpy().tobytes()


def test_a_bfloat16_checkpoint_agrees_in_every_dtype() -> None:
    model = llama().bfloat16()
    fingerprint = weight_fingerprint(model)
    assert weight_fingerprint(model.float()) == fingerprint
    assert weight_fingerprint(model.double()) == fingerprint


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_one_value_of_a_small_tensor_changes_it(name: str) -> None:
    model = llama()
    fingerprint = weight_fingerprint(model)
    weight = model.get_parameter(name)
    assert weight.numel() <= SAMPLE
    weight.data.view(-1)[-1] += 0.5
    assert weight_fingerprint(model) != fingerprint


def test_swapped_layers_and_transposed_weights_change_it() -> None:
    model = llama()
    fingerprint = weight_fingerprint(model)
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp
    assert weight_fingerprint(model) != fingerprint
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp
    weight = layers[0].self_attn.q_proj.weight
    weight.data = weight.data.T.contiguous()
    assert weight_fingerprint(model) != fingerprint


def test_samples_of_a_large_tensor_reach_every_column() -> None:
    """Widths are powers of two: a step that shared a factor with them would miss whole columns."""
    module = torch.nn.Linear(512, 1024, bias=False)
    fingerprint = weight_fingerprint(module)
    for column in range(0, 512, 37):
        kept = module.weight.data[:, column].clone()
        module.weight.data[:, column] += 1
        assert weight_fingerprint(module) != fingerprint, column
        module.weight.data[:, column] = kept
    assert weight_fingerprint(module) == fingerprint
    # what it does not promise: a single value between the samples
    changed = 0
    for index in range(100):
        module.weight.data.view(-1)[index] += 1
        changed += weight_fingerprint(module) != fingerprint
        module.weight.data.view(-1)[index] -= 1
    assert 0 < changed < 100


def test_tied_weights_count_once() -> None:
    tied = llama(tie_word_embeddings=True)
    names = [name for name, _ in base_parameters(tied)]
    assert "lm_head.weight" not in names
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" in [name for name, _ in base_parameters(llama())]


def test_weights_that_are_not_here() -> None:
    with torch.device("meta"):
        model = llama()
    with pytest.raises(StateError, match="meta device"):
        weight_fingerprint(model)
