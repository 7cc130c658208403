"""Teach a memory between segments to carry what is asked for later.

::

    stage i of a curriculum: S drawn from segments[0 .. i] for each step
    loss = mean over the tokens of the answers of -log p(token | what was carried, its segment)

The memory and, where there are adapters, LoRA have learning rates of their own. Everything random
is a function of (seed, step): a run goes on exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from memretrofit.errors import ConfigError, StateError
from memretrofit.training.checkpoints import load_checkpoint, save_checkpoint
from memretrofit.training.credit import Credit, SegmentedText, back_propagate
from memretrofit.training.schedule import RECURRENCE, learning_rate_factor
from memretrofit.training.trainable import GradientWatch, parameter_groups


class Batch(Protocol):
    """Texts of equal length."""

    @property
    def ids(self) -> Tensor:
        """[B, T]"""
        ...

    @property
    def labels(self) -> Tensor:
        """[B, T] as `ids` where a token is learned, else `IGNORED`."""
        ...


class Texts(Protocol):
    """Where texts of any number of segments come from."""

    def batch(self, segments: int, size: int, key: str, *, held_out: bool = False) -> Batch:
        """`size` texts, a function of these arguments; of what is trained on, or never is."""
        ...

    def tokens(self, segments: int) -> float:
        """Of one text, in the mean."""
        ...


@dataclass(frozen=True, kw_only=True)
class RecurrenceSettings:
    """How long, on how many segments, and how fast."""

    steps: int = 600
    batch_size: int = 8
    learning_rate: float = 1e-3
    """Of the memory, with AdamW at its peak; see `learning_rate_factor` for the rest."""
    lora_learning_rate: float = 3e-4
    segments: tuple[int, ...] = (1, 2)
    """Of the curriculum's stages."""
    shares: tuple[float, ...] = ()
    """Of the steps, by stage; empty: all alike."""
    credit: Credit = "full"
    credit_segments: int = 1
    """How far `truncated` reaches."""
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    save_steps: int = 50
    """Steps between checkpoints, and between looks at texts that are not trained on."""
    held_out_texts: int = 32
    """In one look."""
    fingerprint: str = ""
    """Of what is read; a checkpoint of another one is refused."""

    def segments_at(self, step: int) -> int:
        """S of a step that counts from 0."""
        random = np.random.default_rng((self.seed, RECURRENCE, step))
        known = self.segments[: self.stage_at(step) + 1]
        return known[int(random.integers(len(known)))]

    def stage_at(self, step: int) -> int:
        """The curriculum's stage, from 0."""
        shares = self.shares or (1.0,) * len(self.segments)
        ends = np.cumsum(shares) / sum(shares) * self.steps
        return min(int(np.searchsorted(ends, step, side="right")), len(self.segments) - 1)


class RecurrenceStep(NamedTuple):
    """What one step measured, on the texts that it then learned from."""

    step: int
    """Counts from 1."""
    loss: float
    learning_rate: float
    """Of the memory."""
    segments: int
    right: float
    """Share of texts whose answer was the most likely one, of all tokens."""
    grad_norm: float
    held_out: dict[int, float] | None
    """By segments: the same of texts that are not trained on; None between looks."""


def train_recurrence(
    model: Any,
    promised: Mapping[str, nn.Parameter],
    texts: Texts,
    settings: RecurrenceSettings,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[RecurrenceStep], None] | None = None,
) -> None:
    """Train what was promised on texts of several segments.

    Args:
        model: from `trainable_parameters`; trained on the device it is on, in eval mode (no
            dropout).
        promised: the same; those with `.lora_` in their names are the adapters'.
        texts: see `Texts`.
        settings: see `RecurrenceSettings`.
        checkpoint: file that is written every `save_steps` steps and at the end. When it exists,
            training goes on from it, with the same losses as an uninterrupted run.
        on_step: called after each step.

    Raises:
        ConfigError: there is nothing to train.
        StateError: the loss is not finite, or a promised parameter received no gradient in texts
            of the most segments.
        CheckpointError: `checkpoint` is damaged or belongs to other settings.
    """
    if not promised:
        raise ConfigError("no parameters were promised, so there is nothing to train")
    optimizer = _optimizer(promised, settings)
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = load_checkpoint(checkpoint, promised, [optimizer], settings)
    # what chooses among memories learns only where there are several
    watch, most = GradientWatch(promised), max(settings.segments)
    model.eval()
    for step in range(start, settings.steps):
        segments = settings.segments_at(step)
        given = texts.batch(segments, settings.batch_size, f"{settings.seed}/{step}")
        text = SegmentedText(model, given.ids.to(model.device), given.labels.to(model.device))
        back_propagate(text, settings.credit, settings.credit_segments)
        if not math.isfinite(text.loss):
            raise StateError(
                f"the loss of step {step + 1} is {text.loss}; lower the learning rates, or train "
                "in float32"
            )
        watch.observe(folded=segments == most)
        learning = [p for p in promised.values() if p.grad is not None]
        norm = float(nn.utils.clip_grad_norm_(learning, settings.max_grad_norm))
        if not math.isfinite(norm):  # no step with it, and no checkpoint of what it would leave
            raise StateError(
                f"the gradient of step {step + 1} has norm {norm}; lower the learning rates, or "
                "train in float32"
            )
        factor = learning_rate_factor(step, settings.steps, settings.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()
        optimizer.zero_grad()
        last = step + 1 == settings.steps
        due = last or (step + 1) % settings.save_steps == 0
        if on_step is not None:
            on_step(
                RecurrenceStep(
                    step + 1,
                    text.loss,
                    settings.learning_rate * factor,
                    segments,
                    float((~text.wrong).float().mean()),
                    norm,
                    _look(model, texts, settings, step) if due else None,
                )
            )
        if checkpoint is not None and due:
            save_checkpoint(checkpoint, step + 1, promised, [optimizer], settings)
    if watch.seen:
        watch.finish()


def _optimizer(
    promised: Mapping[str, nn.Parameter], settings: RecurrenceSettings
) -> torch.optim.Optimizer:
    adapters = [p for name, p in promised.items() if ".lora_" in name]
    memory = [p for name, p in promised.items() if ".lora_" not in name]
    groups = []
    for parameters, peak in (
        (memory, settings.learning_rate),
        (adapters, settings.lora_learning_rate),
    ):
        split = parameter_groups(parameters, settings.weight_decay)
        groups += [{**group, "lr": peak, "peak": peak} for group in split]
    return torch.optim.AdamW(groups)


def _look(model: Any, texts: Texts, settings: RecurrenceSettings, step: int) -> dict[int, float]:
    """Share of right answers to what is not trained on, by segments of the curriculum so far."""
    found, count = {}, settings.held_out_texts
    for segments in settings.segments[: settings.stage_at(step) + 1]:
        right = 0
        for begin in range(0, count, settings.batch_size):
            size = min(settings.batch_size, count - begin)
            given = texts.batch(segments, size, f"look/{segments}/{begin}", held_out=True)
            text = SegmentedText(model, given.ids.to(model.device), given.labels.to(model.device))
            text.measure()
            right += int((~text.wrong).sum())
        found[segments] = right / count
    return found
