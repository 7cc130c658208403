"""Tiny random models of the families that the contract is held to. Their weights are a function
of the seed.

Weights are drawn ten times wider than by default: attention is then far from uniform, and a
token that is
lost or seen twice shows in the logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

VOCABULARY = 101
POSITIONS = 256


def _config(kind: Callable[..., PreTrainedConfig], layers: int, **special: Any) -> PreTrainedConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,  # generation always runs to its full length
    }
    return kind(**sizes | special)


FAMILIES: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": lambda layers: _config(LlamaConfig, layers),
    "qwen3": lambda layers: _config(Qwen3Config, layers),
    "gemma3": lambda layers: _config(
        Gemma3TextConfig,
        2 * layers - 1,
        sliding_window=6,
        query_pre_attn_scalar=8,
        # a sliding layer between any two full ones, so that `layers` counts those that are patched
        layer_types=(["full_attention", "sliding_attention"] * layers)[:-1],
    ),
    "gpt_neox": lambda layers: _config(
        GPTNeoXConfig,
        layers,
        num_key_value_heads=4,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
    ),
    "mixtral": lambda layers: _config(
        MixtralConfig, layers, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": lambda layers: _config(
        DeepseekV3Config,
        layers,
        num_key_value_heads=4,
        kv_lora_rank=12,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=10,
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        head_dim=4,
    ),
}


@functools.cache
def _weights(family: str, layers: int, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return _empty(family, layers, "sdpa").state_dict()


def _empty(family: str, layers: int, implementation: str) -> PreTrainedModel:
    config = FAMILIES[family](layers)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def build(
    family: str, *, layers: int = 2, seed: int = 0, implementation: str = "sdpa"
) -> PreTrainedModel:
    """A fresh model in eval mode, float32: the same arguments give the same weights."""
    with torch.random.fork_rng():
        weights = _weights(family, layers, seed)
        model = _empty(family, layers, implementation)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random ids [rows, length], without the pad id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator)
