"""Needles in a haystack: the eight retrieval tasks of RULER (arXiv:2404.06654).

A needle is a sentence that gives a key a value. The haystack is noise, prose, or other needles.

=============== ======== =============== ==== ====== =====
task            haystack key and value   keys values asked
=============== ======== =============== ==== ====== =====
niah_single_1   noise    words, number      1      1     1
niah_single_2   prose    words, number      1      1     1
niah_single_3   prose    words, uuid        1      1     1
niah_multikey_1 prose    words, number      4      1     1
niah_multikey_2 needles  words, number    all      1     1
niah_multikey_3 needles  uuid, uuid       all      1     1
niah_multivalue prose    words, number      1      4     1
niah_multiquery prose    words, number      4      1     4
=============== ======== =============== ==== ====== =====

The wording, and less room for the answer than RULER's 128 tokens, are ours: scores are not those
of the published tables.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

from memretrofit.data.words import ADJECTIVES, NOUNS
from memretrofit.evaluation.material.haystack import (
    distinct,
    filler,
    insert,
    random_uuid,
    ranked,
    surround,
)
from memretrofit.evaluation.material.prose import Prose
from memretrofit.evaluation.task import Draft, Task

CANDIDATES = 10
PLACES = 40
"""Needles that have no depth of their own lie at different ones of so many, evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class Needles(Task):
    """One needle task; a unit is one sentence or needle of the haystack.

    Strict: mean share of the values asked for that are generated. Rank: one of these values against
    nine others; the others are those that the context gives to other keys, as far as it has them,
    and numbers that stand nowhere for the rest. A haystack of needles has them all, in a random
    number before the one that is asked for and the rest after it.
    """

    haystack: Literal["noise", "prose", "needles"]
    key_kind: Literal["words", "uuid"] = "words"
    value_kind: Literal["number", "uuid"] = "number"
    keys: int = 1
    """Keys with needles, those of a haystack of needles apart."""
    values: int = 1
    """Needles for each of them, with a value each."""
    asked: int = 1
    """Of how many keys the values are asked for."""

    def draft(self, units: int, depth: float | None, draw: random.Random, prose: Prose) -> Draft:
        """The needles among `units` units; `depth` is that of the needle that is asked for."""
        keys, values = _keys(self.key_kind, draw), _values(self.value_kind, draw)
        hidden = [
            (key, value) for key in islice(keys, self.keys) for value in islice(values, self.values)
        ]
        asked = hidden[: self.asked * self.values]
        absent = list(islice(values, CANDIDATES - 1))
        wrong = [*(value for _, value in hidden[len(asked) :]), *absent][: CANDIDATES - 1]
        candidates, correct = ranked(
            f" {draw.choice(asked)[1]}", [f" {value}" for value in wrong], draw
        )
        places = [place / (PLACES - 1) for place in draw.sample(range(PLACES), len(hidden))]
        if depth is not None:
            places[0] = depth

        needles = [self._sentence(*pair) for pair in hidden]
        placed = list(zip(places, needles, strict=True))
        if self.haystack == "needles":
            others = zip(keys, chain(absent, values), strict=False)
            rivals = [self._sentence(*pair) for pair in islice(others, len(absent))]
            hay = [self._sentence(*pair) for pair in islice(others, units - len(absent))]
            context = "\n".join(surround(hay, placed[0], rivals, draw))
        else:
            hay = filler(units) if self.haystack == "noise" else prose.passage(draw).take(units)
            context = " ".join(insert(hay, placed))
        what = f"special magic {self.value_kind}" + "s" * (len(asked) > 1)
        be = "are" if len(asked) > 1 else "is"
        whose = _listed(list(dict.fromkeys(key for key, _ in asked)))
        return Draft(
            instruction=f"Some special magic {self.value_kind}s are hidden in the text below. "
            "Remember them: a question follows the text.\n",
            context=context,
            question=f"\nWhat {be} the {what} for {whose} in the text above? "
            f"The {what} for {whose} {be}",
            answers=tuple(value for _, value in asked),
            candidates=candidates,
            correct=correct,
            evidence=tuple(needles[: len(asked)]),
        )

    def _sentence(self, key: str, value: str) -> str:
        return f"One special magic {self.value_kind} for {key} is {value}."


def _keys(kind: Literal["words", "uuid"], draw: random.Random) -> Iterator[str]:
    own = random.Random(draw.random())
    if kind == "uuid":
        return distinct(lambda: random_uuid(own))
    pairs = distinct(lambda: f"{own.choice(ADJECTIVES)}-{own.choice(NOUNS)}")
    # Half of the pairs, which stay quick to find; then names too many to run out.
    longer = distinct(
        lambda: f"{own.choice(ADJECTIVES)}-{own.choice(ADJECTIVES)}-{own.choice(NOUNS)}"
    )
    return chain(islice(pairs, len(ADJECTIVES) * len(NOUNS) // 2), longer)


def _values(kind: Literal["number", "uuid"], draw: random.Random) -> Iterator[str]:
    own = random.Random(draw.random())
    if kind == "uuid":
        return distinct(lambda: random_uuid(own))
    return distinct(lambda: str(own.randrange(1_000_000, 10_000_000)))


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


_NUMBER, _UUID, _SEVERAL = 16, 48, 64
"""Tokens that an answer of each kind takes."""

NIAH_SINGLE_1 = Needles(
    name="niah_single_1",
    answer_tokens=_NUMBER,
    has_depth=True,
    haystack="noise",
    reads_prose=False,
    rank_by_presence=True,
)
NIAH_SINGLE_2 = Needles(
    name="niah_single_2",
    answer_tokens=_NUMBER,
    has_depth=True,
    haystack="prose",
    rank_by_presence=True,
)
NIAH_SINGLE_3 = Needles(
    name="niah_single_3",
    answer_tokens=_UUID,
    has_depth=True,
    haystack="prose",
    value_kind="uuid",
    rank_by_presence=True,
)
NIAH_MULTIKEY_1 = Needles(
    name="niah_multikey_1", answer_tokens=_NUMBER, has_depth=True, haystack="prose", keys=4
)
NIAH_MULTIKEY_2 = Needles(
    name="niah_multikey_2",
    answer_tokens=_NUMBER,
    has_depth=True,
    haystack="needles",
    least_units=CANDIDATES - 1,
    reads_prose=False,
)
NIAH_MULTIKEY_3 = Needles(
    name="niah_multikey_3",
    answer_tokens=_UUID,
    has_depth=True,
    haystack="needles",
    key_kind="uuid",
    value_kind="uuid",
    least_units=CANDIDATES - 1,
    reads_prose=False,
)
NIAH_MULTIVALUE = Needles(
    name="niah_multivalue",
    answer_tokens=_SEVERAL,
    haystack="prose",
    values=4,
    rank_by_presence=True,
)
NIAH_MULTIQUERY = Needles(
    name="niah_multiquery",
    answer_tokens=_SEVERAL,
    haystack="prose",
    keys=4,
    asked=4,
    rank_by_presence=True,
)
