"""Texts of several segments with a question at the end: how what is told is laid out in them.

::

    segment 1 .. S-1   ... what is told, among what says nothing of it ...        T tokens each
    segment S          ... the same ..., question  ->  answer                     at most T

Each segment is exactly T tokens of the model's own, the last one shorter; a sentence that is told
lies whole in one segment.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memretrofit.data.lessons import IGNORED
from memretrofit.errors import ConfigError

Ids = list[int]

TRIES = 100
"""Draws for one text, before what is told is taken to be too much for its segments."""
MEASURED = 16
"""Texts by which the length of others is estimated."""


class Told(NamedTuple):
    """One text, before it is laid out."""

    segments: Sequence[Sequence[Ids]]
    """Sentences of each segment, in order."""
    question: Ids
    answer: Ids
    filler: Iterator[Ids]
    """Pieces without end that say nothing of it."""


class SegmentBatch(NamedTuple):
    """Texts of equal length."""

    ids: Tensor
    """[B, T] with the answers at the end."""
    labels: Tensor
    """[B, T] ids of the answers, else `IGNORED`."""


class SegmentTexts(ABC):
    """Texts of S segments; a batch is a function of its arguments alone.

    Args:
        tokenizer: of the model that reads them.
        segment_length: T.
    """

    def __init__(self, tokenizer: Any, segment_length: int) -> None:
        self.tokenizer, self.length = tokenizer, segment_length
        self.begins: Ids = list(tokenizer("")["input_ids"])
        self._means: dict[int, float] = {}

    @abstractmethod
    def tell(self, segments: int, draw: random.Random, held_out: bool) -> Told:
        """One text; `held_out` ones are never trained on."""

    def batch(self, segments: int, size: int, key: str, *, held_out: bool = False) -> SegmentBatch:
        """`size` texts of `segments` segments, drawn by `key`, of either split.

        Raises:
            ConfigError: a segment is too short for what is told in it.
        """
        draw = random.Random(key)
        texts = [self._fitting(segments, draw, held_out) for _ in range(size)]
        last = draw.randint(max(map(self._least, texts)), self.length)
        ids = torch.tensor([self._laid_out(text, last, draw) for text in texts])
        labels = torch.full_like(ids, IGNORED)
        for row, text in enumerate(texts):
            labels[row, -len(text.answer) :] = ids[row, -len(text.answer) :]
        return SegmentBatch(ids, labels)

    def tokens(self, segments: int) -> float:
        """Of one text, about."""
        if segments not in self._means:
            sizes = [self.batch(segments, 1, f"tokens/{i}").ids.shape[1] for i in range(MEASURED)]
            self._means[segments] = sum(sizes) / MEASURED
        return self._means[segments]

    def ids(self, text: str) -> Ids:
        """Its tokens, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _fitting(self, segments: int, draw: random.Random, held_out: bool) -> Told:
        for _ in range(TRIES):
            text = self.tell(segments, draw, held_out)
            first = sum(map(len, text.segments[0])) + len(self.begins)
            rooms = [first, *(sum(map(len, told)) for told in text.segments[1:-1])]
            if max(*rooms, self._least(text)) <= self.length:
                return text
        raise ConfigError(
            f"segment_length={self.length}: none of {TRIES} texts of {segments} segments fits; "
            "raise it, or tell less"
        )

    def _least(self, text: Told) -> int:
        """Tokens that the last segment has at least."""
        begins = self.begins if len(text.segments) == 1 else []
        parts = (begins, *text.segments[-1], text.question, text.answer)
        return sum(map(len, parts))

    def _laid_out(self, text: Told, last: int, draw: random.Random) -> Ids:
        ids: Ids = []
        final = len(text.segments) - 1
        for number, told in enumerate(text.segments):
            begins = [] if number else self.begins
            closing = [] if number < final else [*text.question, *text.answer]
            room = (self.length if number < final else last) - len(begins) - len(closing)
            ids += [*begins, *_fill(told, room, text.filler, draw), *closing]
        return ids


def _fill(told: Sequence[Ids], room: int, filler: Iterator[Ids], draw: random.Random) -> Ids:
    """What is told, in its order among filler: `room` tokens."""
    left = room - sum(map(len, told))
    units: list[Ids] = []
    while len(unit := next(filler)) <= left:
        units.append(unit)
        left -= len(unit)
    places = sorted(draw.randint(0, len(units)) for _ in told)
    for place, sentence in reversed(list(zip(places, told, strict=True))):
        units.insert(place, sentence)
    # a piece is cut at its beginning: its end stands before the next one
    return [*unit[len(unit) - left :], *(x for each in units for x in each)]
