"""Facts in the first half of a text, and one of them is asked for at its end.

What a memory between segments is for: facts and question are segments apart, however long the text,
and the number of facts stays. The pair that is asked for is one that training on the same world
never says (`memretrofit.data.recall`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from memretrofit.data.recall import FILLER, OBJECTS, draw_facts
from memretrofit.evaluation.material.haystack import ranked
from memretrofit.evaluation.material.prose import Prose
from memretrofit.evaluation.task import Draft, Match, Task

CANDIDATES = 10


@dataclass(frozen=True, kw_only=True)
class FactRecall(Task):
    """Who likes what; a unit is a sentence that says nothing.

    Every fact falls into one of the gaps of the first half, two may fall into the same one::

        gap of a fact = floor(u * (units + 1) / 2),   u uniform in [0, 1)

    Rank: the object against those of other facts, at most nine; of a single fact, against nine
    that nobody likes. Strict: the first generated word is the object.
    """

    facts: int
    answer_tokens: int = 4
    match: Match = "first"
    reads_prose: bool = False

    def draft(self, units: int, depth: float | None, draw: random.Random, prose: Prose) -> Draft:
        """The facts among `units` sentences."""
        asked, *others = draw_facts(self.facts, draw, held_out=True)
        wrong = [f" {fact.answer}" for fact in others]
        wrong = wrong or [f" {thing}" for thing in OBJECTS if thing != asked.answer]
        wrong = draw.sample(wrong, min(len(wrong), CANDIDATES - 1))
        candidates, correct = ranked(f" {asked.answer}", wrong, draw)
        told = [fact.text for fact in draw.sample([asked, *others], self.facts)]
        gaps = sorted(draw.random() for _ in told)
        filler = random.Random(draw.random())
        sentences = [filler.choice(FILLER) for _ in range(units)]
        for gap, fact in reversed(list(zip(gaps, told, strict=True))):
            sentences.insert(int(gap * (units + 1) / 2), fact)
        return Draft(
            context="".join(sentences).lstrip(),
            question=asked.question,
            answers=(asked.answer,),
            candidates=candidates,
            correct=correct,
            evidence=(asked.text.lstrip(),),
        )


RECALL_1 = FactRecall(name="recall_1", facts=1, rank_by_presence=True)
RECALL_4 = FactRecall(name="recall_4", facts=4)
RECALL_16 = FactRecall(name="recall_16", facts=16)
