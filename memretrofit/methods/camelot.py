"""CAMELoT: what leaves the window is consolidated into a fixed number of modes, which stay visible.

He et al., 2024, arXiv:2402.13449. Needs no training, and its state does not grow.

Equations (one KV head; q, k before the rotary embedding R; l = t - W leaves the window as t
arrives; M modes (kappa, nu) with counts c and ages a)::

    s_m    = cos(k_l, kappa_m)         over modes with c_m > 0
    m      = argmax s                  if max s >= similarity_threshold: resembles a mode
             argmax a                  else: novel, takes the place of the oldest mode (c_m = 0)
    c_m    = c_m + 1
    kappa_m, nu_m = kappa_m + (k_l - kappa_m) / c_m,  nu_m + (v_l - nu_m) / c_m
    a      = a + 1,  a_m = 0
    s_tm   = (R(W) q_t) . kappa_m      for every mode: it stands at the border of the window
    s_tj   = (R(t) q_t) . (R(j) k_j)   for the window; sinks stand at their slot in the cache
    out_t  = softmax(s_t) (nu, v)                                                 [V]

Differs from the paper: (1) a query attends every mode; there the keys of a window each bring the
mode that they match best, and all queries of that window read the modes of its start. Here a token
is written as it leaves, so that any split of a text reads the same modes. (2) Keys are averaged
before the rotary embedding, every mode stands at the border of the window, and sinks before it; no
rule for positions was found. (3) The default sizes and threshold are ours.

Cost: where a token goes depends on the write before it, so the tokens of a prompt are written one
after another, about twenty small operations each on [G, M] numbers in every layer; only their
likeness to the modes is a product, 64 tokens at a time. A prompt is thus read at a rate nearer to
that of decoding than to that of the other methods, and on an accelerator bound by its launches.

Reduces to: the base model until something leaves; with a threshold above 1 to a buffer of the last
M tokens that left; with a threshold of -1 to one mode, the mean of all that left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.modules.modes import ModesMemory
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2402.13449"
FAMILY = "recall"
IDENTITY = "none"
"""There is nothing to train: modes are read from the first token that leaves the window."""


@dataclass(frozen=True, kw_only=True)
class CAMELoTConfig(MethodConfig):
    """How much is kept exactly, and how coarsely the rest."""

    sliding_window: int = 512
    """Tokens attended exactly, the current one included, sinks not included. The paper goes down to
    128.
    """
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted."""
    num_modes: Annotated[int, Range(least=1)] = 1024
    """Modes of each KV head."""
    similarity_threshold: float = 0.9
    """Cosine from which a token joins the mode that it resembles most; above 1 none ever does."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""


def patch_camelot(model: PreTrainedModel, config: CAMELoTConfig) -> None:
    """Give each selected attention layer modes of what leaves its window. Adds no parameters.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    def make(site: AttentionSite) -> ModesMemory:
        return ModesMemory(
            num_modes=config.num_modes,
            threshold=config.similarity_threshold,
            num_key_value_heads=site.num_key_value_heads,
            key_dim=site.key_dim,
            value_dim=site.value_dim,
            sliding_window=config.sliding_window,
            num_sink_tokens=config.num_sink_tokens,
        )

    patch_attention(model, config, make)
