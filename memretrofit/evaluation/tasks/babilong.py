"""BABILong: the facts of a small story scattered through long prose, and a question on them.

Kuratov et al., arXiv:2406.10149, with stories of our own (`data/stories.py`). Each
fact falls into one of the gaps between the sentences of the prose, two may fall into the same
one, and all keep their order::

    gap of fact i = floor(u_(i) * (units + 1)),   u_(1) <= u_(2) <= ..., uniform in [0, 1)

Candidates are the labels of the answer's class that the question does not name, since the published
metric leaves those out as well.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache

from memretrofit.data.stories import (
    Tell,
    ask,
    where_is_person,
    where_is_thing,
    where_was_thing,
    which_room,
    who_gave_what,
)
from memretrofit.errors import ConfigError
from memretrofit.evaluation.material.prose import Prose
from memretrofit.evaluation.task import Draft, Match, Task

# The published background leaves out shorter sentences, which are headings and fragments. It cuts
# the last one to fill the length; we leave out what would miss the length by far.
_LEAST_WORDS, _MOST_WORDS = 10, 100


@dataclass(frozen=True, kw_only=True)
class BabiLong(Task):
    """One bAbI task; a unit is a sentence of prose."""

    answer_tokens: int = 8
    match: Match = "first"
    tell: Tell
    rule: str
    """How an answer follows from the facts, in a sentence."""
    examples: tuple[tuple[str, str, str], ...]
    """Facts, question and answer, about people, rooms and things that no story has."""

    def draft(self, units: int, depth: float | None, draw: random.Random, prose: Prose) -> Draft:
        """A story, then `units` sentences from one place of the prose."""
        story = self.tell(draw)
        gaps = sorted(draw.random() for _ in story.facts)
        sentences = _background(prose).passage(draw).take(units)
        for gap, fact in reversed(list(zip(gaps, story.facts, strict=True))):
            sentences.insert(int(gap * (units + 1)), fact)
        lead = (
            "Facts are hidden in a text, in the order in which they happened. "
            f"{self.rule} Answer with one word.\n\n"
        )
        candidates = draw.sample(story.labels, len(story.labels))
        return Draft(
            instruction=lead + "".join(map(_example, self.examples)) + "Text: ",
            context=" ".join(sentences),
            question=story.asked,
            answers=(story.answer,),
            candidates=tuple(f" {label}" for label in candidates),
            correct=(candidates.index(story.answer),),
            evidence=tuple(story.facts[number] for number in story.evidence),
        )


def _example(parts: tuple[str, str, str]) -> str:
    facts, question, answer = parts
    return f"Text: {facts}{ask(question, answer)} {answer}\n\n"


@lru_cache(maxsize=2)
def _background(prose: Prose) -> Prose:
    """The sentences of a fitting size."""
    found = (tuple(filter(_serves, sentences)) for sentences in prose.documents)
    documents = tuple(sentences for sentences in found if sentences)
    if not documents:
        raise ConfigError(
            f"prose {prose.source!r} has no sentence of {_LEAST_WORDS} to {_MOST_WORDS} words, as "
            "the background of BABILong must have; name another source"
        )
    return replace(prose, documents=documents)


def _serves(sentence: str) -> bool:
    return _LEAST_WORDS <= len(sentence.split()) <= _MOST_WORDS


BABILONG_QA1 = BabiLong(
    name="babilong_qa1",
    tell=where_is_person,
    rule="A person is in the room that they went to last.",
    examples=(
        (
            "Anna went to the cellar. Peter moved to the attic. Anna journeyed to the library.",
            "Where is Anna?",
            "library",
        ),
        (
            "Peter travelled to the cellar. Anna went back to the attic.",
            "Where is Peter?",
            "cellar",
        ),
    ),
)
BABILONG_QA2 = BabiLong(
    name="babilong_qa2",
    tell=where_is_thing,
    rule="A thing goes where its holder goes, and stays where it was left.",
    examples=(
        (
            "Anna went to the cellar. Anna got the lamp. Anna moved to the attic.",
            "Where is the lamp?",
            "attic",
        ),
        (
            "Peter took the book. Peter travelled to the library. Peter left the book. "
            "Peter went to the cellar.",
            "Where is the book?",
            "library",
        ),
    ),
)
BABILONG_QA3 = BabiLong(
    name="babilong_qa3",
    tell=where_was_thing,
    rule="A thing goes where its holder goes, and stays where it was left.",
    examples=(
        (
            "Anna went to the cellar. Anna got the lamp. Anna moved to the attic. "
            "Anna journeyed to the library.",
            "Where was the lamp before the library?",
            "attic",
        ),
        (
            "Peter took the book. Peter travelled to the library. Peter went back to the cellar.",
            "Where was the book before the cellar?",
            "library",
        ),
    ),
)
BABILONG_QA4 = BabiLong(
    name="babilong_qa4",
    tell=which_room,
    rule="They say on which side of each other rooms lie.",
    examples=(
        (
            "The cellar is north of the attic. The library is east of the attic.",
            "What is north of the attic?",
            "cellar",
        ),
        (
            "The cellar is west of the library. The attic is west of the cellar.",
            "What is the cellar west of?",
            "library",
        ),
    ),
)
BABILONG_QA5 = BabiLong(
    name="babilong_qa5",
    tell=who_gave_what,
    rule="They say who gave what to whom.",
    examples=(
        ("Anna got the lamp. Anna handed the lamp to Peter.", "Who gave the lamp?", "Anna"),
        ("Peter passed the book to Anna.", "What did Peter give to Anna?", "book"),
    ),
)
