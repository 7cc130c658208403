"""Tiny random models of any causal language model type of Transformers.

The config of a type is made from its own defaults: what counts layers, heads, experts, rows or
features gets a small number by its name, and everything else stays. There are as many layers as it
takes to have each kind of layer that the type has. Weights are drawn wide, so that attention is far
from uniform and a token that is lost or seen twice shows in the logits.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

VOCABULARY = 101
POSITIONS = 256
SPREAD = 1.2
"""Standard deviation of a product of a unit vector with a row of weights."""

_NUMBERS = {
    32: """hidden_size d_model n_embd word_embed_proj_dim embedding_size input_embedding_size
        output_embedding_size emb_dim out_hidden_size hidden_size_global text_hidden_size
        projection_hidden_dim mm_embed_dim output_proj_dims adapter_out_dim lru_width
        pronunciation_embed_dim shape_embed_dim vision_output_dim""",
    48: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dff dim_ff
        ffn_hidden_size intermediate_size_mlp dense_intermediate_size feed_forward_size""",
    16: """moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank
        shared_intermediate_size moe_shared_expert_intermediate_size router_hidden_size d_rel
        shared_experts_intermediate_size hc_lowrank o_lora_rank""",
    12: "kv_lora_rank",
    10: "v_head_dim",
    8: """head_dim qk_nope_head_dim swa_head_dim dim_head kv_channels linear_key_head_dim
        linear_value_head_dim linear_head_dim mamba_d_state mamba_d_head state_size ssm_state_size
        mamba_head_dim mamba_num_heads mamba_chunk_size chunk_size index_topk index_head_dim
        mamba_n_heads attention_chunk_size hidden_size_per_layer_input laurel_rank adapter_rank
        index_block_size local_attention linear_num_value_heads""",
    6: "sliding_window sliding_window_size window_size attention_window_size",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads
        encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads
        swa_num_attention_heads linear_num_heads linear_num_key_heads num_experts n_routed_experts
        num_local_experts moe_num_experts qk_rope_head_dim rotary_dim mamba_dt_rank gated_norm_rank
        zero_expert_num ngram_vocab_size_base time_step_rank""",
    2: """num_key_value_heads swa_num_key_value_heads num_kv_heads kv_n_heads num_experts_per_tok
        moe_topk moe_top_k moe_k top_k_experts n_shared_experts num_shared_experts n_groups
        moe_num_shared_experts attn_layer_period expert_layer_period n_mamba_heads index_n_heads
        interleave_moe_layer_step heads_per_ngram hc_mult hc_count o_groups
        n_layer n_layers num_layers decoder_layers num_decoder_layers depth index_topk_blocks
        encoder_layers num_encoder_layers""",
    1: """n_group topk_group first_k_dense_replace num_dense_layers attn_layer_offset mamba_n_groups
        mamba_ngroups expert_layer_offset bos_token_id
        decoder_start_token_id moe_layer_start_index num_nextn_predict_layers split_ngram_parts""",
    0: "pad_token_id num_mtp_layers",
    VOCABULARY: """vocab_size decoder_vocab_size vocab_size_per_layer_input
        encoder_hash_byte_group_vocab""",
    POSITIONS: """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions
        context_length""",
}
SIZES: dict[str, int] = {name: size for size, names in _NUMBERS.items() for name in names.split()}

ABSENT = ("eos_token_id", "forced_eos_token_id", "forced_bos_token_id", "suppress_tokens")
"""Fields that end or steer a generation."""

_HYBRID = {
    "num_hidden_layers": 5,  # the second attention has the weights of the first
    "layers_block_type": [*2 * ["linear_attention"], "hybrid", "linear_attention", "hybrid"],
}
_SHARED = {"num_hidden_layers": 15, "num_kv_shared_layers": 5}
_INDEXED = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            }
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n": {"text_config": _SHARED},
    "gemma3n_text": _SHARED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "mamba2": {"num_heads": 8},
    "mistral": {"sliding_window": None},  # as all but its first checkpoints
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16)},
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
    "xlstm": {"chunk_size": 64, "hidden_size": 256},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID,
    "zamba2": _HYBRID,
    "zaya": {"num_experts_per_tok": 1},
}
"""What the names do not say, by type."""


_DRAFTS = "drafts from the hidden states, keys and values of another model, and reads none alone"
NOT_ALONE = {"gemma4_assistant": _DRAFTS, "gemma4_unified_assistant": _DRAFTS}
"""Types that are no language models by themselves, and why."""


class NoTinyModel(Exception):
    """There is no tiny model to try; not the fault of a memory.

    `expected`: the type is none by itself, or Transformers needs a package that is not installed.
    """

    def __init__(self, message: str, *, expected: bool = False) -> None:
        super().__init__(message)
        self.expected = expected


def causal_types() -> list[str]:
    """Every type of `AutoModelForCausalLM`, sorted. Imports none of them."""
    # asked for its keys, the mapping imports the configs of all
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping)


def tiny_config(name: str) -> PreTrainedConfig:
    """A small config of a type; where a type names a whole of which its language model is a part,
    of that part."""
    kind = CONFIG_MAPPING[name]
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    if not issubclass(kind, model.config_class):
        parts = [type(part) for part in vars(kind()).values()]
        kind = next((part for part in parts if issubclass(part, model.config_class)), kind)
    return _shrunk(kind, dict(SPECIAL.get(name, {})))


def _shrunk(kind: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    kwargs: dict[str, Any] = {name: SIZES[name] for name in names & SIZES.keys()}
    kwargs |= dict.fromkeys(names & set(ABSENT))
    default = kind()
    # a limit that a type does not have stays away
    kwargs = {
        name: size
        for name, size in kwargs.items()
        if not (name in _OPTIONAL and getattr(default, name, None) is None)
    }
    if "kv_lora_rank" in names and "num_key_value_heads" in names:
        kwargs["num_key_value_heads"] = SIZES["num_attention_heads"]
    if "is_decoder" in names:
        kwargs["is_decoder"] = True
    if "num_hidden_layers" in names:
        kwargs["num_hidden_layers"] = _layers(default)
    for name, value in vars(default).items():
        if isinstance(value, PreTrainedConfig):
            kwargs[name] = _shrunk(type(value), dict(special.pop(name, {})))
    return kind(**kwargs | special)


_OPTIONAL = {
    "sliding_window",
    "q_lora_rank",
    "attention_chunk_size",
    "n_inner",
    "shared_expert_intermediate_size",
    "mamba_d_head",
    "time_step_rank",
    "mamba_dt_rank",
    "lru_width",
}
"""Sizes that a type may be without: there the default decides."""


def _layers(config: PreTrainedConfig) -> int:
    """As many as show each kind of layer, at least two."""
    kinds = getattr(config, "layer_types", None) or ()
    return max([2, *(1 + kinds.index(kind) for kind in set(kinds))])


def tiny_model(name: str) -> PreTrainedModel:
    """A random model of a type in eval mode, float32: the same weights for the same name.

    Raises:
        NoTinyModel: Transformers cannot make it; the message says why.
    """
    if name in NOT_ALONE:
        raise NoTinyModel(NOT_ALONE[name], expected=True)
    try:
        config = tiny_config(name)
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = kind(config)
            _spread(model)
    except Exception as error:
        missing = isinstance(error, ImportError)
        raise NoTinyModel(f"{type(error).__name__}: {error}", expected=missing) from error
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _spread(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=SPREAD / parameter.shape[-1] ** 0.5)
        elif parameter.is_floating_point():
            parameter.add_(0.1 * torch.randn_like(parameter))


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random ids [rows, length], none of the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, VOCABULARY, (rows, length), generator=generator)
