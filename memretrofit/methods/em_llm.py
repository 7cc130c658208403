"""EM-LLM: what leaves the window is stored in events, cut where the text surprised the model.

Fountas et al., 2024, arXiv:2407.09450. Needs no training.

Equations (one KV head; q, k before the rotary embedding R; window W)::

    s_t     = -log p(x_t | x_<t)                              the model's own surprise, in nats
    b_t     = s_t > mean + surprise_threshold * deviation     of the W surprises before t
    events    run from cut to cut, min_event_size to max_event_size tokens each
    cuts      are moved back to where the similarities k_i . k_j of the tokens around them, summed
              over layers and heads, fall apart best (`refinement`, ops.segment)
    open(t) = { n : event n and the token behind it are at t - W or before, or n is full and is }
    score_n = sum over the group's heads of (R(W) q_t) . mean of k_j in n
    far(t)  = the best of open(t) within (1 - contiguity) recalled_tokens,
              their neighbours n + 1, n - 1, best first, within contiguity * recalled_tokens,
              and the tokens that have left the window in an event that is not open yet
    out_t   = softmax(q_t . [sinks and window, far(t)]) v     far keys stand at the border  [V]

The model reads a long input in pieces of W tokens, fewer with refinement (`modules.edges`): a
token's surprise is known at the end of the forward that it came in, and it leaves W tokens later.

Whether surprise matters: the same events cut elsewhere (`segmentation`), at random or never asked
for, so that each has max_event_size tokens.

Differs from the paper: (1) a query chooses for itself, each KV head on its own;
`granularity="layer"` is theirs. (2) Its neighbours are those of its own hits; there they wait in
a queue that goes on from one decoding step to the next, so that a result depends on the steps. (3)
A surprise is compared with the W before the token itself, there with those before its chunk. (4)
The mean of all keys stands for an event, there of the four that received the most attention.
(5) Refinement sums the similarities of all patched layers, there of layers 20 and on of 32, and an
event that outgrows max_event_size is cut there, unrefined; there the sizes are mended afterwards.
It is off by default, as in the published code; the preset is the row of their table that refines by
modularity (SM+C). (6) Sinks stand at their place in the cache; at their own with
positions="absolute".

Reduces to: the base model until something leaves, and for any length with positions="absolute" and
recalled_tokens of the whole text; `infllm` of the same
granularity with events of one size and contiguity 0.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.modules.edges import EDGES, Edges, Refinement
from memretrofit.modules.events import EventMemory
from memretrofit.modules.positions import Positions
from memretrofit.modules.slab import Placement
from memretrofit.patching.pieces import read_in_pieces
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import patch_attention
from memretrofit.patching.surprises import SEGMENTATIONS, Segmentation, SurpriseReader

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
    segmentation: Segmentation = "surprise"
    """What asks for a cut: `surprise`; or, to see what surprise is worth, nothing (`fixed`: events
    of max_event_size) or tokens drawn at `random`, as many as surprise would, always the same.
    """
    refinement: Refinement = "none"
    """What a cut is moved back by, to where the text falls apart best. A long input is then read in
    pieces that are shorter by about 2 max_event_size.
    """
    recalled_tokens: Annotated[int, Range(least=1)] = 512
    """Tokens that a query fetches, to the nearest whole event."""
    contiguity: Annotated[float, Range(least=0.0, most=1.0)] = 0.3
    """Share of these that goes to the neighbours of the events that fit the query."""
    granularity: Literal["kv_head", "layer"] = "kv_head"
    """Who chooses: each KV head, or all heads of a layer together."""
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
        """Sizes that cannot be, and budgets that hold no event."""
        found = []
        if not self.min_event_size <= self.max_event_size <= self.sliding_window:
            found.append(
                f"max_event_size={self.max_event_size} is not between min_event_size="
                f"{self.min_event_size} and sliding_window={self.sliding_window}"
            )
        if self.edges.piece(self.sliding_window) < 1:
            found.append(
                f"refinement={self.refinement!r} with max_event_size={self.max_event_size} needs "
                f"more than sliding_window={self.sliding_window} tokens around an edge; choose "
                "shorter events or a larger window"
            )
        if self.similar_tokens < 1:
            found.append(
                f"contiguity={self.contiguity} leaves none of recalled_tokens="
                f"{self.recalled_tokens} to the events that fit; choose a smaller share"
            )
        return found

    @property
    def edges(self) -> Edges:
        """The rule for where events begin."""
        return EDGES[self.refinement](self.min_event_size, self.max_event_size)

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
    refinement="modularity",
    recalled_tokens=2048,
    granularity="layer",
)
"""The published sizes for Mistral-7B, which recall 2,048 tokens."""


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
            position_group=config.position_group,
            placement=config.placement,
            hot_bytes=config.hot_bytes,
            num_key_value_heads=site.num_key_value_heads,
            key_dim=site.key_dim,
            value_dim=site.value_dim,
        )

    patch_attention(model, config, make)
    reader = functools.partial(
        SurpriseReader,
        threshold=config.surprise_threshold,
        segmentation=SEGMENTATIONS[config.segmentation],
        edges=config.edges,
    )
    read_in_pieces(model, reader)
