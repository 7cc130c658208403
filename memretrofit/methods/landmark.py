"""Landmark attention: a learned key per block decides which blocks a query reads, and how much.

Mohtashami and Jaggi, 2023, arXiv:2305.16300; details from the authors' code.

Equations (one head; q, k before the rotary embedding R; window W, blocks of S tokens)::

    l_n     = sum_j softmax_j(u . k_j / sqrt(K)) R (k_j + d)   over block n, once it is full  [K]
    open(t) = { n : every token of block n is at t - W or before }
    far(t)  = the top_k blocks of open(t) by  sum over the KV head's queries of  (R q_t) . l_n
    near(t) = sinks, window, and what has left the window and fills no block yet
    a_t     = softmax over  { s_tj : j in near(t) }  and  { scale (R q_t) . l_n + b : n in far(t) }
    out_t   = sum_j a_tj v_j  +  sum_n a_tn sum_i softmax_i(s_ti) v_i      i over block n  [V]

Differs from the paper: (1) There a token is inserted into the text after every S, and its key is
the landmark. A retrofit leaves tokens, positions and masks to the user, so l_n is pooled from the
block's keys: u, d [K] per KV head, b per head. Training adapts q and k with it (LoRA), there
the whole model. (2) The heads that share a KV head share its landmarks and their choice.
(3) Exact attention over a sliding window and sinks, there over the query's own section. (4) Fetched
keys stand at the border of the window (`positions`); positions="reindexed" packs them by age, the
landmark at its block's first token, where the paper's "stingy" positions also keep the true
distances of the latest blocks and put a landmark behind its block. (5) Distillation
from the model's own full attention, there the next-token loss. Sinks stand at their place in the
cache (at their own if "absolute").

Reduces to: the base model until something leaves; attention over near(t) and far(t) where each
landmark's logit is the log-sum-exp of its block: untrained and with block_size=1, `infllm` with
granularity="kv_head".
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.modules.landmark import LandmarkMemory
from memretrofit.modules.positions import Positions
from memretrofit.modules.recall import block_faults
from memretrofit.modules.slab import Placement
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2305.16300"
FAMILY = "recall"
IDENTITY = "none"
"""It starts as recall by the mean key, u = d = 0, with b = log S: the log-sum-exp of a block in
which every token has the same logit. That is useful untrained; a start at the window would have to
learn first what recall has for nothing.
"""


@dataclass(frozen=True, kw_only=True)
class LandmarkConfig(MethodConfig):
    """How much is kept exactly, and how much comes back."""

    sliding_window: int = 512
    """Tokens attended exactly, the current one included, sinks not included."""
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted."""
    block_size: int = 32
    """Tokens under one landmark; at most the window."""
    top_k: int = 16
    """Blocks that a query fetches: top_k * block_size tokens. Train with at least as many as a
    training row has, so that every landmark learns.
    """
    positions: Positions = "clamp"
    """Where fetched keys stand (`modules.positions`): at their `absolute` place; all at the border
    of the window (`clamp`); `reindexed`, side by side before the window; or `grouped`, beyond the
    window in steps. All but `absolute` read texts beyond the trained positions.
    """
    position_group: int = 8
    """Far tokens that share a position under `grouped`: W + T / position_group positions are used.
    """
    placement: Placement = "device"
    """Where the store lies; see `infllm`."""
    hot_bytes: int = 0
    """Bytes on the device, for each layer, of blocks that were fetched last from host or disk."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""

    def problems(self) -> list[str]:
        """A block that is larger than the window would not be whole when its first token leaves."""
        return block_faults(self.block_size, self.sliding_window)


LANDMARK = LandmarkConfig(sliding_window=255, num_sink_tokens=0, block_size=50, top_k=5)
"""The sizes with which the authors run their LLaMA 7B."""


def patch_landmark(model: PreTrainedModel, config: LandmarkConfig) -> None:
    """Give each selected attention layer a store of what leaves its window, under landmarks.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    def make(site: AttentionSite) -> LandmarkMemory:
        return LandmarkMemory(
            sliding_window=config.sliding_window,
            num_sink_tokens=config.num_sink_tokens,
            block_size=config.block_size,
            top_k=config.top_k,
            positions=config.positions,
            position_group=config.position_group,
            placement=config.placement,
            hot_bytes=config.hot_bytes,
            num_heads=site.num_heads,
            num_key_value_heads=site.num_key_value_heads,
            key_dim=site.key_dim,
            value_dim=site.value_dim,
        )

    patch_attention(model, config, make)
