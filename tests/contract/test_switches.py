"""Switches, copies and owners: what a hostile afternoon found, kept from coming back."""

from __future__ import annotations

import copy

import pytest
import torch
from families import build, tokens
from transformers import DynamicCache

from memretrofit import AHNConfig, LoLCATsConfig, patch
from memretrofit.errors import ConfigError, StateError, UnsupportedModelError
from memretrofit.patching.controls import controls, memory_disabled, writes_disabled

SMALL = AHNConfig(sliding_window=8, num_sink_tokens=2)


def test_contexts_that_overlap_without_nesting_leave_nothing_on():
    model = patch(build("llama"), SMALL)
    first, second = memory_disabled(model), memory_disabled(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert controls(model).disabled
    with writes_disabled(model):
        second.__exit__(None, None, None)
        assert not controls(model).disabled
        assert not controls(model).writes
    assert controls(model).writes


@torch.no_grad()
def test_a_copy_of_a_model_is_another_owner_and_a_copy_of_a_cache_is_not():
    model = patch(build("llama"), SMALL)
    ids = tokens(1, 30)
    cache = model(ids[:, :20]).past_key_values
    expected = model(ids[:, 20:], past_key_values=copy.deepcopy(cache)).logits
    with pytest.raises(StateError, match="another patched model"):
        copy.deepcopy(model)(ids[:, 20:], past_key_values=copy.deepcopy(cache))
    assert torch.equal(model(ids[:, 20:], past_key_values=cache).logits, expected)


@torch.no_grad()
def test_early_exit_drafts_leave_the_model_whole():
    model = patch(build("llama", layers=3), SMALL)
    ids = tokens(1, 20)
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    drafted = model.generate(
        ids, max_new_tokens=8, do_sample=False, pad_token_id=0, assistant_early_exit=1
    )
    assert torch.equal(drafted, greedy)
    assert model.config.num_hidden_layers == 3


def test_another_attention_implementation_is_refused_by_name():
    model = patch(build("llama"), SMALL)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="flex_attention"):
        model(tokens(1, 4))


def test_unknown_fields_are_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"sliding_windw.*sliding_window"):
        AHNConfig(sliding_windw=3)
    with pytest.raises(ConfigError, match="sinks"):
        patch(build("llama"), LoLCATsConfig(sliding_window=500, num_sink_tokens=10**6))


def test_a_cropped_cache_says_what_crop_takes():
    model = patch(build("llama"), SMALL)
    cache = DynamicCache()
    model(tokens(1, 6), past_key_values=cache)
    for wrong in (3, -7):
        with pytest.raises(StateError, match="minus the number"):
            cache.crop(wrong)
    cache.crop(-2)
    assert cache.get_seq_length() == 4
