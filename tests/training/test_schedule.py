"""What a step draws is a function of its number."""

from __future__ import annotations

import pytest

from memretrofit.errors import ConfigError
from memretrofit.training.schedule import DISTILL, TRANSFER, draw_window, learning_rate_factor


def test_windows_repeat_with_the_seed_and_the_step_alone():
    def drawn(seed, stage):
        return [draw_window((32, 60, 124), (0, 4), seed, stage, step) for step in range(60)]

    assert drawn(0, DISTILL) == drawn(0, DISTILL)
    assert drawn(0, DISTILL) != drawn(1, DISTILL)
    assert drawn(0, DISTILL) != drawn(0, TRANSFER)
    counts = [drawn(0, DISTILL).count((w, n)) for w in (32, 60, 124) for n in (0, 4)]
    assert min(counts) >= 3, "each of six pairs is expected ten times in sixty draws"


def test_nothing_to_draw_from():
    with pytest.raises(ConfigError, match="at least one"):
        draw_window((), (4,), 0, DISTILL, 0)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (1, 1.0), (2, 0.05), (40, 0.25)])
def test_the_learning_rate_rises_once_and_falls_and_is_never_zero(steps, warmup):
    factors = [learning_rate_factor(step, steps, warmup) for step in range(steps)]
    peak = factors.index(max(factors))
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_the_peak_is_reached_after_the_warm_up():
    assert learning_rate_factor(10, 40, 0.25) == 1.0
    assert learning_rate_factor(4, 40, 0.25) == 5 / 11
