"""Several task runs side by side, on the items that they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memretrofit.errors import ConfigError
from memretrofit.evaluation.arm_table import ARM_TABLE
from memretrofit.evaluation.drawing import name_of, short_name, short_tokens
from memretrofit.evaluation.runs.curves import CURVES, lines_of, plot_by_length
from memretrofit.evaluation.runs.gains import gain, signed
from memretrofit.evaluation.runs.item_log import ITEMS, RUN, SCHEMA_VERSION
from memretrofit.evaluation.runs.plots import plot_arms
from memretrofit.evaluation.runs.saved import Place, TaskRun, flat, read_run, run_names
from memretrofit.evaluation.runs.tables import ASTERISK, Table, arms_table, presence_note
from memretrofit.evaluation.scoring import SCORES
from memretrofit.evaluation.task import Score
from memretrofit.files import write_json, write_text
from memretrofit.markdown import escape, paragraphs


@dataclass(frozen=True)
class Column:
    """An arm of one run, or of all runs where it answered every item alike."""

    title: str
    run: TaskRun
    arm: str
    common: bool = False
    """Whether it stands for all runs."""

    @property
    def label(self) -> str:
        """Its name in a picture."""
        return name_of(self.arm) if self.common else self.title


def write_comparison(directories: Sequence[str | Path], output: str | Path) -> Path:
    """Write `comparison.md`, `comparison.json` and a picture of several runs into `output`.

    A task at a length is compared where all runs have it with the same prompts.

    Returns:
        The path of `comparison.md`.

    Raises:
        ConfigError: fewer than two runs, no shared items, a folder that is not a finished run's, or
            an output that is the folder of one of the runs.
        CheckpointError: a file is damaged.
    """
    if len(directories) < 2:
        raise ConfigError(f"{len(directories)} runs to compare; name at least two folders")
    runs = dict(
        zip(
            run_names([Path(directory) for directory in directories]),
            [read_run(directory) for directory in directories],
            strict=True,
        )
    )
    places, left_out = _shared_places(runs)
    columns = _columns(runs, places)
    tables = [
        _settings_table(runs),
        *(
            _scores_table(columns, places, score)
            for score in SCORES
            if _measured(runs, places, score)
        ),
        *(
            found
            for score in SCORES
            for arms in (("trained", "shuffled"), ("trained", "trained"))
            if (found := _differences(runs, places, score, *arms))
        ),
        *(
            entry._replace(title=f"{name}: {entry.title[0].lower()}{entry.title[1:]}")
            for name, run in runs.items()
            for entry in [arms_table(run)]
        ),
    ]
    output = Path(output)
    if any((output / name).exists() for name in (RUN, ITEMS)):
        raise ConfigError(f"{output} is the folder of a run; name another one for the comparison")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output} cannot be made: {error.strerror}; name another") from None
    scores: dict[Score, dict[str, dict[str, float]]] = {
        score: {
            column.label: {
                f"{place[0]} {place[1]}": _mean(column.run.values(place, column.arm, score))
                for place in places
                if column.run.values(place, column.arm, score)
            }
            for column in columns
        }
        for score in ("rank", "strict")
        if _measured(runs, places, score)
    }
    if scores:
        ranked = [
            next(iter(runs.values())).cells[p]["chance"] for p in _measured(runs, places, "rank")
        ]
        plot_arms(
            scores,
            output / "arms.png",
            chance={"rank": sum(ranked) / len(ranked)} if ranked else None,
            arm_of={column.label: column.arm for column in columns},
            title="Score of each arm on the shared items (a dot for each task and length)",
        )
    pictures = _draw_curves(runs, columns, places, output)
    write_json(
        output / "comparison.json",
        {
            "schema_version": SCHEMA_VERSION,
            "runs": {name: dict(flat(run.settings)) for name, run in runs.items()},
            "cells": [list(place) for place in places],
            "left_out": left_out,
            "tables": [entry._asdict() for entry in tables],
        },
    )
    parts = [
        f"# {escape(' · '.join(runs))}",
        f"{len(places)} cells (a task at a length) that all runs have with the same prompts.",
        "\n".join(f"- left out: {escape(line)}" for line in left_out),
        "![Score of each arm](arms.png)" if scores else "",
        *(f"![{escape(words)}]({name})" for name, words in pictures.items()),
        *(entry.render() for entry in tables),
    ]
    return write_text(output / "comparison.md", paragraphs(parts))


def _shared_places(runs: dict[str, TaskRun]) -> tuple[list[Place], list[str]]:
    """Cells whose prompts are equal in all runs, and a line on each of the others.

    Raises:
        ConfigError: there is none.
    """
    every = list(dict.fromkeys(place for run in runs.values() for place in run.cells))
    shared, left_out = [], []
    for place in every:
        label = f"{place[0]} at {short_tokens(place[1])}"
        having = [name for name, run in runs.items() if place in run.cells]
        if len(having) < len(runs):
            left_out.append(f"{label}: only in {', '.join(having)}")
        elif len({run.hashes[place] for run in runs.values()}) > 1:
            left_out.append(f"{label}: the prompts differ")
        else:
            shared.append(place)
    if not shared:
        raise ConfigError.listing(
            f"{', '.join(runs)} share no items (same --tasks, --lengths, --items, --seed and "
            "--prose, and a tokenizer that counts alike, give the same items)",
            left_out,
        )
    return shared, left_out


def _draw_curves(
    runs: dict[str, TaskRun], columns: Sequence[Column], places: Sequence[Place], output: Path
) -> dict[str, str]:
    """Scores along the shared lengths where a model reads in segments: file name -> what it is."""
    first, pictures = next(iter(runs.values())), {}
    wanted = any(run.settings.get("segment_length") for run in runs.values())
    for score in CURVES if wanted else ():
        shared = _measured(runs, places, score)
        for task in dict.fromkeys(task for task, _ in shared):
            lengths = [length for name, length in shared if name == task]
            if len(lengths) < 2:
                continue
            name = f"length_{task}_{score}.png"
            pictures[name] = f"{task}: {SCORES[score].label} against the length of the text"
            plot_by_length(
                {x.label: lines_of(x.run, task, lengths, score)[x.arm] for x in columns},
                output / name,
                label=SCORES[score].label,
                chance=first.cells[task, lengths[0]]["chance"] if score == "rank" else None,
                title=f"{task} against length",
            )
    return pictures


def _columns(runs: dict[str, TaskRun], places: Sequence[Place]) -> list[Column]:
    every = {arm for run in runs.values() for arm in run.shown}
    found = []
    for arm in [name for name in ARM_TABLE if name in every and not ARM_TABLE[name].is_control]:
        having = {name: run for name, run in runs.items() if arm in run.arms}
        answers = [
            [run.values(place, arm, score) for place in places for score in SCORES]
            for run in having.values()
        ]
        first = next(iter(having.values()))
        if len(having) == len(runs) and all(other == answers[0] for other in answers):
            found.append(Column(short_name(arm), first, arm, common=True))
        else:
            found += [
                Column(f"{short_name(arm)}, {name}", run, arm) for name, run in having.items()
            ]
    return found


def _measured(runs: dict[str, TaskRun], places: Sequence[Place], score: Score) -> list[Place]:
    have = [set(run.measured(score)) for run in runs.values()]
    return [place for place in places if all(place in found for found in have)]


def _scores_table(columns: Sequence[Column], places: Sequence[Place], score: Score) -> Table:
    digits = 3 if score == "nll" else 2
    rows = []
    for place in places:
        values = [column.run.values(place, column.arm, score) for column in columns]
        if any(values):
            chance = [f"{columns[0].run.cells[place]['chance']:.2f}"] if score == "rank" else []
            means = [f"{_mean(found):.{digits}f}" if found else "–" for found in values]
            rows.append([place[0], short_tokens(place[1]), *chance, *means])
    head = ["task", "length", *(["chance"] if score == "rank" else [])]
    shared = any(column.common for column in columns)
    texts = ["An arm without the name of a run answered every item alike in all runs."] * shared
    if score == "rank":
        seen = {task for column in columns for task in column.run.settings["rank_by_presence"]}
        tasks = dict.fromkeys(task for task, _ in places)
        texts.append(presence_note([task for task in tasks if task in seen]))
    return Table(
        SCORES[score].title,
        " ".join(text for text in texts if text),
        [*head, *(column.title for column in columns)],
        rows,
    )


def _differences(
    runs: dict[str, TaskRun], places: Sequence[Place], score: Score, arm: str, other: str
) -> Table | None:
    """Memory gain of each run; or, of one arm twice, each run against the first."""
    own = arm != other
    first = next(iter(runs.values()))
    compared = list(runs.items()) if own else list(runs.items())[1:]
    rows = []
    for place in _measured(runs, places, score):
        row: list[str] = []
        for _, run in compared:
            a = run.values(place, arm, score)
            b = (run if own else first).values(place, other, score)
            groups = run.groups[place]
            found = gain(a, b, score, groups)
            row.append(signed(found, len(set(groups))) if found else "–")
        rows.append([place[0], short_tokens(place[1]), *row])
    if all(cell == "–" for row in rows for cell in row[2:]):
        return None
    title = "Memory gain" if own else f"Trained memory against that of {next(iter(runs))}"
    text = f"Paired over items; above zero is better. {ASTERISK}"
    return Table(
        f"{title}, by {score}", text, ["task", "length", *(name for name, _ in compared)], rows
    )


def _settings_table(runs: dict[str, TaskRun]) -> Table:
    """The settings in which the runs differ."""
    values = [dict(flat(run.settings)) for run in runs.values()]
    keys = dict.fromkeys(key for found in values for key in found)
    rows: list[list[Any]] = [
        [key, *(found.get(key, "–") for found in values)]
        for key in keys
        if len({found.get(key) for found in values}) > 1
    ]
    text = "" if rows else "All settings are the same."
    return Table("What differs between the runs", text, ["setting", *runs], rows)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
