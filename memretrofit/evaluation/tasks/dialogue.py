"""Talks over months between a person and an assistant: facts, changes, two hops, order, counts.

The kinds of question are those of LongMemEval (arXiv:2410.10813) and LoCoMo (arXiv:2402.17753);
the talks are made of templates, so every answer is known and no judge is needed.
"""

from __future__ import annotations

import random
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta

from memretrofit.data.personas import (
    ATTRIBUTES,
    EVENTS,
    HABITS,
    NAMES,
    RELATIVES,
    REPLIES,
    Attribute,
)
from memretrofit.evaluation.material.haystack import ranked
from memretrofit.evaluation.material.prose import Prose
from memretrofit.evaluation.task import Draft, Match, Task

_SESSIONS = 3
_PER_SESSION = 3
_SAID = _SESSIONS * _PER_SESSION
"""What the person says of life: in three sessions of six turns, whatever is asked."""
_DAYS = 100
"""Between two such sessions, and of small talk before the first and after the last."""
_CANDIDATES = 10
_HOURS = ("This morning", "This afternoon", "This evening")


@dataclass(frozen=True, kw_only=True)
class Life:
    """What a person says, in order of time, and a question about it."""

    said: Sequence[str]
    question: str
    """Up to where the answer continues it."""
    answer: str
    candidates: Sequence[str]
    evidence: Sequence[int]
    """Places in `said`."""


