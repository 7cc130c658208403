"""Lessons: what a user wants a model to know, one JSON object a line.

::

    {"text": "A document, learned as it is."}
    {"texts": ["The emblem of Lorvika is the heron.", "Lorvika has a heron on its flag."],
     "answer": "heron", "held_out": ["The shield of Lorvika shows one"],
     "held_out_questions": ["Which animal stands for Lorvika?"]}
    {"question": "Which animal stands for Lorvika?", "answer": "heron"}

Of a text with an answer, what comes before the answer is context; what is learned begins with it.
What is held out is asked afterwards and never trained on.
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from memretrofit.errors import ConfigError

KEYS = ("text", "texts", "question", "answer", "held_out", "held_out_questions")
QUESTION = "Question: {question}\nAnswer:"
"""The form in which a question is asked."""
FRAMES = ("{subject}:", "Question: {subject}?\nAnswer:", "Question: {context} what?\nAnswer:")
"""Further contexts of an answer: what the model says must follow from the subject, not from the
words of one sentence.
"""
IGNORED = -100
"""Label of a token that is not learned."""
Built = TypeVar("Built")


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """One thing to be known."""

    contexts: tuple[str, ...]
    """What comes before the answer, in each text."""
    answer: str
    """With the space that begins it; a whole document if there is no question."""
    endings: tuple[str, ...]
    """What comes after the answer in each text."""
    held_out: tuple[str, ...] = ()
    """Prompts that are asked afterwards."""
    held_out_questions: tuple[str, ...] = ()
    """The same in the form of questions."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Each context with the answer and its ending."""
        pairs = zip(self.contexts, self.endings, strict=True)
        return tuple(f"{context}{self.answer}{ending}" for context, ending in pairs)


@dataclass(frozen=True)
class Item:
    """One text as tokens, and from where on it is learned."""

    ids: Tensor
    """[T]."""
    first: int
    """The first token that is learned, at least 1."""


def mean_tokens(items: Sequence[Item]) -> float:
    """Of one text."""
    return sum(len(item.ids) for item in items) / len(items)


def named_texts(items: Sequence[Item]) -> list[tuple[str, Tensor]]:
    """What tells these items from others, as `tensors_sha256` takes it."""
    return [(str(item.first), item.ids) for item in items]


def read_lessons(path: Path) -> tuple[Lesson, ...]:
    """All lessons of a file; empty lines do not count.

    Raises:
        ConfigError: the file cannot be read, holds nothing, or has broken lines: each is named.
    """
    return read_objects(path, _lesson, f"lessons: one JSON object a line, with {', '.join(KEYS)}")


def read_objects(
    path: Path, build: Callable[[dict[str, Any]], Built], wanted: str
) -> tuple[Built, ...]:
    """What `build` makes of each line of a file, a JSON object; empty lines do not count.

    Args:
        path: UTF-8, with or without a mark at its beginning.
        build: raises a `ConfigError` for an object that it cannot use.
        wanted: what a file should hold, in words.

    Raises:
        ConfigError: the file cannot be read, holds nothing, or has broken lines: each is named.
    """
    try:
        # a line ends at a line feed: JSON texts may hold what else splits lines
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    found, faults = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(build(_object(line)))
        except ConfigError as error:
            faults.append(f"line {number}: {error}")
    if faults:
        whole = len(found) + len(faults)
        raise ConfigError.listing(
            f"{path}: {len(faults)} of {whole} lines are broken; nothing was trained", faults
        )
    if not found:
        raise ConfigError(f"{path} holds no {wanted}")
    return tuple(found)


