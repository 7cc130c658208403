"""The house style of pictures: colours and names of the arms, quiet axes, labels at line ends.

matplotlib is an extra (`pip install 'memretrofit[eval]'`) and is imported when a picture is made.
Figures are built without pyplot, so nothing global changes: not the backend, not the style.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from memretrofit.errors import ConfigError
from memretrofit.evaluation.arm_table import ARM_TABLE, Line

MORE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, FAINT = "#333333", "#BBBBBB"


def line_of(name: str, number: int) -> Line:
    """The line of an arm; of another name, one by its number."""
    arm = ARM_TABLE.get(name)
    return arm.line if arm else Line(MORE_COLOURS[number % len(MORE_COLOURS)], "-", 1.8)


def name_of(name: str) -> str:
    """What an arm is, in words."""
    arm = ARM_TABLE.get(name)
    return arm.words if arm else name.replace("_", " ")


def short_name(name: str) -> str:
    """An arm's name for the head of a column."""
    return name.upper() if name in ("bm25", "oprm") else name.replace("_", " ")


def short_tokens(value: float) -> str:
    """512, 1k, 1.5k; in full where an eighth of a thousand would not do."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 128 == 0 else f"{value:g}"


def short_bytes(value: float) -> str:
    """Three digits and a binary unit."""
    power = min(3, max(0, math.frexp(value)[1] - 1) // 10)
    scaled = value / 1024**power
    return f"{scaled:.{4 if scaled >= 1000 else 3}g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def empty_figure(width: float, height: float) -> Any:
    """A figure with an Agg canvas of its own; sizes in inches.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plots need matplotlib, which is not installed; run: pip install 'memretrofit[eval]'"
        ) from None
    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    return figure


def quiet(axes: Any, *, grid: str = "y") -> Any:
    """The same axes with two faint spines and a faint grid along one direction."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, length=3, labelsize=9)
    axes.grid(axis=grid, color=FAINT, linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    return axes


def new_figure(width: float, height: float) -> tuple[Any, Any]:
    """A figure and its one quiet axes."""
    figure = empty_figure(width, height)
    return figure, quiet(figure.add_subplot())


def finish(figure: Any, axes: Any, title: str, path: str | Path, *, pad: float = 10) -> None:
    """Title the one axes of a figure, `pad` points above it, and write the PNG."""
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=pad)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    save(figure, path)


def save(figure: Any, path: str | Path) -> None:
    """Write the PNG: the same numbers give the same bytes, with no version or date in the file."""
    figure.savefig(
        path, format="png", bbox_inches="tight", facecolor="white", metadata={"Software": None}
    )


def lines_by_length(axes: Any, lengths: Sequence[int], arms: Mapping[str, Sequence[float]]) -> None:
    """A line for each arm over lengths, on a logarithmic axis with a tick at each of them alone."""
    for number, (name, values) in enumerate(arms.items()):
        line = line_of(name, number)
        axes.plot(
            lengths,
            values,
            color=line.colour,
            linestyle=line.style,
            linewidth=line.width,
            marker="o",
            markersize=4,
        )
    ticks_at(axes, lengths)


def ticks_at(axes: Any, lengths: Sequence[int]) -> None:
    """A logarithmic axis of tokens with a tick at each length alone."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_xlim(min(lengths) / 1.15, max(lengths) * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_tokens(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def label_ends(
    axes: Any,
    ends: Mapping[str, float],
    low: float,
    high: float,
    *,
    text: Mapping[str, str] | None = None,
) -> None:
    """Name each line at its right end, moved up or down as little as keeps the names apart."""
    gap = 0.058
    order = sorted(ends, key=lambda name: ends[name])
    wanted = [(ends[name] - low) / (high - low) for name in order]
    placed = spread(wanted, gap)
    for number, name in enumerate(ends):
        place = order.index(name)
        colour = line_of(name, number).colour
        axes.plot(
            [1.0, 1.025],
            [wanted[place], placed[place]],
            transform=axes.transAxes,
            color=colour,
            linewidth=0.7,
            alpha=0.6,
            clip_on=False,
        )
        axes.text(
            1.032,
            placed[place],
            text[name] if text else name_of(name),
            transform=axes.transAxes,
            va="center",
            color=colour if name != "untrained" else "#777777",
            fontsize=9,
            fontweight="bold" if name == "trained" else "normal",
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places at least `gap` apart, each group centred on where it wanted to be."""
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _edge(groups[-1], gap, -1) - _edge(groups[-2], gap, 1) < gap:
            groups[-2].extend(groups.pop())
    found: list[float] = []
    for group in groups:
        first = _edge(group, gap, -1)
        found.extend(first + gap * number for number in range(len(group)))
    return found


def _edge(group: Sequence[float], gap: float, side: int) -> float:
    return sum(group) / len(group) + side * gap * (len(group) - 1) / 2
