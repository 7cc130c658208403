"""What a bank knows, by generation: prompts are continued greedily, and count if the answer is in
what was written.

Prompts are those that were trained on, held-out phrasings, and held-out questions. Arms: the base
model; the bank; nothing read (zeroed); every conversation read elsewhere (mis-routed).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from memretrofit.data.lessons import Lesson
from memretrofit.evaluation.likelihood import batches_of
from memretrofit.evaluation.reader import Reading, read
from memretrofit.evaluation.scoring import strict_match
from memretrofit.evaluation.statistics import Interval, accuracy_interval
from memretrofit.modules.bank import PAD, Tokens
from memretrofit.patching.controls import (
    memory_disabled,
    memory_silenced,
    route_pinned,
    state_shuffled,
)
from memretrofit.patching.ffn import bank_of
from memretrofit.patching.wrapping import unwrapped

ARMS = {
    "base": "the base model",
    "trained": "the bank",
    "zeroed": "the bank, nothing read",
    "misrouted": "the bank, read elsewhere",
}
KINDS = {
    "trained": "prompts of the training texts",
    "held_out": "held-out phrasings",
    "held_out_questions": "held-out questions",
}
ANSWER_TOKENS = 8
"""Written after a prompt."""

BatchArm = Callable[[Any, Tensor], AbstractContextManager[object]]
"""(model, ids [B, T] with PAD) to the context in which a batch is answered."""


def asked(lessons: Sequence[Lesson]) -> dict[str, list[tuple[str, str]]]:
    """Prompts with their answers, for each kind that there is."""
    kinds: dict[str, list[tuple[str, str]]] = {kind: [] for kind in KINDS}
    for lesson in lessons:
        answer = lesson.answer.strip()
        if answer:
            kinds["trained"] += [(context, answer) for context in lesson.contexts]
            kinds["held_out"] += [(prompt, answer) for prompt in lesson.held_out]
            kinds["held_out_questions"] += [(q, answer) for q in lesson.held_out_questions]
    return {kind: pairs for kind, pairs in kinds.items() if pairs}


def recall(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    arm: BatchArm,
    *,
    batch_size: int = 16,
) -> list[float]:
    """1 for each prompt whose continuation holds its answer, else 0."""
    found: list[float] = []
    for rows in batches_of(len(pairs), batch_size):
        prompts = [prompt for prompt, _ in pairs[rows]]
        readings = [Reading(prompt=prompt, max_new_tokens=ANSWER_TOKENS) for prompt in prompts]
        with arm(model, _padded(tokenizer, prompts)):
            outcomes = read(model, tokenizer, readings)
        answers = [answer for _, answer in pairs[rows]]
        found += [
            strict_match(outcome.text, (answer,), "all")
            for outcome, answer in zip(outcomes, answers, strict=True)
        ]
    return found


def _padded(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    longest = max(map(len, rows))
    return torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])


def _misrouted(model: Any, ids: Tensor) -> AbstractContextManager[object]:
    """Every row reads where its own text does not lead; without routes, what the next row reads."""
    inner = unwrapped(model)
    routes = bank_of(inner).wrong_routes(Tokens(ids=ids, new=ids.shape[1]))
    return state_shuffled(inner) if routes is None else route_pinned(inner, routes)


BATCH_ARMS: Mapping[str, BatchArm] = {
    "base": lambda model, _: memory_disabled(unwrapped(model)),
    "trained": lambda model, _: nullcontext(),
    "zeroed": lambda model, _: memory_silenced(unwrapped(model)),
    "misrouted": _misrouted,
}


def measure_recall(
    model: Any, tokenizer: Any, lessons: Sequence[Lesson], console: Console
) -> dict[str, dict[str, Any]]:
    """Recall of every kind of prompt in every arm, with Wilson's intervals over lessons."""
    found: dict[str, dict[str, Any]] = {}
    for kind, pairs in asked(lessons).items():
        found[kind] = {"prompts": len(pairs)}
        reading = share_reading(model, tokenizer, [prompt for prompt, _ in pairs])
        # where hidden states decide what is read, another text's tokens change nothing
        arms = {n: a for n, a in BATCH_ARMS.items() if n != "misrouted" or reading is not None}
        for name, arm in arms.items():
            interval = accuracy_interval(recall(model, tokenizer, pairs, arm))
            found[kind][name] = interval._asdict()
            console.print(f"recall, {KINDS[kind]}, {ARMS[name]}: {interval.mean:.3f}")
        found[kind]["reading"] = reading
    return found


def share_reading(model: Any, tokenizer: Any, prompts: Sequence[str]) -> float | None:
    """Share of prompts whose last token reads a row that was trained: the others abstain, and know
    what the base model knows. None where the bank does not say what is read.
    """
    bank = bank_of(unwrapped(model))
    found = []
    for prompt in prompts:
        ids = torch.tensor(tokenizer(prompt)["input_ids"])[None]
        found.append(bank.addresses(Tokens(ids=ids, new=1)))
    if not any(found):
        return None
    reading = [
        any(bool(bank.table(name).is_open(index).any()) for name, index in rows.items())
        for rows in found
    ]
    return sum(reading) / len(reading)


def words_of(interval: Mapping[str, float], digits: int = 2) -> str:
    """A mean and its interval, as a table shows them."""
    values = Interval(**interval)
    return f"{values.mean:.{digits}f} [{values.low:.{digits}f}, {values.high:.{digits}f}]"
