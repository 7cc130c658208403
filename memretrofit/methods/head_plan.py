"""DuoAttention: a few KV heads keep every token, the others keep sinks and window.

Xiao et al., 2024, arXiv:2410.10819. Needs no training, but the plan wants retrieval scores.

Equations (KV head g of a layer; F the `full_heads` of that layer; W window)::

    store_g = every (k_j, v_j) that left the window, rotated as the model made it      g in F
    out_t   = softmax(q_t . [window, store_g]) v      query heads of g in F            [V]
    out_t   = softmax(q_t . [window]) v               all other query heads            [V]

A head that copies from afar needs the tokens; most heads look at the first tokens and the latest
ones whatever the text is. Cache bytes beyond the window are |F| of all KV heads, and so is the time
of a decoding step beyond it.

Find the heads with `memretrofit heads --base ... -o plan.json`, or with
`memretrofit.evaluation.probes`::

    found = retrieval_heads(model, trials)
    patch(model, HeadPlanConfig(full_heads=plan_from_scores(found, share=0.25)))

and compare with `inverted_plan` and `random_plan` of the same size: what these give too is due to
the size of the plan, not to the choice of heads.

Differs from the paper: (1) The plan. There a gate alpha per KV head, out = alpha full + (1 - alpha)
streaming, is trained to keep the final hidden states of answer tokens under an L1 penalty, and the
heads above a quantile of alpha stay full. Here the scores are the caller's, such as the copying
score of retrieval heads (arXiv:2404.15574); the quantile is the same. (2) Without a plan every
second KV head is full, which is a share and no choice. (3) W counts a query's own token.

Reduces to: the base model (up to rounding) with all heads full, `window_sinks` with none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.errors import ConfigError, NoTargetError
from memretrofit.modules.heads import HeadPlanMemory
from memretrofit.patching.ledger import detach
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import patch_attention

PAPER = "arXiv:2410.10819"
FAMILY = "recall"
IDENTITY = "none"
"""What it equals is the plan's choice: the base model, `window_sinks`, or each in some heads."""

Plan = tuple[tuple[int, int], ...]
"""(layer, KV head) pairs."""


@dataclass(frozen=True, kw_only=True)
class HeadPlanConfig(MethodConfig):
    """How much all heads keep, and which keep everything."""

    sliding_window: int = 256
    """Tokens attended exactly, the current one included, sinks not included."""
    num_sink_tokens: int = 4
    """First tokens of each row, never evicted. The authors deploy 64."""
    full_heads: tuple[tuple[int, int], ...] | None = None
    """(layer, KV head) of each head that keeps everything; () keeps none. None keeps the heads 0,
    2, 4, ... of every layer.
    """
    layers_to_transform: tuple[int, ...] | None = None
    """Layers to patch; None patches every layer with full softmax attention."""

    def problems(self) -> list[str]:
        """A head twice, a negative number, or a layer that is not patched."""
        plan, found = self.full_heads or (), []
        if len(set(plan)) != len(plan):
            found.append("full_heads names a head twice; name each (layer, KV head) once")
        if any(number < 0 for pair in plan for number in pair):
            found.append("full_heads: layers and heads count from 0; found a negative number")
        chosen = self.layers_to_transform
        outside = {layer for layer, _ in plan} - set(chosen or ())
        if chosen is not None and outside:
            found.append(
                f"full_heads names the layers {sorted(outside)}, which layers_to_transform="
                f"{chosen} leaves out; add them there or drop them here"
            )
        return found


DUO_ATTENTION = HeadPlanConfig(sliding_window=256, num_sink_tokens=64)
"""The sizes of the authors' needle test."""


def plan_heads(scores: Mapping[int, Sequence[float]], share: float) -> Plan:
    """The heads to keep full: the `share` of all KV heads with the highest scores.

    The authors keep half of the heads of models with grouped queries, and a quarter where every
    query head has its own keys. Of equal scores the earlier head wins.

    Args:
        scores: for each layer by its index, one score for each KV head.
        share: from 0 (none) to 1 (all); rounded to whole heads.

    Raises:
        ConfigError: a share outside 0 to 1, or no scores.
    """
    ranked = sorted(
        (-score, layer, head) for layer, row in scores.items() for head, score in enumerate(row)
    )
    if not 0 <= share <= 1 or not ranked:
        raise ConfigError(
            f"plan_heads: share={share} of {len(ranked)} heads; pass a share from 0 to 1 and at "
            "least one score"
        )
    kept = ranked[: round(share * len(ranked))]
    return tuple(sorted((layer, head) for _, layer, head in kept))


def patch_head_plan(model: PreTrainedModel, config: HeadPlanConfig) -> None:
    """Give each selected attention layer a store for its full heads. Adds no parameters.

    Raises:
        ConfigError: `full_heads` names a head that its layer does not have.
        NoTargetError: or a layer that is not patched. See also `memretrofit.patch`.
    """
    plan = config.full_heads
    waiting = {layer for layer, _ in plan or ()}

    def make(site: AttentionSite) -> HeadPlanMemory:
        groups = site.num_key_value_heads
        if plan is None:
            heads = tuple(range(0, groups, 2))
        else:
            heads = tuple(sorted(head for layer, head in plan if layer == site.layer_idx))
        if heads and heads[-1] >= groups:
            raise ConfigError(
                f"full_heads: layer {site.layer_idx} of {type(model).__name__} has the KV heads 0 "
                f"to {groups - 1}; found {heads[-1]}. Plan KV heads, not query heads."
            )
        waiting.discard(site.layer_idx)
        return HeadPlanMemory(
            heads=heads,
            num_heads=site.num_heads,
            num_key_value_heads=groups,
            key_dim=site.key_dim,
            value_dim=site.value_dim,
            sliding_window=config.sliding_window,
            num_sink_tokens=config.num_sink_tokens,
        )

    patch_attention(model, config, make)
    if waiting:
        detach(model)
        raise NoTargetError(
            f"full_heads names the layers {sorted(waiting)}, which {type(model).__name__} does not "
            "have or cannot give a memory; memretrofit.describe shows those of a patched model."
        )
