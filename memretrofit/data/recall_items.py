"""Facts in some segments, and a question in the last: what only a memory between them can answer.

However many segments, there are as many facts: most segments say nothing, and a memory must keep
what it has. Each fact falls into any segment before the last.

::

    segment 1 .. S-1   " The room was quiet. Anna likes rice. A dog barked outside. The"
    segment S          " It had rained. Everyone knows that Anna likes"   ->   " rice"

With S = 1 facts and question share the segment. Pairs of name and object are split: some are never
trained on (`memretrofit.data.recall`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from memretrofit.data.recall import FILLER, draw_facts
from memretrofit.data.segment_texts import Ids, SegmentTexts, Told


class RecallItems(SegmentTexts):
    """See the module.

    Args:
        facts: how many a text has.
    """

    def __init__(self, tokenizer: Any, segment_length: int, facts: int = 1) -> None:
        super().__init__(tokenizer, segment_length)
        self.facts = facts
        self.pieces = [self.ids(text) for text in FILLER]

    def tell(self, segments: int, draw: random.Random, held_out: bool) -> Told:
        """See `SegmentTexts`."""
        asked, *others = draw_facts(self.facts, draw, held_out)
        told: list[list[Ids]] = [[] for _ in range(segments)]
        for fact in draw.sample([asked, *others], self.facts):
            told[draw.randrange(max(1, segments - 1))].append(self.ids(fact.text))
        return Told(
            told, self.ids(asked.question), self.ids(f" {asked.answer}"), self._filler(draw)
        )

    def _filler(self, draw: random.Random) -> Iterator[Ids]:
        while True:
            yield draw.choice(self.pieces)