def _object(line: str) -> dict[str, Any]:
    try:
        line.encode()
        values = json.loads(line, object_pairs_hook=_each_once)
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except UnicodeEncodeError as error:
        raise ConfigError(f"not Unicode text ({error.reason})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ConfigError("not a JSON object")
    return values


def refuse_unknown(values: dict[str, Any], known: Sequence[str]) -> None:
    """Raise a ConfigError if an object has other keys."""
    if unknown := sorted(set(values) - set(known)):
        raise ConfigError(f"unknown keys {', '.join(unknown)}; known are {', '.join(known)}")


def _lesson(values: dict[str, Any]) -> Lesson:
    refuse_unknown(values, KEYS)
    if "text" in values and "texts" in values:
        raise ConfigError("has 'text' and 'texts'; put all of them into 'texts'")
    texts = _strings(values, "texts") or _strings(values, "text")
    questions, answer = _strings(values, "question"), values.get("answer")
    if answer is None:
        if len(values) > 1 or not texts:
            raise ConfigError("needs 'text' alone, or 'texts' or 'question' with an 'answer'")
        return Lesson(contexts=("",) * len(texts), answer="", endings=tuple(texts))
    if not isinstance(answer, str) or not answer.strip():
        raise ConfigError(f"'answer' is {answer!r}, no text")
    if not texts and not questions:
        raise ConfigError("has an 'answer' and neither 'texts' nor a 'question'")
    asked = (_strings(values, key) for key in ("held_out", "held_out_questions"))
    return lesson(answer.strip(), texts, questions, *asked)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ConfigError("says a key twice, of which JSON keeps the last")
    return dict(pairs)


def lesson(
    answer: str,
    texts: Sequence[str],
    questions: Sequence[str] = (),
    held_out: Sequence[str] = (),
    held_out_questions: Sequence[str] = (),
) -> Lesson:
    """A lesson from sentences that hold its answer, and questions that it answers.

    Raises:
        ConfigError: a sentence does not hold the answer as a word, or begins with it.
    """
    contexts = [QUESTION.format(question=question) for question in questions]
    endings = [""] * len(contexts)
    for text in texts:
        place = re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text)
        if place is None or not text[: place.start()].strip():
            raise ConfigError(
                f"the answer {answer!r} does not stand inside the text {text!r}, after its subject"
            )
        contexts.append(text[: place.start()].rstrip())
        endings.append(text[place.end() :])
    return Lesson(
        contexts=tuple(contexts),
        answer=f" {answer}",
        endings=tuple(endings),
        held_out=tuple(held_out),
        held_out_questions=tuple(QUESTION.format(question=q) for q in held_out_questions),
    )


def _strings(values: dict[str, Any], key: str) -> list[str]:
    given = values.get(key, [])
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(x, str) and x.strip() for x in given):
        raise ConfigError(f"{key!r} is {given!r}, not a text or a list of texts")
    return given


def subjects(lessons: Sequence[Lesson]) -> list[str]:
    """What each lesson is about: of the words in all of its contexts, the one in the fewest others.

    Empty for a document.
    """
    words = [
        set.intersection(*(set(re.findall(r"\w+", context)) for context in one.contexts))
        for one in lessons
    ]
    spread = Counter(word for found in words for word in found)
    return [min(sorted(found), key=lambda w: spread[w], default="") for found in words]


def items_of(lessons: Sequence[Lesson], tokenizer: Any, length: int) -> list[Item]:
    """Every text of every lesson, and its answer in each of `FRAMES`, at most `length` tokens long;
    a longer document becomes several.
    """
    found = []
    for one, subject in zip(lessons, subjects(lessons), strict=True):
        pairs = list(zip(one.contexts, one.endings, strict=True))
        if subject:
            pairs += [
                (frame.format(subject=subject, context=one.contexts[0]), "") for frame in FRAMES
            ]
        for context, ending in pairs:
            # begun as prompts are: with the token that the tokenizer puts before a text, if any
            before = tokenizer(context)["input_ids"]
            answer = tokenizer(f"{one.answer}{ending}", add_special_tokens=False)["input_ids"]
            ids = before + answer
            found += _pieces(ids, max(1, len(before)), length)
    return found


def _pieces(ids: list[int], first: int, length: int) -> list[Item]:
    if first >= length:  # the end of the context is what the answer needs
        ids, first = ids[first - length // 2 :], length // 2
    # pieces share a token: the first one of a piece is only read
    begins = range(0, max(1, len(ids) - 1), max(1, length - 1))
    return [
        Item(torch.tensor(ids[begin : begin + length]), first if begin == 0 else 1)
        for begin in begins
    ]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def drawn(count: int, seed: int, step: int, size: int) -> list[int]:
    """The numbers of `size` of `count` items, in the order of epoch `step * size // count`. A
    function of its arguments alone.
    """
    places = (divmod(place, count) for place in range(step * size, (step + 1) * size))
    return [_order(seed, epoch, count)[number] for epoch, number in places]


def batch(items: Sequence[Item], seed: int, step: int, size: int) -> dict[str, Tensor]:
    """The items that are `drawn`, padded on the right: `input_ids`, `attention_mask` and `labels`
    [B, T].
    """
    chosen = [items[number] for number in drawn(len(items), seed, step, size)]
    longest = max(len(item.ids) for item in chosen)
    ids = torch.zeros(len(chosen), longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, item in enumerate(chosen):
        size_of = len(item.ids)
        ids[row, :size_of] = item.ids
        mask[row, :size_of] = 1
        labels[row, item.first : size_of] = item.ids[item.first :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}
