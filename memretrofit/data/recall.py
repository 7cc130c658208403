"""Who likes what: a small world of facts, sentences that say nothing of it, and one question.

::

    Anna likes rice. A dog barked outside. It had rained. Everyone knows that Anna likes  ->  rice

What trains a memory between segments (`memretrofit.data.recall_items`) and what measures it
(`memretrofit.evaluation.tasks.recall`) are drawn from it. Some pairs of name and object are never
trained on, and these are asked for: to have learned pairs by heart is no help.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from memretrofit.errors import ConfigError

_NAMES = """
John Mary Peter Anna Paul James Robert David Sarah Emma Tom Jack Lucy George Henry Alice Frank
Helen Martin Laura Simon Julia Oscar Nina Victor Clara Daniel Sophie Max Ruth Leo Eva
"""
_OBJECTS = """
rice soup bread milk tea fish corn honey cheese coffee sugar salt butter apples beans eggs meat
wine beer cake nuts pasta lemons onions
"""
NAMES: tuple[str, ...] = tuple(_NAMES.split())
OBJECTS: tuple[str, ...] = tuple(_OBJECTS.split())
FACT = " {name} likes {object}."
QUESTION = " Everyone knows that {name} likes"
FILLER = (
    " The room was quiet.",
    " It had rained.",
    " A dog barked outside.",
    " The train was late again.",
    " Snow fell on the hills.",
    " The door was open.",
    " Nobody was at home.",
    " The clock on the wall had stopped.",
    " A light burned in the window.",
    " The road was long.",
    " The market opened early in the day.",
    " Children played by the river.",
    " The old bridge was closed.",
    " The wind blew from the sea.",
    " The letter came on a Monday.",
    " The garden was green.",
)
HELD_OUT = 6
"""One pair of so many is never trained on."""


@dataclass(frozen=True)
class Fact:
    """A name likes an object, by their numbers in `NAMES` and `OBJECTS`."""

    name: int
    thing: int

    @property
    def text(self) -> str:
        """The sentence, with the space before it."""
        return FACT.format(name=NAMES[self.name], object=OBJECTS[self.thing])

    @property
    def question(self) -> str:
        """What the object continues, with the space before it."""
        return QUESTION.format(name=NAMES[self.name])

    @property
    def answer(self) -> str:
        """The object."""
        return OBJECTS[self.thing]


def is_held_out(name: int, thing: int) -> bool:
    """Whether the pair of name and object of these numbers is kept for the evaluation."""
    return (name + thing) % HELD_OUT == 0


def draw_facts(count: int, draw: random.Random, held_out: bool) -> list[Fact]:
    """Facts of different names and objects. The first is of the wanted split, the others are of
    the one that is trained on.

    Raises:
        ConfigError: there are not so many objects.
    """
    if not 1 <= count <= len(OBJECTS):
        raise ConfigError(f"{count} facts; from 1 to {len(OBJECTS)} have an object each")
    while True:
        free, found = set(range(len(OBJECTS))), list[Fact]()
        for name in draw.sample(range(len(NAMES)), count):
            split = held_out and not found
            fitting = sorted(x for x in free if is_held_out(name, x) == split)
            if not fitting:
                break  # what is left is of the other split: draw again
            found.append(Fact(name, draw.choice(fitting)))
            free.remove(found[-1].thing)
        else:
            return found
