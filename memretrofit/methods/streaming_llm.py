"""StreamingLLM: sinks and a sliding window, with positions counted inside the cache.

Xiao et al., 2023, arXiv:2309.17453, section 3.2.

Equation (one head; q, k before the rotary embedding R; C = N + W)::

    p_t   = min(t, C - 1)                                  where the query stands in the cache
    s_tj  = (R(p_t) q_t) . (R(j) k_j)                      for a sink j < N
    s_tj  = (R(t) q_t) . (R(j) k_j)                        for j in the window: only t - j matters
    out_t = softmax(s_t) v                                 [V]

so that no query ever stands further from a sink than the cache is long.

Differs from the paper: nothing in what is computed. The authors rotate keys again at every step;
here the cache holds the model's own rotated keys and only the query is turned back, by t - p_t,
for its scores with sinks. Reduces to: `window_sinks` while t < C.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.modules.memory import AttentionMemory
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2309.17453"
FAMILY = "compress"
IDENTITY = "none"
"""Past the window, sinks stand elsewhere than in the base model with an explicit mask; that is
the method.
"""


@dataclass(frozen=True, kw_only=True)
class StreamingLLMConfig(MethodConfig):
    """How much is kept."""

    sliding_window: int = 1024
    """Tokens attended exactly, the current one included, sinks not included."""
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted. The authors use 4."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""


class SlotMemory(AttentionMemory):
    """Sinks and window with sinks at their place in the cache."""

    sink_positions = "slot"


def patch_streaming_llm(model: PreTrainedModel, config: StreamingLLMConfig) -> None:
    """Bound the cache of each selected layer, at any length without positions beyond the cache.
    Adds no parameters.

    Raises:
        UnsupportedModelError: also when the model has no rotary embedding over whole heads.
        ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """
    patch_attention(
        model,
        config,
        lambda site: SlotMemory(
            sliding_window=config.sliding_window, num_sink_tokens=config.num_sink_tokens
        ),
    )
