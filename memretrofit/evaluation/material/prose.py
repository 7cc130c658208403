"""Long English text for tasks to hide things in: one source of `memretrofit.data`, in sentences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from memretrofit.data.sentences import split_sentences
from memretrofit.errors import ConfigError


@dataclass(frozen=True)
class Prose:
    """Documents of one source, and what a report has to say of them."""

    source: str
    licence: str
    documents: tuple[tuple[str, ...], ...] = field(repr=False)
    """Sentences of each document, in order."""
    titles: tuple[str, ...] = ()

    def passage(self, draw: random.Random) -> Passage:
        """A place to read on from: a document and a sentence in it, drawn once for an item."""
        document = draw.randrange(len(self.documents))
        return Passage(self, document, draw.randrange(len(self.documents[document])))


NO_PROSE = Prose(source="none", licence="none", documents=())
"""For tasks that read none."""


@dataclass(frozen=True)
class Passage:
    """Sentences from one place on; past the end of a document the next one follows."""

    prose: Prose
    document: int
    sentence: int

    def take(self, count: int) -> list[str]:
        """The first `count` sentences: `take(n)` begins with `take(n - 1)`."""
        found: list[str] = []
        document, start = self.document, self.sentence
        while len(found) < count:
            sentences = self.prose.documents[document]
            found.extend(sentences[start : start + count - len(found)])
            document, start = (document + 1) % len(self.prose.documents), 0
        return found


def load_prose(source: str | Path, *, only: Sequence[str] = ()) -> Prose:
    """Prose of a named source or of the user's own files.

    Args:
        source: a name in `memretrofit.data.SOURCES`, or a path.
        only: the titles to use; empty takes all.

    Raises:
        ConfigError: the source is unknown, missing or empty, or no title is left.
    """
    # Torch, which training reads these documents with, is not loaded to define a task.
    from memretrofit.data import load_documents

    chosen = [document for document in load_documents(source) if not only or document.title in only]
    if not chosen:
        raise ConfigError(
            f"prose {str(source)!r} has no document left with only={list(only)}; "
            "name titles that it has, or another source"
        )
    sentences = [split_sentences(document.text) for document in chosen]
    return Prose(
        source=str(source),
        licence=chosen[0].licence,
        documents=tuple(map(tuple, sentences)),
        titles=tuple(document.title for document in chosen),
    )
