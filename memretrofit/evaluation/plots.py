"""Three pictures: likelihood along the text, cache against length, loss along the run."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv1d

from memretrofit.errors import ConfigError
from memretrofit.evaluation.drawing import (
    INK,
    MORE_COLOURS,
    finish,
    label_ends,
    line_of,
    lines_by_length,
    name_of,
    new_figure,
    short_bytes,
)
from memretrofit.evaluation.likelihood import Scores


def plot_nll_by_position(
    scores: Mapping[str, Scores], path: str | Path, window: int, *, title: str = ""
) -> None:
    """Mean negative log-likelihood at each position, one smoothed line per arm.

    Args:
        scores: arm -> scores of the same rows; names of `ARMS` get their usual colour.
        path: where the PNG goes.
        window: first position that lacks something (`exact_tokens`); marked in the picture.
        title: above the picture.
    """
    if not scores:
        raise ConfigError("no scores to plot; pass at least one arm")
    means = {name: arm.nll.double().nanmean(0) for name, arm in scores.items()}
    length = next(iter(means.values())).shape[0]
    # Wide enough to calm the noise of a few dozen rows, narrow enough to show the window's edge.
    width = max(1, length // 32)
    # Not across the edge: inside the window the arms are equal, and must look it.
    lines = {
        name: torch.cat([_smooth(mean[:window], width), _smooth(mean[window:], width)])
        for name, mean in means.items()
    }

    figure, axes = new_figure(8.0, 4.4)
    axes.axvline(window, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
    for number, (name, values) in enumerate(lines.items()):
        line = line_of(name, number)
        axes.plot(values.numpy(), color=line.colour, linestyle=line.style, linewidth=line.width)
    settled = torch.cat([values[min(window // 2, length - 1) :] for values in lines.values()])
    low, high = float(settled.min()), float(settled.max())
    margin = 0.12 * max(high - low, 1e-3)
    axes.set_ylim(low - margin, high + 2 * margin)
    axes.set_xlim(0, length - 1)
    axes.annotate(
        f"exact up to position {window}",
        (window, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -5),
        textcoords="offset points",
        va="top",
        color=INK,
        fontsize=8.5,
    )
    ends = {name: float(values[-width:].mean()) for name, values in lines.items()}
    label_ends(axes, ends, low - margin, high + 2 * margin)
    axes.set_xlabel("position in the text (tokens)")
    axes.set_ylabel("negative log-likelihood (nats per token)")
    finish(figure, axes, title or "Likelihood along the text", path)


def plot_cache_bytes(
    lengths: Sequence[int], arms: Mapping[str, Sequence[int]], path: str | Path, *, title: str = ""
) -> None:
    """Bytes of the cache against tokens read, both logarithmic, one line per arm.

    Args:
        lengths: tokens read.                                                          [L]
        arms: arm -> bytes at each length; names of `ARMS` get their usual colour.     [L] each
        path: where the PNG goes.
        title: above the picture.
    """
    if not arms or any(len(values) != len(lengths) for values in arms.values()) or not lengths:
        found = {name: len(values) for name, values in arms.items()}
        raise ConfigError(f"{len(lengths)} lengths but byte counts {found}; give one per length")
    if min(lengths) < 1 or min(min(values) for values in arms.values()) < 1:
        raise ConfigError("lengths and bytes must be at least 1 to be drawn on logarithmic axes")
    figure, axes = new_figure(7.0, 4.2)
    axes.set_yscale("log", base=2)
    from matplotlib.ticker import FuncFormatter, NullLocator

    lines_by_length(axes, lengths, arms)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_bytes(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    ends = {name: math.log2(values[-1]) for name, values in arms.items()}
    text = {name: f"{name_of(name)}, {short_bytes(values[-1])}" for name, values in arms.items()}
    label_ends(axes, ends, math.log2(low), math.log2(high), text=text)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("cache")
    finish(figure, axes, title or "Cache against length", path)


def plot_loss(log: str | Path, path: str | Path, *, title: str = "") -> None:
    """Loss of a run from its JSONL log: records faint, a running mean on top, a line per stage.

    A record is drawn when it holds `step` and `loss`; `stage`, where present, names the line. A
    last line that a kill left incomplete is passed over.

    Raises:
        ConfigError: the log is missing or damaged, or holds no loss.
    """
    stages: dict[str, tuple[list[float], list[float]]] = {}
    for record in _records(Path(log)):
        if isinstance(record.get("loss"), (int, float)) and isinstance(record.get("step"), int):
            steps, losses = stages.setdefault(str(record.get("stage", "loss")), ([], []))
            steps.append(record["step"])
            losses.append(float(record["loss"]))
    if not stages:
        raise ConfigError(f'{log} holds no record with "step" and "loss"; is it a training log?')
    figure, axes = new_figure(7.0, 4.0)
    for number, (name, (steps, losses)) in enumerate(stages.items()):
        colour = MORE_COLOURS[number % len(MORE_COLOURS)]
        width = max(1, len(losses) // 20)
        smooth = _smooth(torch.tensor(losses, dtype=torch.float64), width)
        axes.plot(steps, losses, color=colour, linewidth=0.8, alpha=0.3)
        axes.plot(steps, smooth.numpy(), color=colour, linewidth=2.0)
        if len(stages) > 1:
            if number:
                axes.axvline(steps[0], color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
            axes.annotate(
                name.replace("_", " "),
                (steps[0], 1 - 0.06 * number),
                xycoords=("data", "axes fraction"),
                xytext=(5, -2),
                textcoords="offset points",
                va="top",
                color=colour,
                fontsize=9,
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_xlim(left=min(min(steps) for steps, _ in stages.values()))
    finish(figure, axes, title or "Training loss", path)


def _records(log: Path) -> list[dict[str, Any]]:
    if not log.is_file():
        raise ConfigError(f"training log {log} does not exist")
    lines = [line for line in log.read_text(encoding="utf-8").split("\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise ConfigError(f"{log}, record {number}: not JSON ({error.msg})") from None
        if isinstance(record, dict):
            records.append(record)
    return records


def _smooth(values: Tensor, width: int) -> Tensor:
    """Centred mean with triangular weights over `2 * width - 1` values; fewer at the ends."""
    if width < 2 or not len(values):
        return values
    ramp = torch.arange(1, width + 1, dtype=values.dtype)
    weights = torch.cat([ramp, ramp[:-1].flip(0)])[None, None]
    total = conv1d(values[None, None], weights, padding=width - 1)
    return (total / conv1d(torch.ones_like(values)[None, None], weights, padding=width - 1))[0, 0]
