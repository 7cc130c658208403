"""What a model that reads in segments refuses, and what a crop gives back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.families import FAMILIES, POSITIONS, VOCABULARY, build, tokens
from contract.runs import apart, left_padded
from tolerances import REORDERED, WRONG
from transformers import (
    DynamicCache,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from memretrofit import patch
from memretrofit.errors import ConfigError, StateError, UnsupportedModelError
from memretrofit.methods.armt import ARMTConfig
from memretrofit.methods.memoryllm_pool import MemoryLLMPoolConfig
from memretrofit.methods.mplus import MPlusConfig
from memretrofit.methods.rmt import RMTConfig

RMT = RMTConfig(segment_length=8, num_memory_tokens=2)
ARMT = ARMTConfig(segment_length=8, num_memory_tokens=2, memory_dim=8)
POOL = MemoryLLMPoolConfig(segment_length=8, num_memory_tokens=2, num_blocks=2)
MPLUS = MPlusConfig(
    segment_length=8, query_length=2, num_memory_tokens=2, num_blocks=2, top_k=2, long_term_size=3
)


def sliding(method=RMT, window=16):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
    )
    return patch(MistralForCausalLM(config).eval(), method)


def test_a_text_that_begins_at_a_border_is_packed_too():
    """Each segment's own positions rise; only the whole call shows that two texts are one row."""
    model, ids = patch(build("llama"), RMT), tokens(1, 20)
    packed = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with pytest.raises(StateError, match="packed"):
        model(ids, position_ids=packed)
    model(ids, position_ids=torch.arange(20)[None])  # one text


@pytest.mark.parametrize("width", [4, 30])
def test_a_mask_is_as_wide_as_the_text(width):
    model, cache, ids = patch(build("llama"), RMT), DynamicCache(), tokens(2, 10)
    model(ids[:, :6], past_key_values=cache)
    with pytest.raises(StateError, match=f"{width} tokens wide.*has 10: 6 that"):
        model(ids[:, 6:], past_key_values=cache, attention_mask=torch.ones(2, width))
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("use_cache", [True, False])
def test_checkpointing_is_refused_with_any_cache(use_cache):
    model = patch(build("llama"), RMT).train()
    model.activation_checkpointing_enable()
    with pytest.raises(UnsupportedModelError, match="credit: replay"):
        model(tokens(1, 20), use_cache=use_cache)


def test_a_segment_has_to_fit_the_positions():
    config = RMTConfig(segment_length=POSITIONS, num_memory_tokens=2)
    model = patch(build("llama"), config)
    with pytest.raises(ConfigError, match=f"takes {POSITIONS + 5} positions"):
        model(tokens(1, POSITIONS))
    model(tokens(1, POSITIONS - 5))


@torch.no_grad()
def test_a_crop_where_columns_were_put_side_by_side():
    """A sliding window counts columns, so those of padding go; what was cropped is that row's."""
    model, ids = sliding(), tokens(2, 14)
    padded, mask = left_padded([ids[0], ids[1, :9]])
    expected = model(padded, attention_mask=mask, use_cache=False).logits
    cache = DynamicCache()
    cache.layers.clear()
    model(padded[:, :1], attention_mask=mask[:, :1], past_key_values=cache)
    cache.layers[0].activate_past_recording()
    wrong = padded.clone()
    wrong[:, 11:] = (wrong[:, 11:] + 1) % VOCABULARY
    model(wrong[:, 1:13], attention_mask=mask[:, :13], past_key_values=cache)
    cache.crop(-2)
    assert cache.layers[0].counts.tolist() == mask[:, :11].sum(-1).tolist()
    found = model(padded[:, 11:], attention_mask=mask, past_key_values=cache).logits
    assert apart(found, expected[:, 11:]) < REORDERED
    uncropped = DynamicCache()
    model(wrong[:, :11], attention_mask=mask[:, :11], past_key_values=uncropped)
    model(wrong[:, 11:13], attention_mask=mask[:, :13], past_key_values=uncropped)
    witness = model(padded[:, 13:], attention_mask=mask, past_key_values=uncropped).logits
    assert apart(witness, expected[:, 13:]) > WRONG


