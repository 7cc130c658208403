"""EM-LLM: what leaves the window is stored in events, cut where the text surprised the model.

Fountas et al., 2024, arXiv:2407.09450. Needs no training.

Equations (one KV head; q, k before the rotary embedding R; window W)::

    s_t     = -log p(x_t | x_<t)                              the model's own surprise, in nats
    b_t     = s_t > mean + surprise_threshold * deviation     of the W surprises before t
    events    run from cut to cut, min_event_size to max_event_size tokens each
    open(t) = { n : event n and the token behind it are at t - W or before, or n is full and is }
    score_n = sum over the group's heads of (R(W) q_t) . mean of k_j in n
    far(t)  = the best of open(t) within (1 - contiguity) recalled_tokens,
              their neighbours n + 1, n - 1, best first, within contiguity * recalled_tokens,
              and the tokens that have left the window in an event that is not open yet
    out_t   = softmax(q_t . [sinks and window, far(t)]) v     far keys stand at the border  [V]

The model reads a long input in pieces of W tokens (`patching.pieces`): the surprise of a token is
known at the end of the forward that it came in, and it leaves W tokens later.

Differs from the paper: (1) a query chooses for itself, each KV head on its own;
`granularity="layer"` is theirs. (2) Its neighbours are those of its own hits; there they wait in
a queue that goes on from one decoding step to the next, so that a result depends on the steps. (3)
A surprise is compared with the W before the token itself, there with those before its chunk. (4)
The mean of all keys stands for an event, there of the four that received the most attention.
(5) Edges stay where surprise puts them: refinement by the similarity of keys (off in the published
configs) is in `ops.segment` only. (6) Sinks stand
at their place in the cache; at their own with positions="absolute".

Reduces to: the base model until something leaves, and for any length with positions="absolute" and
recalled_tokens of the whole text; `infllm` of the same
granularity with events of one size and contiguity 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.modules.events import EventMemory
from memretrofit.modules.recall import Positions
from memretrofit.ops.segment import boundaries, places
from memretrofit.patching.pieces import Piece, read_in_pieces
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2407.09450"
FAMILY = "recall"
IDENTITY = "none"
"""There is nothing to train: it recalls from the first token that leaves the window."""


@dataclass(frozen=True, kw_only=True)
class EMLLMConfig(MethodConfig):
    """How much is kept exactly, how events are cut, and how much comes back."""

    sliding_window: int = 512
    """Tokens attended exactly, the current one included, sinks not included; also the surprises
    that a token's is compared with.
    """
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted."""
    surprise_threshold: Annotated[float, Range(least=0.0)] = 1.0
    """Deviations above the mean at which a token begins an event. Larger makes events longer."""
    min_event_size: Annotated[int, Range(least=1)] = 8
    """Tokens that an event has at least: a cut that comes sooner is passed over."""
    max_event_size: Annotated[int, Range(least=1)] = 64
    """Tokens after which an event ends; at most the window."""
    recalled_tokens: Annotated[int, Range(least=1)] = 512
    """Tokens that a query fetches, to the nearest whole event."""
    contiguity: Annotated[float, Range(least=0.0, most=1.0)] = 0.3
    """Share of these that goes to the neighbours of the events that fit the query."""
    granularity: Literal["kv_head", "layer"] = "kv_head"
    """Who chooses: each KV head, or all heads of a layer together."""
    positions: Positions = "clamp"
    """Where fetched keys stand: at their `absolute` place, or all at the border of the window
    (`clamp`: any length).
    """
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""

    def problems(self) -> list[str]:
        """Sizes that cannot be, and budgets that hold no event."""
        found = []
        if not self.min_event_size <= self.max_event_size <= self.sliding_window:
            found.append(
                f"max_event_size={self.max_event_size} is not between min_event_size="
                f"{self.min_event_size} and sliding_window={self.sliding_window}"
            )
        if self.similar_tokens < 1:
            found.append(
                f"contiguity={self.contiguity} leaves none of recalled_tokens="
                f"{self.recalled_tokens} to the events that fit; choose a smaller share"
            )
        return found

    @property
    def near_tokens(self) -> int:
        """Tokens of neighbours."""
        return round(self.contiguity * self.recalled_tokens)

    @property
    def similar_tokens(self) -> int:
        """Tokens of events that fit the query."""
        return self.recalled_tokens - self.near_tokens


EM_LLM = EMLLMConfig(
    sliding_window=4096,
    num_sink_tokens=128,
    max_event_size=128,
    recalled_tokens=2048,
    granularity="layer",
)
"""The published sizes."""


def patch_em_llm(model: PreTrainedModel, config: EMLLMConfig) -> None:
    """Give each selected attention layer a store of what leaves its window, in events, and let the
    model read in pieces. Adds no parameters.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    def make(site: AttentionSite) -> EventMemory:
        return EventMemory(
            least=config.min_event_size,
            most=config.max_event_size,
            similar=config.similar_tokens,
            near=config.near_tokens,
            sliding_window=config.sliding_window,
            num_sink_tokens=config.num_sink_tokens,
            granularity=config.granularity,
            positions=config.positions,
            num_key_value_heads=site.num_key_value_heads,
            key_dim=site.key_dim,
            value_dim=site.value_dim,
        )

    patch_attention(model, config, make)
    read_in_pieces(model, functools.partial(_segment, config))


def _segment(config: EMLLMConfig, piece: Piece, window: int) -> Tensor:
    cuts = boundaries(piece.surprises, window, config.surprise_threshold, piece.history)
    least, most = config.min_event_size, config.max_event_size
    return places(cuts, piece.stored, piece.size, least=least, most=most)
