"""Write lessons into what may change of a frozen model: a bank's opened rows, or an adapter.

::

    loss = mean over learned tokens of -log p(token | what comes before it)

Rows have sparse gradients: dense Adam would go on moving every row by its old momentum. What a step
may move, and by which optimizer, is a rule of its own (`writing`). Everything random is a function
of (seed, step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from memretrofit.data.lessons import Item, batch, drawn
from memretrofit.errors import ConfigError, StateError
from memretrofit.training.checkpoints import load_checkpoint, save_checkpoint
from memretrofit.training.losses import lesson_loss
from memretrofit.training.schedule import learning_rate_factor
from memretrofit.training.writing import ROWS, ReadRows, Writing


@dataclass(frozen=True, kw_only=True)
class InjectSettings:
    """How long, and how fast."""

    steps: int = 300
    batch_size: int = 8
    """Texts of one step."""
    learning_rate: float = 3e-3
    """Of the rule's optimizers, at its peak; see `learning_rate_factor` for the rest."""
    warmup_ratio: float = 0.05
    max_grad_norm: float = 1.0
    """Of the dense parameters; rows are not clipped: Adam bounds their steps, and SGD of few rows
    has steps of few numbers.
    """
    seed: int = 0
    save_steps: int = 50
    """Steps between checkpoints."""
    fingerprint: str = ""
    """Of what is learned and where it goes; a checkpoint of another one is refused."""


class InjectStep(NamedTuple):
    """What one step measured, on the texts that it then learned from."""

    step: int
    """Counts from 1."""
    loss: float
    learning_rate: float
    tokens: int
    """That were read."""


def inject(
    model: Any,
    parameters: Mapping[str, nn.Parameter],
    items: Sequence[Item],
    settings: InjectSettings,
    *,
    writing: Writing | None = None,
    checkpoint: Path | None = None,
    on_step: Callable[[InjectStep], None] | None = None,
) -> None:
    """Train `parameters` of `model` on `items`; nothing else changes.

    Args:
        model: patched, or a PeftModel; trained on the device it is on, in eval mode (no dropout).
        parameters: by name, as they go into a checkpoint.
        items: see `memretrofit.data.lessons.items_of`.
        settings: see `InjectSettings`.
        writing: what a step may move, opened for these items; None: all of `parameters`, by Adam.
        checkpoint: file that is written every `save_steps` steps and at the end. When it exists,
            training goes on from it, with the same losses as an uninterrupted run.
        on_step: called after each step.

    Raises:
        ConfigError: there is nothing to train or nothing to learn.
        StateError: the loss is not finite, or no parameter received a gradient.
        CheckpointError: `checkpoint` is damaged or belongs to other settings.
    """
    if not parameters or not items:
        raise ConfigError(f"{len(parameters)} parameters and {len(items)} texts: nothing to train")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    rule = writing or ReadRows()
    dense = [p for name, p in parameters.items() if not name.endswith(ROWS)]
    optimizers = rule.optimizers(parameters, settings.learning_rate)
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = load_checkpoint(checkpoint, parameters, optimizers, settings)
    model.eval()
    moved, pass_over = 0, -(-len(items) // settings.batch_size)
    for step in range(start, settings.steps):
        given = batch(items, settings.seed, step, settings.batch_size)
        loss = lesson_loss(model, given)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise StateError(
                f"the loss of step {step + 1} is {value}; lower the learning rate, or train "
                "in float32"
            )
        if loss.requires_grad:  # not where every text of the batch abstains
            numbers = drawn(len(items), settings.seed, step, settings.batch_size)
            with rule.moving(model, numbers):
                loss.backward()
            moved += 1
        if not moved and step - start + 1 == min(pass_over, settings.steps - start):
            raise StateError(
                f"no parameter received a gradient in {step - start + 1} steps: none of the "
                f"{len(items)} texts reads a row that may change. Prepare the bank on texts like "
                "them, and open their rows."
            )
        factor = learning_rate_factor(step, settings.steps, settings.warmup_ratio)
        nn.utils.clip_grad_norm_([p for p in dense if p.grad is not None], settings.max_grad_norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad()
        if on_step is not None:
            tokens = int(given["attention_mask"].sum())
            on_step(InjectStep(step + 1, value, settings.learning_rate * factor, tokens))
        last = step + 1 == settings.steps
        if checkpoint is not None and (last or (step + 1) % settings.save_steps == 0):
            save_checkpoint(checkpoint, step + 1, parameters, optimizers, settings)
