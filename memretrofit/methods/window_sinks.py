"""Sinks and a sliding window, nothing else: the baseline that every compressed memory has to beat.

The first tokens of a text draw attention whatever they say; keeping them beside a window keeps a
pretrained model fluent at any length. Xiao et al., 2023, arXiv:2309.17453, without its change of
positions (that is `streaming_llm`).

Equation (one head)::

    out_t = softmax attention of q_t over {j : rank_j < N} and {j : t - W < j <= t}      [V]

Differs from the paper: positions stay absolute, as in the windows that models are trained with.
Reduces to: the base model until the N + W first tokens are seen; a plain sliding window at N = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.modules.memory import AttentionMemory
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2309.17453"
FAMILY = "compress"
IDENTITY = "window"


@dataclass(frozen=True, kw_only=True)
class WindowSinksConfig(MethodConfig):
    """How much is kept."""

    sliding_window: int = 1024
    """Tokens attended exactly, the current one included, sinks not included."""
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""


def patch_window_sinks(model: PreTrainedModel, config: WindowSinksConfig) -> None:
    """Bound the cache of each selected layer to sinks and window. Adds no parameters.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """
    patch_attention(
        model,
        config,
        lambda site: AttentionMemory(
            sliding_window=config.sliding_window, num_sink_tokens=config.num_sink_tokens
        ),
    )
