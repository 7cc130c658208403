"""Small worlds told in short facts, with one question each: bAbI tasks 1 to 5.

After the description of Weston et al. (arXiv:1502.05698): people walk between rooms, and take,
leave and hand over things. A fact is told only if it can happen; a question is asked only if the
facts have one answer to it. A story is as long as the published ones, but for a bound of 32 facts,
so that it fits 512 tokens with its question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

PEOPLE = ("John", "Mary", "Sandra", "Daniel")
ROOMS = ("bedroom", "kitchen", "garden", "hallway", "bathroom", "office")
THINGS = ("apple", "football", "milk")
WENT = ("went to", "journeyed to", "travelled to", "moved to", "went back to")
TOOK = ("got", "grabbed", "took", "picked up")
LEFT = ("dropped", "put down", "left", "discarded")
GAVE = ("gave", "handed", "passed")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}

# A published story stops after its fifth question.
_QUESTIONS = 5
_MOST_FACTS = 32


@dataclass(frozen=True)
class Story:
    """Facts in the order in which they happened, and a question after the last."""

    facts: tuple[str, ...]
    question: str
    answer: str
    labels: tuple[str, ...]
    """What the answer may be: its class, without what the question names."""
    evidence: tuple[int, ...]
    """Numbers of the facts that the answer rests on, each told once in the story."""

    @property
    def asked(self) -> str:
        """See `ask`."""
        return ask(self.question, self.answer)


def ask(question: str, answer: str) -> str:
    """A question below its text, with the stem of the answer: a name takes no article."""
    return f"\nQuestion: {question}\nAnswer:{'' if answer[0].isupper() else ' the'}"


Tell = Callable[[random.Random], Story]


@dataclass(frozen=True)
class _Place:
    """A room, and the numbers of the facts that say so: with none, a reader cannot know it."""

    room: str
    facts: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Gift:
    """One handing over, and the number of its fact."""

    giver: str
    thing: str
    receiver: str
    fact: int


# Question and what it asks for; a gift fills in the rest.
_ABOUT_GIFTS = (
    ("Who gave the {thing} to {receiver}?", "giver"),
    ("What did {giver} give to {receiver}?", "thing"),
    ("Who did {giver} give the {thing} to?", "receiver"),
    ("Who gave the {thing}?", "giver"),
    ("Who received the {thing}?", "receiver"),
)


class _World:
    """Who is where and holds what, and which facts tell it."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.facts: list[str] = []
        self.people = {person: _Place(draw.choice(ROOMS)) for person in PEOPLE}
        self.trails = {thing: [_Place(draw.choice(ROOMS))] for thing in THINGS}
        """Every room that a thing was in, the last one last."""
        self.holders: dict[str, tuple[str, int]] = {}
        """Thing -> who holds it, and the fact by which."""
        self.gifts: list[_Gift] = []

    def step(self, kinds: Sequence[_Kind]) -> None:
        """One more fact: someone, a kind of thing that they can do now, and one way to do it."""
        person = self.draw.choice(PEOPLE)
        possible = [ways for kind in kinds if (ways := kind(self, person))]
        self.draw.choice(self.draw.choice(possible))()

    def _tell(self, verbs: Sequence[str], fact: str) -> int:
        self.facts.append(fact.format(verb=self.draw.choice(verbs)))
        return len(self.facts) - 1

    def moves(self, person: str) -> list[Callable[[], None]]:
        here = self.people[person].room
        return [partial(self._move, person, room) for room in ROOMS if room != here]

    def _move(self, person: str, room: str) -> None:
        fact = self._tell(WENT, f"{person} {{verb}} the {room}.")
        self.people[person] = _Place(room, (fact,))
        for thing in self._held(person):
            _, taken = self.holders[thing]
            self.trails[thing].append(_Place(room, (taken, fact)))

    def gets(self, person: str) -> list[Callable[[], None]]:
        here = self.people[person].room
        return [
            partial(self._get, person, thing)
            for thing, trail in self.trails.items()
            if thing not in self.holders and trail[-1].room == here
        ]

    def _get(self, person: str, thing: str) -> None:
        fact = self._tell(TOOK, f"{person} {{verb}} the {thing}.")
        self.holders[thing] = (person, fact)
        where, trail = self.people[person], self.trails[thing]
        if where.facts and not trail[-1].facts:
            trail[-1] = _Place(where.room, (*where.facts, fact))

    def drops(self, person: str) -> list[Callable[[], None]]:
        return [partial(self._drop, person, thing) for thing in self._held(person)]

    def _drop(self, person: str, thing: str) -> None:
        _, taken = self.holders.pop(thing)
        fact = self._tell(LEFT, f"{person} {{verb}} the {thing}.")
        place = self.trails[thing][-1]
        # Where it is rests on who brought it here and left it; others may have it up and down.
        if taken in place.facts:
            self.trails[thing][-1] = _Place(place.room, (*place.facts, fact))

    def gives(self, person: str) -> list[Callable[[], None]]:
        here = self.people[person].room
        return [
            partial(self._give, person, thing, other)
            for thing in self._held(person)
            for other, place in self.people.items()
            if other != person and place.room == here
        ]

    def _give(self, giver: str, thing: str, receiver: str) -> None:
        fact = self._tell(GAVE, f"{giver} {{verb}} the {thing} to {receiver}.")
        self.holders[thing] = (receiver, fact)
        self.gifts.append(_Gift(giver, thing, receiver, fact))

    def _held(self, person: str) -> list[str]:
        return [thing for thing, (holder, _) in self.holders.items() if holder == person]

    def story(self, question: str, answer: str, labels: Sequence[str], facts: set[int]) -> Story:
        left = tuple(label for label in labels if label not in question)
        return Story(tuple(self.facts), question, answer, left, tuple(sorted(facts)))


