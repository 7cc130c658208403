"""InfLLM: what leaves the window is stored in blocks, and each query attends the few that fit it.

Xiao et al., 2024, arXiv:2402.04617. Needs no training.

Equations (one KV head; q, k before the rotary embedding R; window W, blocks of S tokens; for
positions="clamp", the paper's; for the others see `modules.positions`)::

    kappa_n = mean of the k_j of block n
    open(t) = { n : every token of block n is at t - W or before }
    far(t)  = the top_k blocks of open(t) by (R(W) q_t) . kappa_n, and the tokens that have left the
              window and fill no block yet
    s_tj    = (R(W) q_t) . k_j         for j in far(t): all stand at the border of the window
    s_tj    = (R(t) q_t) . (R(j) k_j)  for the window, and for sinks at their place in the cache
    out_t   = softmax(s_t) v                                                      [V]

Differs from the paper: (1) a query chooses its own blocks, from what it has seen; there the
queries of a chunk share the choice of their mean, so that later tokens of the chunk change earlier
outputs and the result depends on how a text is cut. (2) Each head chooses; `granularity="layer"`,
one choice by the sum over all heads, is theirs. (3) kappa is the mean of all keys, there of the
four that received the most attention. (4) Sinks stand at their place in the cache, there at W.

Reduces to: the base model until something leaves, and with positions="absolute" (or "reindexed" and
no sinks) and a top_k of all blocks for any length; `streaming_llm` while the store is empty,
`window_sinks` if "absolute".
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.modules.positions import Positions
from memretrofit.modules.recall import Granularity, RecallMemory, block_faults
from memretrofit.modules.slab import Placement
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2402.04617"
FAMILY = "recall"
IDENTITY = "none"
"""There is nothing to train: it recalls from the first token that leaves the window."""


@dataclass(frozen=True, kw_only=True)
class InfLLMConfig(MethodConfig):
    """How much is kept exactly, and how much comes back."""

    sliding_window: int = 512
    """Tokens attended exactly, the current one included, sinks not included."""
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted."""
    block_size: int = 16
    """Tokens that are stored and fetched together; at most the window."""
    top_k: int = 32
    """Blocks that a query fetches: top_k * block_size tokens."""
    granularity: Granularity = "head"
    """Who chooses: each query head, the heads of a KV head together, or all heads of a layer."""
    positions: Positions = "clamp"
    """Where fetched keys stand (`modules.positions`): at their `absolute` place; all at the border
    of the window (`clamp`); `reindexed`, side by side before the window; or `grouped`, beyond the
    window in steps. All but `absolute` read texts beyond the trained positions.
    """
    position_group: int = 8
    """Far tokens that share a position under `grouped`: W + T / position_group positions are used.
    """
    placement: Placement = "device"
    """Where the store lies: beside the model, in CPU memory (`host`), or in a temporary file that
    is mapped (`disk`): then only fetched blocks come to the device, and no gradients flow.
    """
    hot_bytes: int = 0
    """Bytes on the device, for each layer, of blocks that were fetched last from host or disk."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""

    def problems(self) -> list[str]:
        """A block that is larger than the window would not be whole when its first token leaves."""
        return block_faults(self.block_size, self.sliding_window)


INFLLM = InfLLMConfig(
    sliding_window=4096, num_sink_tokens=128, block_size=128, top_k=16, granularity="layer"
)
"""The published sizes."""


def patch_infllm(model: PreTrainedModel, config: InfLLMConfig) -> None:
    """Give each selected attention layer a store of what leaves its window. Adds no parameters.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    def make(site: AttentionSite) -> RecallMemory:
        return RecallMemory(
            sliding_window=config.sliding_window,
            num_sink_tokens=config.num_sink_tokens,
            block_size=config.block_size,
            top_k=config.top_k,
            granularity=config.granularity,
            positions=config.positions,
            position_group=config.position_group,
            placement=config.placement,
            hot_bytes=config.hot_bytes,
            num_key_value_heads=site.num_key_value_heads,
            key_dim=site.key_dim,
            value_dim=site.value_dim,
        )

    patch_attention(model, config, make)