@torch.no_grad()
def test_rows_that_train_on_do_not_move_a_conversation():
    model, cache, ids = patch(build("llama"), RMT), DynamicCache(), tokens(1, 5)
    model(ids, past_key_values=cache)
    before = cache.layers[0].state["memory"].clone()
    model.get_decoder().memory.first.weight.add_(1.0)
    assert torch.equal(cache.layers[0].state["memory"], before)


def test_a_session_can_be_cut_off_its_graph():
    model, cache = patch(build("llama"), ARMT), DynamicCache()
    model(tokens(1, 12), past_key_values=cache)
    session = cache.layers[0]
    assert any(x.requires_grad for x in session.state.values())
    session.detach()
    assert not any(x.requires_grad for x in session.state.values())
    model(tokens(1, 8, seed=3), past_key_values=cache).logits.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("config", [ARMT, RMT, POOL], ids=lambda x: x.method)
def test_reading_on_waits_for_no_device(config, monkeypatch):
    """What is read, and by whom, is decided on the CPU: a model without numbers reads token by
    token over the borders of three segments. Witness: to ask such a device for a number fails."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # it knows no meta device
    with torch.device("meta"):
        model = LlamaForCausalLM(FAMILIES["llama"](2)).eval()
    patch(model, config)
    cache, ids = DynamicCache(), torch.zeros(2, 1, dtype=torch.long, device="meta")
    for _ in range(20):
        output = model(ids, past_key_values=cache)
    assert output.logits.is_meta
    assert cache.layers[0].counts.tolist() == [20, 20]
    with pytest.raises(RuntimeError, match="meta"):
        bool(output.logits.any())


@torch.no_grad()
def test_a_token_is_kept_without_copying_those_before_it():
    """A pool reads its segment again. Witness: asked for all at once, they are one tensor."""
    model, cache, ids = patch(build("llama"), POOL), DynamicCache(), tokens(2, 13)
    model(ids[:, :11], past_key_values=cache)
    session = cache.layers[0]
    before = session.pieces
    for place in (11, 12):
        model(ids[:, place : place + 1], past_key_values=cache)
    assert len(session.pieces) == len(before) + 2
    assert all(a is b for a, b in zip(session.pieces, before, strict=False))
    embedded = model.get_input_embeddings()(ids)
    assert torch.equal(session.embeds, embedded[:, -session.embeds.shape[1] :])
    assert len(session.pieces) == 1


def test_a_pool_behind_a_short_window_recalls_nothing():
    """A sliding layer whose window ends inside the pool has no store, the layers around it have;
    where all are such layers, it is refused."""
    model = patch(build("gemma3"), replace(MPLUS, num_blocks=3))
    cache = DynamicCache()
    model(tokens(1, 8), past_key_values=cache)
    stores = {name for name in cache.layers[0].state if name.endswith("store_key")}
    assert stores == {"0.store_key", "2.store_key"}
    assert {"0.pool", "1.pool", "2.pool"} <= set(cache.layers[0].state)
    with pytest.raises(UnsupportedModelError, match=r"at most 5 columns.*memoryllm_pool"):
        sliding(MPLUS, window=5)
    sliding(MPLUS, window=6)


def test_layers_with_inputs_of_their_own_are_refused():
    """They are made from ids, which memory tokens do not have."""
    config = Gemma3nTextConfig(
        vocab_size=VOCABULARY,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=[48, 48],
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        layer_types=["full_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
    )
    with pytest.raises(UnsupportedModelError, match="inputs of each layer from token ids"):
        patch(Gemma3nForCausalLM(config).eval(), ARMT)
