"""Small stories scattered through long prose, and a question at the end: BABILong, to train on.

The stories are those of `memretrofit.data.stories`. A fact falls into any segment, two may fall
into the same one, and all keep their order; the rest is prose from one place on. The question has
the form that the tasks `babilong_qa1` .. `babilong_qa5` ask it in; their instruction is not there.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from memretrofit.data.recall import HELD_OUT
from memretrofit.data.segment_texts import Ids, SegmentTexts, Told
from memretrofit.data.sentences import split_sentences
from memretrofit.data.stories import Story, Tell
from memretrofit.errors import ConfigError


def is_held_out(story: Story) -> bool:
    """Whether a story is never trained on: one of `HELD_OUT`."""
    told = "\n".join([*story.facts, story.question])
    return zlib.crc32(told.encode()) % HELD_OUT == 0


class StoryItems(SegmentTexts):
    """See the module.

    Args:
        tell_story: draws one.
        documents: the prose.

    Raises:
        ConfigError: there is no prose.
    """

    def __init__(
        self, tokenizer: Any, segment_length: int, tell_story: Tell, documents: Sequence[str]
    ) -> None:
        super().__init__(tokenizer, segment_length)
        self.tell_story = tell_story
        self.prose = [sentence for text in documents for sentence in split_sentences(text)]
        if not self.prose:
            raise ConfigError("stories stand in prose, and the sources have no sentence")

    def tell(self, segments: int, draw: random.Random, held_out: bool) -> Told:
        """See `SegmentTexts`."""
        story = self.tell_story(draw)
        while is_held_out(story) != held_out:
            story = self.tell_story(draw)
        told: list[list[Ids]] = [[] for _ in range(segments)]
        places = sorted(draw.randrange(segments) for _ in story.facts)
        for fact, place in zip(story.facts, places, strict=True):
            told[place].append(self.ids(f" {fact}"))
        return Told(told, self.ids(story.asked), self.ids(f" {story.answer}"), self._filler(draw))

    def _filler(self, draw: random.Random) -> Iterator[Ids]:
        place = draw.randrange(len(self.prose))
        while True:
            yield self.ids(f" {self.prose[place]}")
            place = (place + 1) % len(self.prose)
