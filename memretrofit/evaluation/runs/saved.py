"""What a task run left in its folder, read back: the four files, checked, and views of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from memretrofit.errors import CheckpointError, ConfigError
from memretrofit.evaluation.runs.item_log import COST, ITEMS, RUN, SUMMARY, read_object, records
from memretrofit.evaluation.scoring import SCORES

Place = tuple[str, int]
"""A task and a length: a cell of the tables."""


@dataclass(frozen=True)
class TaskRun:
    """One run of `memretrofit eval --tasks`."""

    directory: Path
    settings: Mapping[str, Any]
    """`run.json`: everything that fixes the numbers."""
    summary: Mapping[str, Any]
    """`summary.json`."""
    cost: Mapping[str, Any]
    """`cost.json`; empty where the cost was not measured."""
    items: Sequence[Mapping[str, Any]] = field(repr=False)
    """`items.jsonl`: a row for each item and arm."""

    @property
    def same_as(self) -> dict[str, str]:
        """Arm -> the arm that is the same computation, and was run in its place."""
        return dict(self.summary.get("same_as") or {})

    @property
    def arms(self) -> list[str]:
        """Every arm, in the order of the tables."""
        return list(self.settings["arms"])

    @property
    def shown(self) -> list[str]:
        """The arms that were run themselves."""
        return [arm for arm in self.arms if arm not in self.same_as]

    @cached_property
    def cells(self) -> dict[Place, Mapping[str, Any]]:
        """The summary's cells, in the order of the run."""
        return {(cell["task"], cell["length"]): cell for cell in self.summary["cells"]}

    @cached_property
    def hashes(self) -> dict[Place, tuple[str, ...]]:
        """The prompts of each cell, by the number of their items."""
        return self._by_number("prompt_hash")

    @cached_property
    def groups(self) -> dict[Place, tuple[str, ...]]:
        """The `Item.group` of every item of each cell, by their numbers, as `values` has them."""
        return self._by_number("group")

    def values(self, place: Place, arm: str, score: str) -> list[float]:
        """The score of every item of a cell, in the order of their numbers; empty for none."""
        return self._values.get((*place, arm, score), [])

    def _by_number(self, key: str) -> dict[Place, tuple[str, ...]]:
        found: dict[Place, dict[int, str]] = {place: {} for place in self.cells}
        for item in self.items:
            found[item["task"], item["length"]][item["number"]] = item[key]
        return {
            place: tuple(values[number] for number in sorted(values))
            for place, values in found.items()
        }

    @cached_property
    def _values(self) -> dict[tuple[str, int, str, str], list[float]]:
        found: dict[tuple[str, int, str, str], list[float]] = {}
        for item in sorted(self.items, key=lambda item: item["number"]):
            for score in SCORES:
                if item.get(score) is not None:
                    key = (item["task"], item["length"], item["arm"], score)
                    found.setdefault(key, []).append(item[score])
        return found

    def by_depth(self, score: str) -> dict[tuple[str, str], dict[tuple[int, float], list[float]]]:
        """(task, arm) -> (length, depth) -> scores, for the tasks that have depths."""
        found: dict[tuple[str, str], dict[tuple[int, float], list[float]]] = {}
        for item in self.items:
            if item.get("depth") is not None and item.get(score) is not None:
                grid = found.setdefault((item["task"], item["arm"]), {})
                grid.setdefault((item["length"], item["depth"]), []).append(item[score])
        return found

    def measured(self, score: str) -> list[Place]:
        """The cells whose task has the score."""
        return [
            place
            for place, cell in self.cells.items()
            if any(score in scores for scores in cell["scores"].values())
        ]


def read_run(directory: str | Path) -> TaskRun:
    """A finished run.

    Raises:
        ConfigError: the folder is not that of a finished run.
        CheckpointError: a file is damaged, or of another release.
    """
    directory = Path(directory)
    missing = [name for name in (RUN, ITEMS, SUMMARY) if not (directory / name).is_file()]
    if missing:
        raise ConfigError(
            f"{directory} holds no {' and no '.join(missing)}; pass the folder of a run of "
            "`memretrofit eval --tasks`, and let the same command finish it if it was stopped"
        )
    settings, summary = read_object(directory / RUN), read_object(directory / SUMMARY)
    cost = read_object(directory / COST) if (directory / COST).is_file() else {}
    run = TaskRun(directory, settings, summary, cost, list(records(directory / ITEMS)))
    if not isinstance(settings.get("arms"), list) or not summary.get("cells"):
        raise CheckpointError(f"{directory} names no arm or no cell; run the tasks again")
    _check_items(run)
    return run


def _check_items(run: TaskRun) -> None:
    """Every cell of the summary was computed from the items that are there."""
    found = Counter((item["task"], item["length"], item["arm"]) for item in run.items)
    expected = {
        (*place, arm): cell["items"] for place, cell in run.cells.items() for arm in cell["scores"]
    }
    differ = [
        f"{task} at {length}, {arm}: {found[task, length, arm]} items, "
        f"{expected.get((task, length, arm), 0)} in {SUMMARY}"
        for task, length, arm in dict.fromkeys([*expected, *found])
        if found[task, length, arm] != expected.get((task, length, arm), 0)
    ]
    if differ:
        more = f" (and {len(differ) - 1} more)" if len(differ) > 1 else ""
        raise CheckpointError(
            f"{run.directory}: {ITEMS} and {SUMMARY} do not belong together: {differ[0]}{more}. "
            "Let the same command finish the run."
        )


def run_names(directories: Sequence[Path]) -> list[str]:
    """A short name for each run: what is different in their paths.

    Raises:
        ConfigError: a folder is given twice.
    """
    paths = [path.resolve().parts for path in directories]
    if len(set(paths)) < len(paths):
        raise ConfigError("the same run is given twice; name each folder once")
    if len(paths) < 2:
        return [path.resolve().name for path in directories]
    front = _common(paths)
    back = _common([path[front:][::-1] for path in paths])
    names = ["/".join(path[front : len(path) - back]) or path[-1] for path in paths]
    # A run inside the folder of another one may have no name of its own.
    return names if len(set(names)) == len(names) else [str(path) for path in directories]


def _common(paths: Sequence[Sequence[str]]) -> int:
    """How many first parts all paths share."""
    count = 0
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        count += 1
    return count


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """One name and one text for each setting; a nested one is called `a.b`."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(_text(item) for item in value) or "none"
        else:
            yield f"{prefix}{key}", _text(value)


def _text(value: object) -> str:
    return "none" if value is None else str(value)
