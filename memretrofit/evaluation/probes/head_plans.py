"""Which heads of a DuoAttention-style plan keep everything, from the retrieval score.

A plan names n KV heads of the M that were measured, n = round(share M); a KV head scores as the
best of the query heads that share it. Three plans of one size, so that a user sees whether the
choice matters or only its size::

    plan_from_scores   the n highest scores
    inverted_plan      the n lowest
    random_plan        n drawn without replacement

Where the plan is no better than the random one, heads that copy were not found, or the task does
not need them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from memretrofit.evaluation.probes.retrieval_heads import RetrievalHeads
from memretrofit.methods.head_plan import Plan, plan_heads


def plan_from_scores(scores: RetrievalHeads, share: float) -> Plan:
    """(layer, KV head) of the `share` of the measured KV heads with the highest scores, for
    `HeadPlanConfig(full_heads=...)`. Of equal scores the earlier head wins.

    Raises:
        ConfigError: the share is outside 0 to 1.
    """
    return plan_heads(_by_layer(scores), share)


def inverted_plan(scores: RetrievalHeads, share: float) -> Plan:
    """As many heads as `plan_from_scores`, of the lowest scores. Of equal scores the later head
    wins, so that no head is in both plans until they fill more than half of the model.

    Raises:
        ConfigError: the share is outside 0 to 1.
    """
    size = len(plan_from_scores(scores, share))
    ranked = sorted(
        (score, -layer, -head)
        for layer, row in _by_layer(scores).items()
        for head, score in enumerate(row)
    )
    return tuple(sorted((-layer, -head) for _, layer, head in ranked[:size]))


def random_plan(scores: RetrievalHeads, share: float, seed: int = 0) -> Plan:
    """As many heads as `plan_from_scores`, at random among all that were measured.

    Raises:
        ConfigError: the share is outside 0 to 1.
    """
    size = len(plan_from_scores(scores, share))
    every = [(layer, head) for layer, row in _by_layer(scores).items() for head in range(len(row))]
    return tuple(sorted(random.Random(seed).sample(every, size)))


def _by_layer(scores: RetrievalHeads) -> dict[int, Sequence[float]]:
    return dict(zip(scores.layers, scores.key_value_scores(), strict=True))
