"""Talks of a person with an assistant, a session in each segment, and a question about the person.

::

    segment 1 .. S-1   Ada: I live in Paris. / Assistant: Noted. / Ada: My aunt won a chess game. /
    segment S          Ada: ... / Question: Where does Ada live? / Answer: Ada lives in   ->   Paris

Half of the answers have changed since they were first said, where there is room for both; then the
last one is asked for. Others say what relatives have, and what else the person has. People and
question are those of the tasks `dialogue_fact` and `dialogue_update`. With S = 1 all is one
session.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from memretrofit.data.personas import ATTRIBUTES, EVENTS, HABITS, NAMES, RELATIVES, REPLIES
from memretrofit.data.recall import HELD_OUT
from memretrofit.data.segment_texts import Ids, SegmentTexts, Told

MOST = 9
"""Things said that may be asked for, in one text; as in the tasks."""


def is_held_out(name: str, attribute: int, value: str) -> bool:
    """Whether it is never trained on that this person has this: one of `HELD_OUT`."""
    place = ATTRIBUTES[attribute].values.index(value)
    return (NAMES.index(name) + attribute + place) % HELD_OUT == 0


class DialogueItems(SegmentTexts):
    """See the module.

    Args:
        facts: how many a session has, of `MOST`.
    """

    def __init__(self, tokenizer: Any, segment_length: int, facts: int = 1) -> None:
        super().__init__(tokenizer, segment_length)
        self.facts = facts

    def tell(self, segments: int, draw: random.Random, held_out: bool) -> Told:
        """See `SegmentTexts`."""
        name, number = draw.choice(NAMES), draw.randrange(len(ATTRIBUTES))
        asked = ATTRIBUTES[number]
        places = list(range(max(1, segments - 1))) * self.facts
        count = min(len(places), MOST)

        def had(subject: int, split: bool) -> str:
            values = ATTRIBUTES[subject].values
            return draw.choice([v for v in values if is_held_out(name, subject, v) == split])

        answer, before = had(number, held_out), had(number, False)
        changes = count > 1 and before != answer and draw.random() < 0.5
        own = [asked.own.format(value=before), asked.changed.format(value=answer)]
        own = own if changes else [asked.own.format(value=answer)]
        theirs = draw.sample([v for v in asked.values if v != answer], len(RELATIVES))
        others = [
            asked.other.format(who=f"my {who}", value=value)
            for who, value in zip(RELATIVES, theirs, strict=True)
        ]
        others += [
            attribute.own.format(value=had(subject, False))
            for subject, attribute in enumerate(ATTRIBUTES)
            if subject != number
        ]
        said = draw.sample(others, count - len(own))
        for place, text in zip(sorted(draw.sample(range(count), len(own))), own, strict=True):
            said.insert(place, text)
        told: list[list[Ids]] = [[] for _ in range(segments)]
        for text, place in zip(said, sorted(draw.sample(places, count)), strict=True):
            told[place].append(self._turn(name, text, draw))
        wanted = asked.question.replace("?", " now?") if changes else asked.question
        question = f"\nQuestion: {wanted}\nAnswer: {_capital(asked.stem)}"
        return Told(
            told,
            self.ids(question.format(who=name)),
            self.ids(f" {answer}"),
            self._small_talk(name, draw),
        )

    def _turn(self, name: str, text: str, draw: random.Random) -> Ids:
        return self.ids(f"{name}: {_capital(text)}\nAssistant: {draw.choice(REPLIES)}\n")

    def _small_talk(self, name: str, draw: random.Random) -> Iterator[Ids]:
        while True:
            did = draw.choice([*EVENTS, *HABITS])
            who = draw.choice(["I", *(f"my {relative}" for relative in RELATIVES)])
            yield self._turn(name, f"{who} {did}.", draw)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
