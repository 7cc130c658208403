"""LoLCATs, windowed: learned feature maps fold what leaves, under one normaliser with the window.

Zhang et al., 2024, arXiv:2410.10254.

Equations (one head; l = t - W leaves the window as t arrives)::

    phi(x)  = exp(s.(x - m)) [softmax((x - m) U), softmax(-(x - m) U)]     U starts at 1   [2K]
    S_t     = S_{t-1} + phi_k(k_l) v_l^T                                                   [2K, V]
    z_t     = z_{t-1} + phi_k(k_l)                                                         [2K]
    w_t     = c exp(b - gamma lse_t)                                       c starts at 0
    out_t   = (local_t + w_t phi_q(q_t)^T S_t) / (1 + w_t phi_q(q_t)^T z_t)                [V]

local_t is exact attention over sinks and window, lse_t the log of its normaliser.

Differs from the paper: (1) the weight w_t. There the window has a fixed weight, and its largest
score is subtracted from the window alone, so that the split ignores how large the window's scores
are; here both sides are on the scale of the scores (gamma = 1) and the state starts silent. (2) The
mean m and the scale s of each map, set from the model's own queries and keys before training
(`FeatureMapMemory.calibrate`); at s = m = 0 the maps are the published ones. (3) Sinks are kept.

Reduces to: the base model until something leaves; `window_sinks` at c = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.modules.feature_map import FeatureMapMemory
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2410.10254"
FAMILY = "compress"
IDENTITY = "window"


@dataclass(frozen=True, kw_only=True)
class LoLCATsConfig(MethodConfig):
    """How much is kept exactly, and where features are taken."""

    sliding_window: int = 1024
    """Tokens attended exactly, sinks not included. The authors use 64."""
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted."""
    state_heads: Literal["query", "key_value"] = "query"
    """A state per query head as published, or per KV head: smaller by their ratio."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""
    key_space: Literal["post_rope", "pre_rope"] = "post_rope"
    """Whether keys and queries meet the state with or without their positions; pre_rope keeps a
    second key in the window.
    """


LOLCATS = LoLCATsConfig(sliding_window=64)
"""The published window."""


def patch_lolcats(model: PreTrainedModel, config: LoLCATsConfig) -> None:
    """Give each selected attention layer a linear-attention state that shares its softmax's
    normaliser.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    def make(site: AttentionSite) -> FeatureMapMemory:
        per_query = config.state_heads == "query"
        return FeatureMapMemory(
            num_heads=site.num_heads,
            num_state_heads=site.num_heads if per_query else site.num_key_value_heads,
            key_dim=site.key_dim,
            value_dim=site.value_dim,
            sliding_window=config.sliding_window,
            num_sink_tokens=config.num_sink_tokens,
            key_space=config.key_space,
        )

    patch_attention(model, config, make)
