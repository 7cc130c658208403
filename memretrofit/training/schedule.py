"""What a step draws, as a pure function of its number: a resumed run goes on exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from memretrofit.errors import ConfigError

TRANSFER, DISTILL, RECURRENCE = 0, 1, 2
"""Independent random streams of one seed."""


class Draw(NamedTuple):
    """The window and the sinks of one step."""

    sliding_window: int
    num_sink_tokens: int

    @property
    def exact(self) -> int:
        """First position from which something has left the window: W + N."""
        return self.sliding_window + self.num_sink_tokens


def draw_window(
    windows: Sequence[int], sinks: Sequence[int], seed: int, stage: int, step: int
) -> Draw:
    """A window and a number of sinks, drawn uniformly; alike in all processes and after a resume.

    A memory trained at one window works at that window only (arXiv:2510.07318, table 5).

    Raises:
        ConfigError: a list is empty.
    """
    if not windows or not sinks:
        raise ConfigError(f"windows={windows!r}, sinks={sinks!r}: each needs at least one value")
    random = np.random.default_rng((seed, stage, step))
    return Draw(
        windows[int(random.integers(len(windows)))], sinks[int(random.integers(len(sinks)))]
    )


def learning_rate_factor(step: int, steps: int, warmup_ratio: float) -> float:
    """Linear warm-up over a share of the steps, then half a cosine to zero.

    ::

        f(s) = (s + 1) / (w + 1)                               s < w = ceil(warmup_ratio * steps)
        f(s) = (1 + cos(pi (s - w) / (steps - w))) / 2         else

    Never zero while there are steps left: a first step that changes nothing would be wasted.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
