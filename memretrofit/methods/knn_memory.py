"""Memorizing Transformer: each head looks up the nearest stored tokens, and a gate mixes them in.

Wu et al., 2022, arXiv:2203.08913. LongMem (arXiv:2306.07174) mixes in the same way.

Equations (one query head h and its KV head; q, k before the rotary embedding R; window W; for
positions="clamp")::

    left(t)  = tokens at t - W or before, no sinks
    near(t)  = the top_k of left(t) by  (R(W) q_t) . k_j                 [at most top_k]
    far_t    = softmax over near(t) of  (R(W) q_t) . k_j,  times v_j     [V]
    local_t  = softmax attention of q_t over sinks and window            [V]
    g_h      = tanh(max(b_h, 0))                                         b starts at zero
    out_t    = (1 - g_h) local_t + g_h far_t                             [V]

Differs from the paper: (1) the gate is closed at the start, there g = sigmoid(b), because a
pretrained model has never seen the mixture. (2) Queries and keys are not normalised: there it keeps
keys that older weights made comparable with new ones, and here all were made by the same; search
and softmax use the model's own scores, as there both use one score. (3) The paper gives far tokens
no position bias; with rotary embeddings they all stand at the border of the window (`positions`).
(4) The store holds all that left, there up to the last 262k tokens, and it begins empty with each
text. (5) With LoRA, gradients reach the stored tokens, which belong to the same forward (so a
store off the device refuses to train); there memory is older than the step and gets none.
(6) The search is exact.

Reduces to: `window_sinks` at b <= 0; far_t alone as b grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.errors import NoTargetError
from memretrofit.modules.knn import KNNMemory
from memretrofit.modules.memory import AttentionMemory
from memretrofit.modules.slab import Placement
from memretrofit.patching.sites import AttentionSite, find_attention_sites
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2203.08913"
FAMILY = "recall"
IDENTITY = "window"


@dataclass(frozen=True, kw_only=True)
class KNNMemoryConfig(MethodConfig):
    """How much is kept exactly, and which layers look up how much."""

    sliding_window: int = 512
    """Tokens attended exactly, the current one included, sinks not included. The paper's window."""
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted."""
    top_k: int = 32
    """Stored tokens that each head attends. The paper's number."""
    positions: Literal["absolute", "clamp", "grouped"] = "clamp"
    """Where stored keys stand (`modules.positions`): at their `absolute` place; all at the border
    of the window (`clamp`); or `grouped`, beyond it in steps. Sinks stay at their own place. Not
    `reindexed`: of a token that returns, a search finds either, which would move all it found.
    """
    position_group: int = 8
    """Far tokens that share a position under `grouped`: W + T / position_group positions are used.
    """
    placement: Placement = "device"
    """Where stored values lie; see `infllm`. Keys stay on the device, where every query is compared
    with all of them.
    """
    hot_bytes: int = 0
    """Bytes on the device, for each layer, of values that were fetched last from host or disk."""
    memory_layers: tuple[int, ...] | None = None
    """Patched layers with a memory; the others have sinks and window alone. None: all. The paper
    has one, near the top.
    """
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""

    def problems(self) -> list[str]:
        """A memory needs a patched layer."""
        wanted, patched = self.memory_layers, self.layers_to_transform
        if wanted is not None and not wanted:
            return ["memory_layers=() is empty; None means every patched layer"]
        outside = sorted(set(wanted or ()) - set(patched or wanted or ()))
        if outside:
            return [
                f"memory_layers names {outside}, which layers_to_transform={patched} does not "
                "patch; add them there"
            ]
        return []


def patch_knn_memory(model: PreTrainedModel, config: KNNMemoryConfig) -> None:
    """Give each selected attention layer a store of what leaves its window, and a gate per head.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """
    wanted = config.memory_layers
    layers = {site.layer_idx for site in find_attention_sites(model) if site.patchable}
    if wanted is not None and not layers.issuperset(wanted):
        raise NoTargetError(
            f"memory_layers={wanted}: {type(model).__name__} has no layer for a memory at "
            f"{sorted(set(wanted) - layers)}; it has {sorted(layers)}."
        )

    def make(site: AttentionSite) -> AttentionMemory:
        exact = {
            "sliding_window": config.sliding_window,
            "num_sink_tokens": config.num_sink_tokens,
        }
        if wanted is not None and site.layer_idx not in wanted:
            return AttentionMemory(**exact)
        return KNNMemory(
            num_heads=site.num_heads,
            num_key_value_heads=site.num_key_value_heads,
            key_dim=site.key_dim,
            value_dim=site.value_dim,
            top_k=config.top_k,
            positions=config.positions,
            position_group=config.position_group,
            placement=config.placement,
            hot_bytes=config.hot_bytes,
            **exact,
        )

    patch_attention(model, config, make)
