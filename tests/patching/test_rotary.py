"""Undoing and shifting rotary embeddings with the model's own functions."""

from __future__ import annotations

import pytest
import torch
from contract.families import FAMILIES, build, tokens
from contract.runs import apart, one_pass
from methods.captured import attention_of
from tolerances import ONE_LAYER, WRONG
from transformers import LlamaForCausalLM

from memretrofit.methods.ahn import AHNConfig
from memretrofit.patching.rotary import find_rotary, slot_steps, unrotate
from memretrofit.retrofit import patch

PROJECTION = {
    "llama": lambda m, x: m.k_proj(x),
    "mixtral": lambda m, x: m.k_proj(x),
}


def captured(family):
    model = patch(build(family, layers=1), AHNConfig(sliding_window=8, num_sink_tokens=3))
    return model, attention_of(model, tokens(2, 20))


@pytest.mark.parametrize("family", list(PROJECTION))
def test_unrotated_keys_are_the_projection(family):
    """What the model computed before its rotary embedding. Witness: the rotated keys, and a
    rotation the other way."""
    _, found = captured(family)
    rows, length, _ = found.hidden.shape
    with torch.no_grad():
        before = (
            PROJECTION[family](found.module, found.hidden).view(rows, length, 2, 8).transpose(1, 2)
        )
    assert apart(unrotate(found.module, found.key, found.cos_sin), before) < ONE_LAYER
    assert apart(found.key, before) > WRONG
    cos, sin = found.cos_sin
    assert apart(unrotate(found.module, found.key, (cos, -sin)), before) > WRONG


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox", "mixtral"])
def test_turning_back_is_rotation_at_another_position(family):
    """Turned back by p steps, the query at p stands at 0: equal to the unrotated one. Clamped
    steps turn nothing."""
    model, found = captured(family)
    rotary = find_rotary(model, found.module)
    positions = torch.arange(20)[None]
    turned = rotary.turn_back(found.module, found.query, positions)
    assert apart(turned, unrotate(found.module, found.query, found.cos_sin)) < ONE_LAYER
    assert torch.equal(rotary.turn_back(found.module, found.query, positions * 0), found.query)
    late = rotary.turn_back(found.module, found.query, positions + 1)
    assert apart(late, turned) > WRONG


def test_each_layer_type_has_its_own_angles():
    """Gemma-3 rotates its full layers with another base than its sliding ones."""
    model = build("gemma3", layers=2)
    full = find_rotary(model, model.model.layers[0].self_attn)
    sliding = find_rotary(model, model.model.layers[1].self_attn)
    assert (full.layer_type, sliding.layer_type) == ("full_attention", "sliding_attention")


def test_steps_begin_where_the_cache_is_full():
    assert slot_steps(torch.tensor([0, 9, 10, 11, 12, 40]), 11).tolist() == [0, 0, 0, 1, 2, 30]


def test_scaled_rotary_embeddings_are_undone_with_their_scale():
    """YaRN multiplies cos and sin by a factor; un-rotated keys of AHN are normalised, so only
    the direction counts."""
    config = FAMILIES["llama"](1)
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    model = LlamaForCausalLM(config).eval()
    scale = model.model.rotary_emb.attention_scaling
    assert scale > 1.01
    patch(model, AHNConfig(sliding_window=8, num_sink_tokens=3))
    found = attention_of(model, tokens(1, 20))
    rotary = find_rotary(model, found.module)
    turned = rotary.turn_back(found.module, found.query, torch.arange(20)[None])
    expected = found.module.q_proj(found.hidden).view(1, 20, 4, 8).transpose(1, 2) * scale
    assert apart(turned, expected.detach()) < ONE_LAYER
    assert one_pass(model, tokens(1, 20)).isfinite().all()
