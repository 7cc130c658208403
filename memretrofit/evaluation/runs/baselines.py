"""What a model can do without a memory: read again only the chunks that matter, as text.

Both wrap an answerer that reads with full attention, and give it shorter prompts; instruction and
question stay as they are. `context` of a `Reading` says what may be cut.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from memretrofit.errors import ConfigError
from memretrofit.evaluation.reader import Answerer, Outcome, Reading
from memretrofit.evaluation.task import Count

CHUNK_TOKENS = 64
"""Up to which BM25 joins sentences to a chunk; less where the budget is small."""
LEAST_CHUNKS = 4
"""Chunks that a budget has room for, sentences permitting: an answer may rest on several."""
MOST_TOKENS = 3000
"""Of a chunk that OPRM reads on its own, the most that its paper has."""
_DEFAULT_SHARE = 0.25
"""Of the context's tokens, where no budget is given."""

# To the end of a sentence or of a line, white space included, so that pieces join to the text.
_SENTENCE = re.compile(r".+?(?:[.!?][\"')\]]*\s+|\n+|\Z)", re.DOTALL)
_WORD = re.compile(r"\S+\s*|\s+")


@dataclass(frozen=True, eq=False)
class TextArm:
    """Answers from parts of the text, which a model reads with full attention."""

    reader: Any
    """The arm that reads the parts."""
    answer: Answerer
    parts: Callable[[Reading], list[Reading]]
    """What is read in the place of a reading."""
    count: Count

    def __call__(self, readings: Sequence[Reading]) -> list[Outcome]:
        """Outcomes of a batch, in order."""
        return self.answer(readings)

    def cost(self, reading: Reading) -> dict[str, int | float]:
        """What the reader's `cost` is for the longest part: only one is held at a time."""
        return self.reader.cost(max(self.parts(reading), key=lambda part: self.count(part.prompt)))


def split_chunks(text: str, count: Count, size: int, *, longest: int | None = None) -> list[str]:
    """Neighbouring sentences together while they have at most `size` tokens.

    Joined, the chunks are the text. A sentence longer than `size` stands alone; one longer than
    `longest` (None: than `size`) is cut between words. A line counts as a sentence.
    """
    bare = count("")
    pieces: list[tuple[str, int]] = []
    for sentence in _SENTENCE.findall(text):
        tokens = count(sentence) - bare
        if tokens <= (longest or size):
            pieces.append((sentence, tokens))
        else:
            pieces += [(word, count(word) - bare) for word in _WORD.findall(sentence)]
    chunks: list[str] = []
    held = size
    for piece, tokens in pieces:
        if chunks and held + tokens <= size:
            chunks[-1] += piece
            held += tokens
        else:
            chunks.append(piece)
            held = tokens
    return chunks


def bm25_scores(
    question: str, chunks: Sequence[str], *, k1: float = 1.2, b: float = 0.75
) -> list[float]:
    """Okapi BM25 of each chunk for the words of a question.

    ::

        score(d) = sum over q of  idf(q) f(q, d) (k1 + 1) / (f(q, d) + k1 (1 - b + b |d| / mean))
        idf(q)   = ln(1 + (n - n_q + 1/2) / (n_q + 1/2))

    over the words q of the question, each once; `n` chunks, `n_q` of them with the word, `f` its
    count in the chunk, `|d|` words of the chunk and `mean` of all chunks. Words are runs of letters
    and digits, case apart.

    Source: Robertson and Zaragoza 2009, doi:10.1561/1500000019; the idf with 1 inside the logarithm
    is never below zero.
    """
    counts = [Counter(_words(chunk)) for chunk in chunks]
    sizes = [sum(found.values()) for found in counts]
    mean = sum(sizes) / max(1, len(sizes)) or 1.0
    scores = [0.0] * len(chunks)
    for word in dict.fromkeys(_words(question)):
        holding = sum(word in found for found in counts)
        idf = math.log1p((len(chunks) - holding + 0.5) / (holding + 0.5))
        for place, (found, size) in enumerate(zip(counts, sizes, strict=True)):
            f = found[word]
            scores[place] += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * size / mean))
    return scores


