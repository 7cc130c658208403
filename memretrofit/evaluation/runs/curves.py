"""What becomes of a score as texts grow: a table and a picture for each task of several lengths, of
a model that reads in segments.

Lengths are counted in tokens, and beside them in segments of the method and in multiples of the
longest text that the memory was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from memretrofit.errors import ConfigError
from memretrofit.evaluation.drawing import (
    INK,
    finish,
    label_ends,
    line_of,
    new_figure,
    short_name,
    short_tokens,
    ticks_at,
)
from memretrofit.evaluation.runs.saved import TaskRun
from memretrofit.evaluation.runs.tables import Table, score_of
from memretrofit.evaluation.scoring import SCORES
from memretrofit.evaluation.task import Score

CURVES: tuple[Score, ...] = ("rank", "strict")
"""Scores in [0, 1]."""

Line = Mapping[int, tuple[float, float, float]]
"""length -> mean, low and high."""


def curve_tables(run: TaskRun) -> list[Table]:
    """For each accuracy a table of tasks along their lengths, with every interval."""
    return [found for score in CURVES if (found := _table(run, score))]


def _table(run: TaskRun, score: Score) -> Table | None:
    segment, trained = run.settings.get("segment_length", 1), run.settings.get("trained_tokens")
    columns = ["task", "length", "segments"]
    columns += ["of trained length"] if trained else []
    columns += ["lost since trained length"] if trained else []
    rows = []
    for task, lengths in _tasks(run, score).items():
        lines = lines_of(run, task, lengths, score)
        start = _at_most(lines.get("trained", {}), trained)
        for length in lengths:
            row = [task, short_tokens(length), f"{-(-length // segment)}"]
            row += [f"{length / trained:.3g}"] if trained else []
            if trained:
                here = lines.get("trained", {}).get(length)
                if start is None or here is None or length <= trained:
                    row.append("–")
                else:
                    row.append(f"{start - here[0] + 0.0:+.2f}")
            row += [_cell(line.get(length)) for line in lines.values()]
            rows.append(row)
    if not rows:
        return None
    return Table(
        f"Along the length, by {score}",
        "Mean of an arm and its interval. Segments and multiples are those of the whole text, "
        "question and answer included.",
        [*columns, *map(short_name, run.shown)],
        rows,
    )


def _cell(value: tuple[float, float, float] | None) -> str:
    return "{:.2f} ({:.2f} to {:.2f})".format(*value) if value else "–"


def _at_most(line: Line, trained: int | None) -> float | None:
    """The mean at the longest length that was trained on; None where there is none."""
    lengths = [length for length in line if trained and length <= trained]
    return line[max(lengths)][0] if lengths else None


def draw_curves(run: TaskRun) -> dict[str, str]:
    """The pictures, in the folder of the run: file name -> what it shows."""
    pictures = {}
    for score in CURVES:
        for task, lengths in _tasks(run, score).items():
            chance = run.cells[task, lengths[0]]["chance"] if score == "rank" else None
            name = f"length_{task}_{score}.png"
            pictures[name] = f"{task}: {SCORES[score].label} against the length of the text"
            plot_by_length(
                lines_of(run, task, lengths, score),
                run.directory / name,
                label=SCORES[score].label,
                chance=chance,
                marks={
                    "one segment": run.settings.get("segment_length"),
                    "trained up to here": run.settings.get("trained_tokens"),
                },
                title=f"{task} against length",
            )
    return pictures


def _tasks(run: TaskRun, score: Score) -> dict[str, list[int]]:
    """The tasks with the score at two lengths or more, and these."""
    found: dict[str, list[int]] = {}
    for task, length in run.measured(score) if run.settings.get("segment_length") else ():
        found.setdefault(task, []).append(length)
    return {task: sorted(lengths) for task, lengths in found.items() if len(lengths) > 1}


def lines_of(run: TaskRun, task: str, lengths: Sequence[int], score: Score) -> dict[str, Line]:
    """Every arm that was run, at the lengths that it was measured at."""
    found: dict[str, Line] = {}
    for arm in run.shown:
        cells = {length: score_of(run, (task, length), arm, score) for length in lengths}
        found[arm] = {
            length: (cell["mean"], cell["low"], cell["high"])
            for length, cell in cells.items()
            if cell
        }
    return found


def plot_by_length(
    lines: Mapping[str, Line],
    path: str | Path,
    *,
    label: str,
    chance: float | None = None,
    marks: Mapping[str, int | None] | None = None,
    title: str = "",
) -> None:
    """A score in [0, 1] against tokens, one line for each arm; the interval of `trained` as a band.

    Args:
        lines: arm -> its values; an arm may lack lengths, and its line then ends before.
        path: where the PNG goes.
        label: what the score is.
        chance: of an answerer that cannot read, drawn as a line.
        marks: words -> tokens at which they stand, where the lengths reach them.
        title: above the picture.
    """
    lines = {arm: line for arm, line in lines.items() if line}
    if not lines:
        raise ConfigError("no scores by length to plot; pass at least one arm")
    figure, axes = new_figure(7.6, 4.4)
    lengths = sorted({length for line in lines.values() for length in line})
    for number, (arm, line) in enumerate(lines.items()):
        looks, places = line_of(arm, number), sorted(line)
        mean, low, high = zip(*(line[place] for place in places), strict=True)
        if arm == "trained":  # bands of all would hide each other
            axes.fill_between(places, low, high, color=looks.colour, alpha=0.12, linewidth=0)
        axes.plot(
            places,
            mean,
            color=looks.colour,
            linestyle=looks.style,
            linewidth=looks.width,
            marker="o",
            markersize=4,
        )
    ticks_at(axes, lengths)
    axes.set_ylim(-0.02, 1.02)
    if chance is not None:
        axes.axhline(chance, color=INK, linewidth=0.9, linestyle=(0, (2, 2)))
        axes.annotate(
            "chance",
            (1, chance),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 2),
            ha="right",
            textcoords="offset points",
            color=INK,
            fontsize=8,
        )
    seen = {
        words: at for words, at in (marks or {}).items() if at and lengths[0] <= at <= lengths[-1]
    }
    for number, (words, at) in enumerate(seen.items()):
        axes.axvline(at, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(
            words,
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, 4 + 11 * number),
            textcoords="offset points",
            color=INK,
            fontsize=8,
        )
    label_ends(axes, {arm: line[max(line)][0] for arm, line in lines.items()}, -0.02, 1.02)
    axes.set_xlabel("tokens read")
    axes.set_ylabel(label)
    finish(figure, axes, title or "Score against length", path, pad=10 + 11 * len(seen))
