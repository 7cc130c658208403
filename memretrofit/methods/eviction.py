"""Eviction (SnapKV, PyramidKV, H2O): of what leaves the window a fixed number of tokens is kept.

Li et al., 2024, arXiv:2404.14469; Cai et al., 2024, arXiv:2406.02069; Zhang et al., 2023,
arXiv:2306.14048. Needs no training.

Equations (one KV head; p_ij the weight that query i paid key j, window W, sinks N)::

    at every `interval`-th token that leaves, t being the last query:
    r_j    = mean over the group's heads  sum_i p_ij     snapkv: i in (t - observation_window, t]
                                                         h2o:    i in [j, t]
    score  = snapkv: mean of r over kernel_size neighbours;  h2o: r
    kept   = the n_l best of  kept and what left since the last prune
    n_l    = budget - W - N in the mean over layers, in equal steps (`pyramid_beta`; ops.eviction)
    out_t  = softmax over  sinks, window, kept, what left since the last prune            [V]

Differs from the papers: (1) SnapKV and PyramidKV compress once, at the end of the prompt, and then
let the cache grow. Here prunes stand at fixed places, so that the result does not depend on how a
text is cut and the cache is bounded at any length. A text that ends at its first prune keeps
exactly their tokens. (2) p_ij is the attention that was really paid: later prunes weigh against
what is left, not against tokens that are gone. (3) Neighbours are neighbours among what is held.
(4) H2O prunes at each token; `interval=1` is theirs. (5) A KV head scores by the mean of its query
heads, so that one key serves them all. (6) Under a budget in tokens, PyramidKV does not narrow its
steps for a short text: no length is known then. A share of the length (a float) does.

Reduces to: the base model until something leaves and until the first prune; `window_sinks` at a
kept set and an interval of nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.modules.eviction import EvictionMemory, HeavyHitterMemory
from memretrofit.ops.eviction import pyramid_budget
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2404.14469, arXiv:2406.02069, arXiv:2306.14048"
FAMILY = "recall"
IDENTITY = "none"
"""There is nothing to train: it reads what it keeps from the first token that leaves the window."""

SCORERS = {"snapkv": EvictionMemory, "h2o": HeavyHitterMemory}


@dataclass(frozen=True, kw_only=True)
class EvictionConfig(MethodConfig):
    """How much is kept, and what decides."""

    sliding_window: int = 512
    """Tokens attended exactly, the current one included, sinks not included."""
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted."""
    scorer: Literal["snapkv", "h2o"] = "snapkv"
    """Whose attention counts: the last queries' (`snapkv`) or all queries' (`h2o`)."""
    budget: int | float = 1024
    """What a layer holds on average right after a prune, sinks and window included: a number of
    tokens, or, as a float, a share of the tokens so far. Under `window_override` as many are kept
    beside the other window as beside this one.
    """
    interval: Annotated[int, Range(least=1)] = 128
    """Tokens that leave between two prunes; a layer holds up to so many more than its budget."""
    observation_window: Annotated[int, Range(least=1)] = 64
    """Last queries whose attention counts under `snapkv`; at most the window."""
    kernel_size: Annotated[int, Range(least=1)] = 5
    """Neighbours whose scores are averaged under `snapkv`; odd."""
    pyramid_beta: Annotated[int, Range(least=1)] = 1
    """The mean budget over that of the last layer (PyramidKV); 1 gives all layers the same. The
    mean is over all layers of the model, patched or not.
    """
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""

    def problems(self) -> list[str]:
        """A budget must be more than what is never evicted, and the queries must be at hand."""
        found: list[str] = []
        exact = self.sliding_window + self.num_sink_tokens
        if isinstance(self.budget, int) and self.budget <= exact:
            found.append(
                f"budget={self.budget} leaves nothing beside sliding_window={self.sliding_window} "
                f"and num_sink_tokens={self.num_sink_tokens}; choose more than {exact}"
            )
        elif isinstance(self.budget, int) and self.budget - exact < self.pyramid_beta:
            found.append(
                f"pyramid_beta={self.pyramid_beta} leaves nothing to the last layer of a budget of "
                f"{self.budget - exact} beside sinks and window; choose at most that"
            )
        if isinstance(self.budget, float) and not 0 < self.budget < 1:
            found.append(f"budget={self.budget} is no share; a float must be between 0 and 1")
        if self.observation_window > self.sliding_window:
            found.append(
                f"observation_window={self.observation_window} is larger than sliding_window="
                f"{self.sliding_window}; choose at most the window"
            )
        if self.kernel_size % 2 == 0:
            found.append(f"kernel_size={self.kernel_size} has no middle; choose an odd number")
        return found

    def capacity(self, length: int, layer: int, layers: int) -> int:
        """Tokens beside sinks and window that `layer` of `layers` keeps of a text of `length`."""
        exact = self.sliding_window + self.num_sink_tokens
        if isinstance(self.budget, int):
            return pyramid_budget(self.budget - exact, layer, layers, self.pyramid_beta)
        mean = max(0, int(self.budget * length) - exact)
        return pyramid_budget(mean, layer, layers, self.pyramid_beta, length=length, window=exact)


SNAPKV = EvictionConfig(
    sliding_window=32, num_sink_tokens=0, budget=2048, observation_window=32, interval=512
)
"""The sizes of the released code, which keeps no sinks."""
PYRAMIDKV = EvictionConfig(
    sliding_window=64,
    num_sink_tokens=0,
    budget=2048,
    observation_window=64,
    interval=512,
    pyramid_beta=20,
)
"""The steps of the released code at its largest budget."""
H2O = EvictionConfig(sliding_window=512, num_sink_tokens=0, scorer="h2o", budget=1024)
"""Half of the budget for the latest tokens, half for the heavy hitters. The paper's interval of 1
makes a prefill as slow as decoding.
"""


def patch_eviction(model: PreTrainedModel, config: EvictionConfig) -> None:
    """Give each selected attention layer a budget of tokens beside its window. Adds no parameters.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """
    layers = model.config.get_text_config().num_hidden_layers

    def make(site: AttentionSite) -> EvictionMemory:
        memory = SCORERS[config.scorer]
        return memory(
            sliding_window=config.sliding_window,
            num_sink_tokens=config.num_sink_tokens,
            capacity=partial(config.capacity, layer=site.layer_idx, layers=layers),
            interval=config.interval,
            observation_window=config.observation_window,
            kernel_size=config.kernel_size,
            num_heads=site.num_heads,
            num_key_value_heads=site.num_key_value_heads,
            key_dim=site.key_dim,
            value_dim=site.value_dim,
        )

    patch_attention(model, config, make)