_Kind = Callable[[_World, str], list[Callable[[], None]]]
"""What one person can do now, of one kind."""


def where_is_person(draw: random.Random) -> Story:
    """qa1: two random walks before each of up to five questions; where someone is now."""

    def tell() -> Story:
        world = _World(draw)
        for _ in range(2 * draw.randrange(1, _QUESTIONS + 1)):
            world.step([_World.moves])
        person = draw.choice([person for person in PEOPLE if world.people[person].facts])
        place = world.people[person]
        return world.story(f"Where is {person}?", place.room, ROOMS, set(place.facts))

    return _until_clear(tell, least=2)


def where_is_thing(draw: random.Random) -> Story:
    """qa2: where a thing is, which someone holds or has left."""

    def ask(world: _World) -> Story | None:
        known = [thing for thing in THINGS if world.trails[thing][-1].facts]
        if not known:
            return None
        thing = draw.choice(known)
        place = world.trails[thing][-1]
        return world.story(f"Where is the {thing}?", place.room, ROOMS, set(place.facts))

    tell = partial(_until_asked, draw, (_World.moves, _World.gets, _World.drops), ask)
    return _until_clear(tell, least=2)


def where_was_thing(draw: random.Random) -> Story:
    """qa3: where a thing was before the room it is in now.

    It may have come to that room more than once; then it always came from the same one.
    """

    def ask(world: _World) -> Story | None:
        known = []
        for thing, trail in world.trails.items():
            now = trail[-1].room
            # All rooms count here, also those that a reader may only infer.
            before = {a.room for a, b in pairwise(trail) if b.room == now}
            if len(before) == 1 and trail[-1].facts and trail[-2].facts:
                known.append(thing)
        if not known:
            return None
        thing = draw.choice(known)
        before, now = world.trails[thing][-2:]
        question = f"Where was the {thing} before the {now.room}?"
        return world.story(question, before.room, ROOMS, {*before.facts, *now.facts})

    tell = partial(_until_asked, draw, (_World.moves, _World.gets, _World.drops), ask)
    return _until_clear(tell, least=4)


def which_room(draw: random.Random) -> Story:
    """qa4: two facts place two rooms at different sides of a third; what lies at one side of it.

    Fact and question may name the two rooms in either order, so the names alone do not tell.
    """
    middle, *others = draw.sample(ROOMS, 3)
    sides = draw.sample(sorted(OPPOSITE), 2)
    facts = tuple(
        draw.choice(
            [
                f"The {room} is {side} of the {middle}.",
                f"The {middle} is {OPPOSITE[side]} of the {room}.",
            ]
        )
        for room, side in zip(others, sides, strict=True)
    )
    asked = draw.randrange(2)
    side = sides[asked]
    question = draw.choice(
        [f"What is {side} of the {middle}?", f"What is the {middle} {OPPOSITE[side]} of?"]
    )
    labels = tuple(room for room in ROOMS if room != middle)
    return Story(facts, question, others[asked], labels, (asked,))


def who_gave_what(draw: random.Random) -> Story:
    """qa5: who gave, what was given, or who was given it."""

    def ask(world: _World) -> Story | None:
        known = []
        for form, wanted in _ABOUT_GIFTS:
            answers: dict[str, set[str]] = {}
            for gift in world.gifts:
                answers.setdefault(form.format_map(vars(gift)), set()).add(getattr(gift, wanted))
            for gift in world.gifts:
                question = form.format_map(vars(gift))
                if len(answers[question]) == 1:
                    known.append((question, getattr(gift, wanted), gift.fact))
        if not known:
            return None
        question, answer, fact = draw.choice(known)
        labels = THINGS if answer in THINGS else PEOPLE
        return world.story(question, answer, labels, {fact})

    tell = partial(_until_asked, draw, (_World.moves, _World.gets, _World.drops, _World.gives), ask)
    return _until_clear(tell, least=2)


def _until_asked(
    draw: random.Random, kinds: Sequence[_Kind], ask: Callable[[_World], Story | None]
) -> Story | None:
    """Facts up to one of a world's first five questions, which half of the facts are followed by.

    None where that takes too many facts.
    """
    world = _World(draw)
    skipped = draw.randrange(_QUESTIONS)
    for _ in range(_MOST_FACTS):
        world.step(kinds)
        if draw.random() < 0.5 and (story := ask(world)):
            if not skipped:
                return story
            skipped -= 1
    return None


def _until_clear(tell: Callable[[], Story | None], least: int) -> Story:
    """The first story of at least so many facts that tells no piece of its evidence twice."""
    while True:
        story = tell()
        if (
            story
            and len(story.facts) >= least
            and all(story.facts.count(story.facts[number]) == 1 for number in story.evidence)
        ):
            return story