def bm25(answer: Answerer, count: Count, *, budget: int | None = None) -> TextArm:
    """Reads the chunks that share most with the question, in their own order, and no others.

    Args:
        answer: reads what is left, with full attention.
        count: tokens of a text.
        budget: tokens of context to keep, such as window + sinks of the memory that it is compared
            with; None keeps a quarter of the context.

    The best chunks are taken while they fit; of equals the later, so that a question that names
    nothing leaves the end of the text, as a window does.

    Raises:
        ConfigError: the budget is below 1.
    """
    _check(budget)

    def shorter(reading: Reading) -> list[Reading]:
        instruction, context, question = _parts(reading)
        left = limit = _budget(context, count, budget)
        size = max(1, min(CHUNK_TOKENS, limit // LEAST_CHUNKS))
        chunks = split_chunks(context, count, size, longest=limit)
        scores = bm25_scores(question, chunks)
        sizes = [count(chunk) - count("") for chunk in chunks]
        kept: set[int] = set()
        for place in sorted(range(len(chunks)), key=lambda x: (scores[x], x), reverse=True):
            if sizes[place] <= left or not kept:
                kept.add(place)
                left -= sizes[place]
        text = "".join(chunks[place] for place in sorted(kept))
        return [replace(reading, prompt=(instruction + text + question).rstrip(), context=None)]

    def read(readings: Sequence[Reading]) -> list[Outcome]:
        return answer([part for reading in readings for part in shorter(reading)])

    return TextArm(answer, read, shorter, count)


def oprm(answer: Answerer, count: Count, *, chunk_tokens: int | None = None) -> TextArm:
    """Reads each chunk on its own, and answers from the one whose first token is most certain.

    ::

        j = argmin over chunks i of H(p(. | instruction, chunk_i, question))

    Of equals the first. What is not in one chunk cannot be put together.

    Args:
        answer: reads the chunks, with full attention.
        count: tokens of a text.
        chunk_tokens: of context in a chunk; None takes a quarter of the context, at most
            `MOST_TOKENS`. The paper has 1000 to 3000, and cuts at tokens; here chunks end with a
            sentence.

    Source: OPRM, arXiv:2505.07793, section 4, entropy-based criterion. Its filter for chunks that
    are answered with an error word is left out: a small model does not keep to such a word.

    Raises:
        ConfigError: chunk_tokens is below 1.
    """
    _check(chunk_tokens)

    def pieces(reading: Reading) -> list[Reading]:
        return _pieces(reading, count, chunk_tokens)

    def read(readings: Sequence[Reading]) -> list[Outcome]:
        parts = [pieces(reading) for reading in readings]
        asked = [replace(r, candidates=(), max_new_tokens=0) for of_one in parts for r in of_one]
        # Chunks that are read together hold no more than the whole prompts would.
        room = len(readings) * max(count(reading.prompt) for reading in readings)
        rows = max(1, room // max(count(reading.prompt) for reading in asked))
        entropies: list[float] = []
        for first in range(0, len(asked), rows):
            entropies += [outcome.entropy for outcome in answer(asked[first : first + rows])]
        chosen: list[Reading] = []
        for of_one in parts:
            own, entropies = entropies[: len(of_one)], entropies[len(of_one) :]
            chosen.append(of_one[min(range(len(own)), key=lambda place: own[place])])
        return answer(chosen)

    return TextArm(answer, read, pieces, count)


def _pieces(reading: Reading, count: Count, chunk_tokens: int | None) -> list[Reading]:
    instruction, context, question = _parts(reading)
    size = chunk_tokens or min(_budget(context, count, None), MOST_TOKENS)
    chunks = split_chunks(context, count, size) or [""]
    return [
        replace(reading, prompt=(instruction + chunk + question).rstrip(), context=None)
        for chunk in chunks
    ]


def _parts(reading: Reading) -> tuple[str, str, str]:
    """Instruction, context and question; all of it question where there is nothing to cut."""
    start, stop = reading.context or (0, 0)
    return reading.prompt[:start], reading.prompt[start:stop], reading.prompt[stop:]


def _budget(context: str, count: Count, budget: int | None) -> int:
    return budget or max(1, int(_DEFAULT_SHARE * (count(context) - count(""))))


def _check(budget: int | None) -> None:
    if budget is not None and budget < 1:
        raise ConfigError(f"a budget of {budget} tokens holds no text; give at least 1, or None")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
