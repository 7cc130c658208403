"""Teach procedures: each is one row behind the vocabulary of a frozen model.

::

    loss = mean over procedures' tokens and responses of -log p(token | what comes before it)

After each step the rows that train take the length of the others (`renormalise_procedures`).
Everything random is a function of (seed, step).

What was learned is asked of examples that were held out: `routed` is the share whose procedure is
the most likely token behind the prompt, `exact` that whose whole response is, behind the right
procedure. Two controls must lose it: the rows at zero, and the token of the next procedure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memretrofit.data.lessons import IGNORED, Item, batch
from memretrofit.errors import ConfigError, StateError
from memretrofit.patching.vocabulary import (
    procedure_ids,
    renormalise_procedures,
    vocabulary_ledger_of,
)
from memretrofit.training.checkpoints import load_checkpoint, save_checkpoint
from memretrofit.training.losses import lesson_logits, lesson_loss
from memretrofit.training.schedule import learning_rate_factor
from memretrofit.training.trainable import GradientWatch, parameter_groups


@dataclass(frozen=True, kw_only=True)
class ProcedureSettings:
    """How long, and how fast."""

    steps: int = 300
    batch_size: int = 8
    """Examples of one step."""
    learning_rate: float = 1e-2
    """Of AdamW, at its peak; see `learning_rate_factor` for the rest."""
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    save_steps: int = 50
    """Steps between checkpoints, and between looks at what is held out."""
    fingerprint: str = ""
    """Of what is learned; a checkpoint of another one is refused."""


class Mastery(NamedTuple):
    """Shares of examples that were not trained on."""

    routed: float
    exact: float
    routed_zeroed: float
    """With all rows at zero."""
    exact_zeroed: float
    exact_other: float | None
    """Behind the token of the next procedure; None where there is only one."""


class ProcedureStep(NamedTuple):
    """What one step measured, on the examples that it then learned from."""

    step: int
    """Counts from 1."""
    loss: float
    learning_rate: float
    grad_norm: float
    held_out: Mastery | None
    """None between looks."""


def train_procedures(
    model: Any,
    promised: Mapping[str, nn.Parameter],
    items: Sequence[Item],
    held_out: Sequence[Item],
    settings: ProcedureSettings,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[ProcedureStep], None] | None = None,
) -> None:
    """Train the rows that were promised; nothing else changes.

    Args:
        model: from `trainable_parameters`, with procedures open; trained on the device it is on, in
            eval mode (no dropout).
        promised: the same.
        items: see `memretrofit.data.procedures.procedure_items`.
        held_out: the same, of examples that are only asked.
        settings: see `ProcedureSettings`.
        checkpoint: file that is written every `save_steps` steps and at the end. When it exists,
            training goes on from it, with the same losses as an uninterrupted run.
        on_step: called after each step.

    Raises:
        ConfigError: there is nothing to train or nothing to learn.
        StateError: the loss or its gradient is not finite, or a promised row received no gradient
            while all items were read once.
        CheckpointError: `checkpoint` is damaged or belongs to other settings.
    """
    if not promised or not items:
        raise ConfigError(f"{len(promised)} parameters and {len(items)} texts: nothing to train")
    optimizer = torch.optim.AdamW(
        parameter_groups(promised.values(), settings.weight_decay), lr=settings.learning_rate
    )
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = load_checkpoint(checkpoint, promised, [optimizer], settings)
    # a row of which no example was drawn yet may have no gradient
    watch = GradientWatch(promised, steps=max(3, -(-len(items) // settings.batch_size)))
    model.eval()
    for step in range(start, settings.steps):
        loss = lesson_loss(model, batch(items, settings.seed, step, settings.batch_size))
        loss.backward()
        watch.observe()
        norm = nn.utils.clip_grad_norm_(promised.values(), settings.max_grad_norm)
        value, norm = torch.stack([loss.detach(), norm.to(loss)]).tolist()
        if not math.isfinite(value) or not math.isfinite(norm):
            raise StateError(
                f"the loss of step {step + 1} is {value} and its gradient has norm {norm}; lower "
                "the learning rate, or train in float32"
            )
        factor = learning_rate_factor(step, settings.steps, settings.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
        renormalise_procedures(model)
        due = step + 1 == settings.steps or (step + 1) % settings.save_steps == 0
        if on_step is not None:
            found = mastery(model, held_out, settings.batch_size) if due and held_out else None
            on_step(ProcedureStep(step + 1, value, settings.learning_rate * factor, norm, found))
        if checkpoint is not None and due:
            save_checkpoint(checkpoint, step + 1, promised, [optimizer], settings)


@torch.no_grad()
def mastery(model: Any, items: Sequence[Item], batch_size: int) -> Mastery:
    """What the procedures of `model` can do, and what is left of it without them.

    Raises:
        StateError: the model has no procedures.
    """
    memory, openers = vocabulary_ledger_of(model).memory, procedure_ids(model)
    routed, exact = _right(model, items, batch_size)
    with _zeroed(list(memory.parameters())):
        routed_zeroed, exact_zeroed = _right(model, items, batch_size)
    others = None
    if len(openers) > 1:
        _, others = _right(model, [_with_next(item, openers) for item in items], batch_size)
    return Mastery(routed, exact, routed_zeroed, exact_zeroed, others)


def _right(model: Any, items: Sequence[Item], size: int) -> tuple[float, float]:
    """Share of items whose procedure, and whose whole response, is what the model says next."""
    routed = exact = 0
    for begin in range(0, len(items), size):
        few = items[begin : begin + size]
        given = batch(few, 0, 0, len(few))
        labels = given["labels"][:, 1:].to(model.device)
        right = lesson_logits(model, given)[:, :-1].argmax(-1) == labels
        learned = labels != IGNORED
        opener = learned & (learned.cumsum(-1) == 1)
        routed += int((right & opener).any(-1).sum())
        exact += int((right | opener | ~learned).all(-1).sum())
    return routed / len(items), exact / len(items)


def _with_next(item: Item, openers: Tensor) -> Item:
    """The same text with the procedure behind its own, the first behind the last."""
    ids = item.ids.clone()
    place = int((openers == ids[item.first]).nonzero())
    ids[item.first] = openers[(place + 1) % len(openers)]
    return Item(ids, item.first)


@contextmanager
def _zeroed(rows: list[nn.Parameter]) -> Iterator[None]:
    """Inside, `rows` are zero; afterwards their own bits again."""
    held = [row.clone() for row in rows]
    try:
        for row in rows:
            row.zero_()
        yield
    finally:
        for row, own in zip(rows, held, strict=True):
            row.copy_(own)
