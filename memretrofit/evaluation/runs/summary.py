"""From items to claims: what is written down of each item, and the table of a run.

Scores of a cell (a task at a length) are means over its items, and differences are paired by item.
An accuracy has Wilson's interval; likelihoods and differences have that of the paired bootstrap,
which draws items that share their text (`Item.group`) together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from memretrofit.evaluation.arm_table import DIFFERENCES
from memretrofit.evaluation.reader import Outcome, Reading
from memretrofit.evaluation.runs.item_log import SCHEMA_VERSION
from memretrofit.evaluation.scoring import SCORES, score
from memretrofit.evaluation.statistics import accuracy_interval, paired_bootstrap
from memretrofit.evaluation.task import Item, Score, Task

LEVEL = 0.95
_SAMPLES = 2000
_DIGITS = 6
_Ends = dict[str, float | None]
"""`mean`, `low` and `high`."""


def reading_of(task: Task, item: Item) -> Reading:
    """What a model is given of an item: no more than the task's scores need."""
    draft = item.draft
    start = len(draft.instruction)
    return Reading(
        prompt=item.prompt,
        candidates=draft.candidates if {"rank", "nll"} & set(task.scores) else (),
        max_new_tokens=task.answer_tokens if "strict" in task.scores else 0,
        context=(start, start + len(draft.context)),
    )


def record_of(task: Task, item: Item, arm: str, outcome: Outcome) -> dict[str, Any]:
    """One line of `items.jsonl`. A score that the task does not have is null, and so is `chance`
    where nothing is ranked.
    """
    draft = item.draft
    found = score(task, draft, outcome.text, outcome.log_likelihoods, outcome.token_counts)
    values = {**found, **({"chance": item.chance} if "rank" in found else {})}
    return {
        "task": item.task,
        "length": item.length,
        "number": item.number,
        "group": item.group,
        "depth": item.depth,
        "arm": arm,
        "prompt_hash": item.prompt_hash,
        "offsets": [list(span) for span in item.offsets],
        "text": outcome.text,
        "log_likelihoods": [round(value, _DIGITS) for value in outcome.log_likelihoods],
        **{
            name: round(values[name], _DIGITS) if name in values else None
            for name in (*SCORES, "chance")
        },
    }


def summarise_items(
    records: Sequence[Mapping[str, Any]], arms: Sequence[str], same_as: Mapping[str, str]
) -> dict[str, Any]:
    """`summary.json` from the lines of `items.jsonl`.

    Args:
        records: every item of every arm; of a cell, of those arms that read its length.
        arms: names, in the order of the tables.
        same_as: arm -> the arm that was run in its place.
    """
    cells: dict[tuple[str, int], dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        cell = cells.setdefault((record["task"], record["length"]), {arm: [] for arm in arms})
        cell[record["arm"]].append(record)
    return {
        "schema_version": SCHEMA_VERSION,
        "level": LEVEL,
        "same_as": dict(same_as),
        "cells": [
            _cell(task, length, {arm: own for arm, own in found.items() if own})
            for (task, length), found in cells.items()
        ],
    }


def _cell(task: str, length: int, found: Mapping[str, list[Mapping[str, Any]]]) -> dict[str, Any]:
    first = next(iter(found.values()))
    groups = [record["group"] for record in first]
    columns: dict[str, dict[Score, list[float]]] = {
        arm: {score: [r[score] for r in own] for score in SCORES if first[0][score] is not None}
        for arm, own in found.items()
    }
    chances = [record["chance"] for record in first]
    return {
        "task": task,
        "length": length,
        "items": len(first),
        "groups": len(set(groups)),
        "chance": None if None in chances else round(sum(chances) / len(chances), _DIGITS),
        "scores": {
            arm: {score: _score(score, values, groups) for score, values in own.items()}
            for arm, own in columns.items()
        },
        "differences": {
            f"{a}-{b}": {s: _difference(x, columns[b][s], groups) for s, x in columns[a].items()}
            for a, b in DIFFERENCES
            if a in columns and b in columns
        },
    }


def _score(score: Score, values: Sequence[float], groups: Sequence[str]) -> _Ends:
    if score == "nll":
        return _difference(values, [0.0] * len(values), groups)
    return _rounded(accuracy_interval(values, groups=groups, level=LEVEL)._asdict())


def _difference(a: Sequence[float], b: Sequence[float], groups: Sequence[str]) -> _Ends:
    """Mean of a - b with its interval; of one group alone there is none."""
    if len(set(groups)) < 2:
        return _rounded({"mean": (sum(a) - sum(b)) / len(a), "low": None, "high": None})
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (a, b))
    found = paired_bootstrap(x, y, groups=groups, samples=_SAMPLES, level=LEVEL)
    return _rounded(found._asdict())


def _rounded(values: Mapping[str, float | None]) -> _Ends:
    return {key: None if x is None else round(x, _DIGITS) for key, x in values.items()}