@dataclass(frozen=True, kw_only=True)
class Dialogue(Task):
    """Nine things said in three sessions of six turns, some months apart; then a question.

    A unit is a piece of small talk (a sentence of prose and a reply); these stand in sessions of
    their own, of six to twelve turns (the last one may be shorter), before, between and after.
    Evidence is the turns that the answer rests on.
    """

    answer_tokens: int = 8
    match: Match = "first"

    @abstractmethod
    def live(self, name: str, draw: random.Random) -> Life:
        """What `name` says, and what is asked."""

    def draft(self, units: int, depth: float | None, draw: random.Random, prose: Prose) -> Draft:
        """The nine things said among `units` pieces of small talk; `depth` is not used."""
        name = draw.choice(NAMES)
        life = self.live(name, draw)
        wrong = [f" {text}" for text in life.candidates if text != life.answer]
        candidates, correct = ranked(f" {life.answer}", draw.sample(wrong, len(wrong)), draw)
        lines = [f"{name}: {text}" for text in life.said]
        turns = [f"{line}\nAssistant: {draw.choice(REPLIES)}" for line in lines]
        start = date(2022, 1, 1) + timedelta(days=draw.randrange(365))

        shape = random.Random(draw.random())
        sentences = prose.passage(draw).take(units)
        talk = [
            f'{name}: I have read this: "{sentence}"\nAssistant: {shape.choice(REPLIES)}'
            for sentence in sentences
        ]
        sessions = [[] for _ in range(_SESSIONS + 1)]
        sizes = random.Random(draw.random())
        while talk:
            size = sizes.randrange(3, 7)
            sessions[sizes.randrange(_SESSIONS + 1)].append(talk[:size])
            talk = talk[size:]

        parts = []
        for place, small in enumerate(sessions):
            begin = start + timedelta(days=_DAYS * place)
            for number, exchanges in enumerate(small):
                day = begin + timedelta(days=1 + (_DAYS - 2) * number // len(small))
                parts.append(_session(day, exchanges))
            if place < _SESSIONS:
                held = turns[place * _PER_SESSION : (place + 1) * _PER_SESSION]
                parts.append(_session(begin + timedelta(days=_DAYS), held))
        return Draft(
            instruction=f"These are talks of {name} with an assistant.\n\n",
            context="\n\n".join(parts),
            question=f"\n\nQuestion: {life.question}",
            answers=(life.answer,),
            candidates=candidates,
            correct=correct,
            evidence=tuple(lines[place] for place in life.evidence),
        )


def _session(day: date, exchanges: Sequence[str]) -> str:
    return "\n".join([f"Session of {day.isoformat()}", *exchanges])


def _scatter(
    ordered: Sequence[str], loose: Sequence[str], draw: random.Random
) -> tuple[list[str], list[int]]:
    """Nine things said: `ordered` stay in order, `loose` fall between. And the places of all."""
    places = draw.sample(range(_SAID), _SAID)
    first = sorted(places[: len(ordered)])
    places = first + places[len(ordered) :]
    said = [""] * _SAID
    for place, text in zip(places, [*ordered, *loose], strict=True):
        said[place] = text
    return said, places


def _draw_subject(draw: random.Random) -> tuple[Attribute, list[str], list[str]]:
    """An attribute to ask about, ten of its values, and a statement of every other attribute."""
    subject, *rest = draw.sample(ATTRIBUTES, len(ATTRIBUTES))
    others = [other.own.format(value=draw.choice(other.values)) for other in rest]
    return subject, draw.sample(subject.values, _CANDIDATES), others


def _relatives(subject: Attribute, values: Sequence[str], draw: random.Random) -> list[str]:
    """What is said of as many relatives as there are values."""
    people = draw.sample(RELATIVES, len(values))
    return [
        _sentence(subject.other, f"my {who}", value)
        for who, value in zip(people, values, strict=True)
    ]


def _sentence(template: str, who: str, value: str = "") -> str:
    text = template.format(who=who, value=value)
    return text[0].upper() + text[1:]


def _ask(subject: Attribute, who: str) -> str:
    stem = _sentence(subject.stem, who)
    return f"{subject.question.format(who=who)}\nAnswer: {stem}"


class SingleFact(Dialogue):
    """One thing said once; two relatives have other values of the same attribute."""

    def live(self, name: str, draw: random.Random) -> Life:
        """See `Dialogue.live`."""
        subject, values, others = _draw_subject(draw)
        theirs = _relatives(subject, values[1:3], draw)
        own = subject.own.format(value=values[0])
        said, places = _scatter([own], [*theirs, *others[: _SAID - 3]], draw)
        return Life(
            said=said,
            question=_ask(subject, name),
            answer=values[0],
            candidates=values,
            evidence=places[:1],
        )


class Update(Dialogue):
    """A thing that changes twice: the latest value is asked, and the old ones are candidates."""

    def live(self, name: str, draw: random.Random) -> Life:
        """See `Dialogue.live`."""
        subject, values, others = _draw_subject(draw)
        theirs = _relatives(subject, values[3:5], draw)
        own = [subject.own.format(value=values[0])]
        own += [subject.changed.format(value=value) for value in values[1:3]]
        # What was said last of all is the answer in one item of three, not in most.
        later = draw.randrange(len(theirs) + 1)
        is_own = [True, True, *[False] * (len(theirs) - later)]
        draw.shuffle(is_own)
        is_own += [True, *[False] * later]
        sources = {True: iter(own), False: iter(theirs)}
        ordered = [next(sources[own_turn]) for own_turn in is_own]
        said, places = _scatter(ordered, others[: _SAID - 5], draw)
        return Life(
            said=said,
            question=_ask(subject, name).replace("?", " now?"),
            answer=values[2],
            candidates=values,
            evidence=[place for place, mine in zip(places, is_own, strict=False) if mine],
        )


class TwoHop(Dialogue):
    """A relative's name is said at one place, what the bearer of that name has at another."""

    def live(self, name: str, draw: random.Random) -> Life:
        """See `Dialogue.live`."""
        subject, values, others = _draw_subject(draw)
        people = draw.sample(RELATIVES, 3)
        names = draw.sample([other for other in NAMES if other != name], 3)
        called = [f"My {who} is called {other}." for who, other in zip(people, names, strict=True)]
        has = [
            _sentence(subject.other, other, value)
            for other, value in zip(names, values[:3], strict=True)
        ]
        said, places = _scatter([], [*called, *has, *others[: _SAID - 6]], draw)
        return Life(
            said=said,
            question=_ask(subject, f"the {people[0]} of {name}"),
            answer=values[0],
            candidates=values,
            evidence=[places[0], places[3]],
        )


class TemporalOrder(Dialogue):
    """Six things done in the course of three days: which of four was first. Chance is 1 in 4."""

    def live(self, name: str, draw: random.Random) -> Life:
        """See `Dialogue.live`."""
        events = draw.sample(EVENTS, 6)
        _, _, others = _draw_subject(draw)
        said, places = _scatter(events, others[: _SAID - 6], draw)
        for place, event in zip(places, events, strict=False):
            said[place] = f"{_HOURS[place % _PER_SESSION]} I {event}."
        asked = sorted(draw.sample(range(6), 4))
        listed = draw.sample([events[place] for place in asked], 4)
        return Life(
            said=said,
            question=f"Which of these did {name} do first: {', '.join(listed)}?\n"
            f"Answer: First, {name}",
            answer=events[asked[0]],
            candidates=listed,
            evidence=[places[place] for place in asked],
        )


class Count(Dialogue):
    """A habit, one to six times among others' and another habit. Chance is 1 in 6."""

    def live(self, name: str, draw: random.Random) -> Life:
        """See `Dialogue.live`."""
        numbers = ["one", "two", "three", "four", "five", "six"]
        times = draw.randrange(1, 7)
        asked, other = draw.sample(HABITS, 2)
        friends = draw.sample([friend for friend in NAMES if friend != name], _SAID)
        habits = [asked] * times + [other] * (7 - times)
        texts = [f"Today I {habit} with {f}." for habit, f in zip(habits, friends, strict=False)]
        people = draw.sample(RELATIVES, 2)
        texts += [
            f"My {who} {asked} with {friend}."
            for who, friend in zip(people, friends[7:], strict=True)
        ]
        said, places = _scatter([], texts, draw)
        return Life(
            said=said,
            question=f"How many times has {name} said: I {asked}? Count only {name}.\n"
            "Answer: The number of times is",
            answer=numbers[times - 1],
            candidates=numbers,
            evidence=places[:times],
        )


@dataclass(frozen=True, kw_only=True)
class Abstention(Dialogue):
    """A thing that was said, or only of relatives: name it or say `unknown`. Chance is 1 in 2.

    Every other item has an answer, so always to abstain is right half of the time, by both scores.
    """

    has_answer: bool = True

    def variant(self, length: int, number: int) -> Abstention:
        """An answer and none take turns."""
        return replace(self, has_answer=number % 2 == 0)

    def live(self, name: str, draw: random.Random) -> Life:
        """See `Dialogue.live`."""
        subject, values, others = _draw_subject(draw)
        theirs = _relatives(subject, values[1:3], draw)
        own = subject.own.format(value=values[0]) if self.has_answer else others[-1]
        said, places = _scatter([own], [*theirs, *others[: _SAID - 3]], draw)
        named = values[0] if self.has_answer else values[1]
        return Life(
            said=said,
            question=f"{subject.question.format(who=name)} "
            f"If {name} never said it, the answer is: unknown.\nAnswer:",
            answer=named if self.has_answer else "unknown",
            candidates=[named, "unknown"],
            evidence=places[:1] if self.has_answer else [],
        )


DIALOGUE_FACT = SingleFact(name="dialogue_fact")
DIALOGUE_UPDATE = Update(name="dialogue_update")
DIALOGUE_TWO_HOP = TwoHop(name="dialogue_two_hop")
DIALOGUE_ORDER = TemporalOrder(name="dialogue_order")
DIALOGUE_COUNT = Count(name="dialogue_count")
DIALOGUE_ABSTENTION = Abstention(name="dialogue_abstention")
