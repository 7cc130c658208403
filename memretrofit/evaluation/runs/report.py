"""The report of a task run: one Markdown file, its values as JSON, and pictures.

Everything in it is computed from the files of the run; the same files give the same report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memretrofit.evaluation.drawing import name_of, short_name, short_tokens
from memretrofit.evaluation.runs.curves import curve_tables, draw_curves
from memretrofit.evaluation.runs.gains import (
    FEWEST,
    cell_gain,
    headline,
    headline_note,
    is_claimed,
    left_out_note,
)
from memretrofit.evaluation.runs.item_log import SCHEMA_VERSION
from memretrofit.evaluation.runs.plots import (
    GainRow,
    plot_arms,
    plot_depths,
    plot_gains,
    plot_nll_by_length,
)
from memretrofit.evaluation.runs.saved import TaskRun, flat, read_run
from memretrofit.evaluation.runs.tables import arms_table, gains_tables, score_of, scores_table
from memretrofit.evaluation.scoring import SCORES
from memretrofit.evaluation.task import Score
from memretrofit.files import write_json, write_text
from memretrofit.markdown import code, escape, paragraphs

ACCURACIES: tuple[Score, ...] = ("rank", "strict")


def write_report(directory: str | Path) -> Path:
    """Write `report.md`, `report.json` and pictures beside the files of a run.

    Returns:
        The path of `report.md`.

    Raises:
        ConfigError: the folder is not that of a finished run, or matplotlib is missing.
        CheckpointError: a file is damaged.
    """
    run = read_run(directory)
    tables = [
        arms_table(run),
        *(scores_table(run, score) for score in SCORES if run.measured(score)),
        *curve_tables(run),
        *gains_tables(run),
    ]
    found = _notes(run)
    pictures = _draw(run)
    write_json(
        run.directory / "report.json",
        {
            "schema_version": SCHEMA_VERSION,
            "settings": dict(flat(run.settings)),
            "notes": found,
            "tables": [entry._asdict() for entry in tables],
            "pictures": list(pictures),
            "by_depth": _depth_values(run),
            "cells": list(run.cells.values()),
            "cost": dict(run.cost),
        },
    )
    parts = [
        f"# Tasks: `{code(run.settings.get('model'))}`",
        "\n".join(f"- {escape(note)}" for note in found),
        tables[0].render(),
        *(f"![{escape(words)}]({name})" for name, words in pictures.items()),
        *(entry.render() for entry in tables[1:]),
        "## What was run",
        "\n".join(f"- {escape(key)}: `{code(value)}`" for key, value in flat(run.settings)),
    ]
    return write_text(run.directory / "report.md", paragraphs(parts))


def _notes(run: TaskRun) -> list[str]:
    """What a reader has to know, computed from the run."""
    cells = list(run.cells.values())
    counts = sorted({cell["items"] for cell in cells})
    items = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    found = [
        f"{len(cells)} cells (a task at a length) of {items} items; intervals of "
        f"{100 * run.summary['level']:g} %: Wilson's of accuracies, of the paired bootstrap else.",
        *_gain_notes(run),
    ]
    few = [cell for cell in cells if cell["groups"] < FEWEST]
    if few:
        found.append(
            f"{len(few)} cells rest on fewer than {FEWEST} items that share no text: no difference "
            "there has an asterisk, and none of them is counted as above chance. Ask for more "
            "--items."
        )
    widest = [
        max(interval["high"] - interval["mean"], interval["mean"] - interval["low"])
        for cell in cells
        for scores in cell["scores"].values()
        for score, interval in scores.items()
        if score in ACCURACIES
    ]
    if widest:
        found.append(
            f"The widest interval of a cell's accuracy reaches {max(widest):.2f} from its mean; "
            "those of every cell are in report.json."
        )
    alike: dict[str, list[str]] = {}
    for arm, other in run.same_as.items():
        alike.setdefault(other, []).append(arm)
    for other, arms in alike.items():
        listed = " and ".join(f"{arm} ({name_of(arm)})" for arm in arms)
        found.append(
            f"{listed}: by construction the same computation as {other} ({name_of(other)}); "
            "run once and shown once."
        )
    for arm in run.shown:
        beyond = {length for (_, length), cell in run.cells.items() if arm not in cell["scores"]}
        if beyond:
            listed = ", ".join(map(short_tokens, sorted(beyond)))
            found.append(
                f"{short_name(arm)} was not measured at {listed} tokens, which are beyond the "
                "positions of the model; its means are over the other cells, and its cost is that "
                "of its longest."
            )
    return found


def _gain_notes(run: TaskRun) -> list[str]:
    """The memory gain of the run, and what it does not rest on."""
    found = [headline_note(run, line) for score in SCORES if (line := headline(run, score))]
    if found and (left_out := left_out_note(run)):
        found.append(left_out)
    if run.settings.get("memory") == "untrained":
        found.append(
            "The memory was never trained: it holds the values of a fresh patch, also in the arms "
            "that are called trained."
        )
    return found


def _draw(run: TaskRun) -> dict[str, str]:
    """The pictures of a run: file name -> what it shows."""
    pictures: dict[str, str] = {}
    scores: dict[Score, dict[str, dict[str, float]]] = {
        score: {
            arm: {
                f"{place[0]} {place[1]}": found["mean"]
                for place in run.measured(score)
                if (found := score_of(run, place, arm, score))
            }
            for arm in run.shown
        }
        for score in ACCURACIES
        if run.measured(score)
    }
    ranked = [run.cells[place]["chance"] for place in run.measured("rank")]
    if scores:
        pictures["arms.png"] = "Score of each arm: the mean over cells, and a dot for each cell"
        plot_arms(
            scores,
            run.directory / "arms.png",
            chance={"rank": sum(ranked) / len(ranked)} if ranked else None,
            title="Score of each arm (a dot for each task and length)",
        )
    gains: dict[Score, list[GainRow]] = {
        score: [
            GainRow(
                f"{place[0]} · {short_tokens(place[1])}",
                gain,
                is_claimed(gain, run.cells[place]["groups"]),
            )
            for place in run.measured(score)
            if (gain := cell_gain(run, place, ("trained", "shuffled"), score))
        ]
        for score in SCORES
    }
    if any(gains.values()):
        pictures["gain.png"] = "Memory gain of each cell with its interval"
        plot_gains(
            gains,
            run.directory / "gain.png",
            title="Memory gain: own state against another row's (grey: nothing is claimed)",
        )
    pictures |= draw_curves(run)
    pictures |= _draw_depths(run)
    for task in dict.fromkeys(task for task, _ in run.measured("nll")):
        lengths = sorted(length for name, length in run.measured("nll") if name == task)
        arms = {
            arm: [
                found["mean"]
                for length in lengths
                if (found := score_of(run, (task, length), arm, "nll"))
            ]
            for arm in run.shown
        }
        name = f"nll_{task}.png"
        pictures[name] = f"Negative log-likelihood of {task} against the length of the context"
        complete = {arm: values for arm, values in arms.items() if len(values) == len(lengths)}
        plot_nll_by_length(
            lengths, complete, run.directory / name, title=f"{task}: likelihood against context"
        )
    return pictures


def _draw_depths(run: TaskRun) -> dict[str, str]:
    pictures = {}
    for score in ACCURACIES:
        found = run.by_depth(score)
        for family, tasks in _families([task for task, _ in run.cells]).items():
            grids = {
                (task, arm): {
                    place: sum(values) / len(values) for place, values in found[task, arm].items()
                }
                for task in tasks
                for arm in run.shown
                if (task, arm) in found
            }
            if grids:
                chance = {
                    task: run.cells[task, length]["chance"] for task, length in run.measured("rank")
                }
                name = f"depth_{family}_{score}.png"
                pictures[name] = f"{family}: {score} by length and depth"
                plot_depths(
                    grids,
                    run.directory / name,
                    score=score,
                    chance=chance if score == "rank" else None,
                    title=f"{family}: accuracy by length and depth",
                )
    return pictures


def _depth_values(run: TaskRun) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "arm": arm,
            "score": score,
            "length": length,
            "depth": depth,
            "mean": sum(values) / len(values),
            "items": len(values),
        }
        for score in SCORES
        for (task, arm), grid in run.by_depth(score).items()
        for (length, depth), values in sorted(grid.items())
    ]


def _families(tasks: Sequence[str]) -> dict[str, list[str]]:
    """Tasks whose names begin with the same word, under that word; a lone one under its name."""
    names = list(dict.fromkeys(tasks))
    heads = [name.split("_")[0] for name in names]
    found: dict[str, list[str]] = {}
    for name, head in zip(names, heads, strict=True):
        found.setdefault(head if heads.count(head) > 1 else name, []).append(name)
    return found
