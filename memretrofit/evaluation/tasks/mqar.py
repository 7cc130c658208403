"""Multi-query associative recall (MQAR): which value was given with this key.

arXiv:2312.04927 (Zoology). `mqar` asks it in words, of a model that was never trained on it, one
query an item; for the published token sequences see
`memretrofit.evaluation.material.recall_sequences`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from memretrofit.data.words import ADJECTIVES, NOUNS
from memretrofit.evaluation.material.haystack import ranked
from memretrofit.evaluation.material.prose import Prose
from memretrofit.evaluation.task import Draft, Task

CANDIDATES = 10
PAIRS = 64
"""Most pairs of an item, as in the paper."""
GAP = 6
"""Other words for each pair: eight words a pair, as 64 pairs in the paper's 512 tokens."""


@dataclass(frozen=True, kw_only=True)
class AssociativeRecall(Task):
    """Pairs of a noun and an adjective, then other words of both kinds; the adjective of one noun.

    A unit is a pair and `GAP` other words; beyond `PAIRS` units, the other words only. No word is
    in two pairs or both in a pair and among the others. Strict: the first generated word is the
    adjective. Rank: it against those of nine other pairs.
    """

    reads_prose: bool = False

    def draft(self, units: int, depth: float | None, draw: random.Random, prose: Prose) -> Draft:
        """Up to `PAIRS` pairs and `GAP * units` other words; `depth` is not used."""
        keys, values = draw.sample(NOUNS, len(NOUNS)), draw.sample(ADJECTIVES, len(ADJECTIVES))
        pairs = [f"{key}: {value}" for key, value in zip(keys, values, strict=False)]
        asked, evidence = keys[0], pairs[0]
        candidates, correct = ranked(
            f" {values[0]}", [f" {value}" for value in values[1:CANDIDATES]], draw
        )
        order, other = random.Random(draw.random()), random.Random(draw.random())
        lines = pairs[: min(units, PAIRS)]
        order.shuffle(lines)
        unpaired = keys[PAIRS:] + values[PAIRS:]
        lines += [" ".join(other.choices(unpaired, k=GAP)) for _ in range(units)]
        return Draft(
            instruction="Each line below with a colon pairs two words. Remember the pairs; the "
            "lines after them mean nothing.\n",
            context="\n".join(lines),
            question=f"\nWhich word was paired with {asked}? The pair was:\n{asked}:",
            answers=(values[0],),
            candidates=candidates,
            correct=correct,
            evidence=(evidence,),
        )


MQAR = AssociativeRecall(name="mqar", answer_tokens=8, match="first", least_units=CANDIDATES)
