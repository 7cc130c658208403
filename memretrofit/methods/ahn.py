"""Artificial Hippocampus Networks: what leaves the window is folded into a fixed-size state.

Fang et al., 2025, arXiv:2510.07318; details of normalisation and gates from the authors' code.

Equations (one head; x the attention module's input; l = t - W leaves the window as t arrives)::

    local_t = softmax attention of q_t over sinks and window                               [V]
    S_t     = rule(S_{t-1}; k_l / |k_l|, v_l, g(x_l), beta(x_l))     the leaver writes     [K, V]
    r_t     = S_t^T q_t / (s |q_t|)                                  the newcomer reads    [V]
    out_t   = local_t + A (RMSNorm(r_t) * silu(w_g . x_t))           A starts at zero      [V]

    gated_delta: g = -exp(a) softplus(w_a . x + d),  beta = sigmoid(w_b . x)
    delta:       g = 0,                              beta = sigmoid(w_b . x)
    ssd:         g = -exp(a) dt,                     beta = dt = softplus(w_d . x + c + d)
                 and the gate comes before a norm over all heads
    s = sqrt(K), but 1 for ssd

Keys and values are repeated to query heads, after the rotary embedding (and after qk-norm where a
model has it).

Differs from the paper: W does not count the sinks (the released training code counts them in); the
authors' GatedDeltaNet carries a parameter per head that nothing reads, left out here.
`key_space` and `center_keys` are ours; their defaults are the published form.

Reduces to: the base model until something leaves; `window_sinks` at A = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.modules.recurrent import RecurrentMemory, Rule
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2510.07318"
FAMILY = "compress"
IDENTITY = "window"


@dataclass(frozen=True, kw_only=True)
class AHNConfig(MethodConfig):
    """How much is kept exactly, and how the rest is written."""

    rule: Rule = "gated_delta"
    """How a leaving pair is written: with decay and correction, with correction, with decay
    (Mamba-2).
    """
    sliding_window: int = 1024
    """Tokens attended exactly, sinks not included. Larger is closer to the base model and costs
    more cache.
    """
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted. The paper evaluates with 128."""
    state_heads: Literal["query", "key_value"] = "query"
    """A state per query head as published, or per KV head: smaller by their ratio."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""
    key_space: Literal["post_rope", "pre_rope"] = "post_rope"
    """Whether keys and queries meet the state with or without their positions; pre_rope keeps a
    second key in the window.
    """
    center_keys: bool = False
    """Subtract a learned mean from the keys before they are normalised."""


AHN_GDN = AHNConfig(rule="gated_delta")
"""AHN-GatedDeltaNet: the released checkpoints with the best averages (tables 2 and 3)."""
AHN_DN = AHNConfig(rule="delta")
"""AHN-DeltaNet."""
AHN_MAMBA2 = AHNConfig(rule="ssd")
"""AHN-Mamba2."""


def patch_ahn(model: PreTrainedModel, config: AHNConfig) -> None:
    """Give each selected attention layer a recurrent memory beside its window.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    def make(site: AttentionSite) -> RecurrentMemory:
        per_query = config.state_heads == "query"
        return RecurrentMemory(
            rule=config.rule,
            hidden_size=site.hidden_size,
            num_heads=site.num_heads,
            num_state_heads=site.num_heads if per_query else site.num_key_value_heads,
            key_dim=site.key_dim,
            value_dim=site.value_dim,
            sliding_window=config.sliding_window,
            num_sink_tokens=config.num_sink_tokens,
            key_space=config.key_space,
            center_keys=config.center_keys,
        )

    patch_attention(model, config, make)
