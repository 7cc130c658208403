"""Where a bank enters a model: experts, tuples, flattened outputs, and what is refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    Llama4TextConfig,
    MambaConfig,
    OPTConfig,
    Qwen3MoeConfig,
    RwkvConfig,
)

from memretrofit.errors import NoTargetError, UnsupportedModelError
from memretrofit.methods.hierarchical_ffn import HierarchicalFFNConfig
from memretrofit.methods.token_lookup import TokenLookupConfig
from memretrofit.modules.bank import Tokens
from memretrofit.patching.ffn import bank_of
from memretrofit.patching.ffn_sites import find_bank_sites
from memretrofit.retrofit import memory_parameters, patch, unpatch

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
ENTERED = {
    "llama4": Llama4TextConfig(
        **SIZES, **EXPERTS, intermediate_size_mlp=48, interleave_moe_layer_step=2
    ),
    "gpt_oss": GptOssConfig(**SIZES, **EXPERTS),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
IDS = torch.arange(1, 25).view(2, 12)


@pytest.mark.parametrize("name", ENTERED)
@torch.no_grad()
def test_experts_tuples_and_flattened_outputs(name):
    """Exact at the start, live with rows that are not zero, and off again bit for bit."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ENTERED[name]).eval()
    assert [site.layer_idx for site in find_bank_sites(model, "ffn")] == [0, 1]
    expected = model(IDS, use_cache=False).logits
    patch(model, TokenLookupConfig())
    assert torch.equal(model(IDS, use_cache=False).logits, expected)
    bank = bank_of(model)
    for name, index in bank.addresses(Tokens(ids=IDS, new=12)).items():
        bank.table(name).open(index)
    for parameter in memory_parameters(model).values():
        parameter.add_(1.0)
    assert not torch.allclose(model(IDS, use_cache=False).logits, expected, atol=1e-3)
    assert torch.equal(unpatch(model)(IDS, use_cache=False).logits, expected)


def test_what_has_no_such_child_is_refused():
    model = AutoModelForCausalLM.from_config(
        OPTConfig(
            vocab_size=101,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
        )
    )
    with pytest.raises(UnsupportedModelError, match=r"(?s)child named mlp.*found .*fc1"):
        patch(model, HierarchicalFFNConfig())
    assert not hasattr(model.get_decoder(), "memory")


@pytest.mark.parametrize(
    ("config", "place"),
    [
        (RwkvConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2), "layer"),
        (MambaConfig(vocab_size=101, hidden_size=32, num_hidden_layers=2), "layer"),
    ],
    ids=["rwkv", "mamba"],
)
def test_a_conversation_that_is_in_no_cache_is_refused(config, place):
    """Each step would be looked up as the beginning of a text."""
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError):
        find_bank_sites(model, place)


def test_layers_that_are_not_there():
    model = AutoModelForCausalLM.from_config(ENTERED["qwen3_moe"])
    with pytest.raises(NoTargetError, match=r"layers \[7\]"):
        patch(model, HierarchicalFFNConfig(layers_to_transform=(0, 7)))
