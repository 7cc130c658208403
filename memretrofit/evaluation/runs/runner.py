"""Run tasks over arms, write down every item, and go on after a kill where it stopped.

A run's folder holds::

    run.json       everything that fixes the numbers
    items.jsonl    one line for each item and arm; no times
    summary.json   tables with intervals, from items.jsonl
    cost.json      cache bytes, decoding time and parameters of each arm
    .lock          held by the process that writes

Order is task, length, batch, arm. What is written at once is a batch of one arm: a run that was
killed keeps whole batches, and the same command then gives the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from memretrofit import __version__
from memretrofit.errors import ConfigError
from memretrofit.evaluation.material.prose import NO_PROSE, Prose
from memretrofit.evaluation.reader import Answerer, Outcome
from memretrofit.evaluation.runs.arms import (
    ModelArm,
    kept_exactly,
    memory_state,
    same_computations,
)
from memretrofit.evaluation.runs.baselines import TextArm
from memretrofit.evaluation.runs.batches import all_batches
from memretrofit.evaluation.runs.item_log import (
    COST,
    ITEMS,
    RUN,
    SCHEMA_VERSION,
    SUMMARY,
    claim,
    kept_units,
    records,
)
from memretrofit.evaluation.runs.summary import reading_of, record_of, summarise_items
from memretrofit.evaluation.task import DEPTHS, Count, Item, Task, token_counter
from memretrofit.files import write_json
from memretrofit.patching.wrapping import positions_of, unwrapped

SECONDS_BETWEEN_LINES = 30.0
"""Where the output is no terminal, a line this often replaces the bar."""
_LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "numpy")


@dataclass(frozen=True)
class _Unit:
    """One batch of items for one arm."""

    task: Task
    items: Sequence[Item]
    arm: str

    @property
    def tokens(self) -> int:
        return sum(item.length for item in self.items)

    def keys(self) -> list[tuple[Any, ...]]:
        """`memretrofit.evaluation.runs.item_log.KEYS` of each line that it writes."""
        return [(x.task, x.length, x.number, self.arm, x.prompt_hash) for x in self.items]


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    *,
    answerers: Mapping[str, Answerer],
    prose: Prose = NO_PROSE,
    number: int = 20,
    seed: int = 0,
    depths: Sequence[float] = DEPTHS,
    batch_size: int = 4,
    output: str | Path,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Measure every arm on every item, and return the folder of the run.

    Args:
        model: the model behind the arms; its positions bound the lengths.
        tokenizer: counts the tokens of an item.
        tasks: what `get_tasks` gives.
        lengths: tokens of an item, prompt and answer.
        answerers: name -> arm, as `answerers_of` gives them. Names with the same object are the
            same computation: it runs once and is written for each. An arm is left out of lengths
            beyond its positions, where another one reads them.
        prose: what tasks hide things in; not needed where none of them reads any.
        number: items of each task and length.
        seed: of the items.
        depths: where the evidence lies, in turns, for tasks that have a depth.
        batch_size: items that are read together; an odd one joins the batch before. Those about
            the same text are kept apart, because one arm reads its neighbour's state.
        output: the folder; where it holds the beginning of this very run, the run goes on.
        settings: whatever else fixes the numbers (the model, its method, the chunk size), for
            `run.json`, where they go before what is found out here. Plain JSON values.

    Raises:
        ConfigError: before anything is run: a value out of range, lengths beyond the model's
            positions, tasks that do not fit a length (all of them), a batch whose items are about
            one text, a folder that cannot be written or that holds another run.
        CheckpointError: the items in the folder are damaged, or of another release.
        StateError: another process writes to the folder.
    """
    _check(model, tasks, lengths, answerers, prose, number, depths, batch_size)
    output = Path(output)
    same_as, positions = same_computations(answerers), positions_of(model)
    wanted = {
        "schema_version": SCHEMA_VERSION,
        "memory": memory_state(model),
        "exact_tokens": kept_exactly(model),
        **(settings or {}),
        "tasks": [task.name for task in tasks],
        "lengths": list(lengths),
        "arms": list(answerers),
        "same_as": same_as,
        "number": number,
        "seed": seed,
        "depths": list(depths),
        "batch_size": batch_size,
        "prose": _describe(prose) if any(task.reads_prose for task in tasks) else None,
        "controls": [task.name for task in tasks if task.is_control],
        "rank_by_presence": [task.name for task in tasks if task.rank_by_presence],
        "versions": _versions(),
    }
    with claim(output, wanted):
        items = _all_items(tokenizer, tasks, lengths, prose, number, seed, depths)
        batches = all_batches(items, batch_size, _reading_neighbours(answerers))
        units = [
            _Unit(task, batch, arm)
            for task, batch in batches
            for arm, answerer in answerers.items()
            if _reads(answerer, batch[0].length, positions)
        ]
        done = kept_units(output / ITEMS, [unit.keys() for unit in units])
        if not (output / RUN).is_file():
            write_json(output / RUN, wanted)
        _run(units, done, answerers, same_as, output / ITEMS)
        found = list(records(output / ITEMS))
        write_json(output / SUMMARY, summarise_items(found, list(answerers), same_as))
        if not (output / COST).is_file():
            costs = _costs(answerers, items, token_counter(tokenizer), positions)
            write_json(output / COST, costs)
    return output


def _run(
    units: Sequence[_Unit],
    done: int,
    answerers: Mapping[str, Answerer],
    same_as: Mapping[str, str],
    path: Path,
) -> None:
    """Answer what is not done yet, and append each unit's lines in one write."""
    batch = [unit for unit in units[:done] if done < len(units) and unit.items is units[done].items]
    found: dict[str, list[dict[str, Any]]] = {}
    if batch:  # of the batch that was begun, arms may stand in for others
        kept = list(records(path))[-sum(len(unit.items) for unit in batch) :]
        for unit in batch:
            found[unit.arm], kept = kept[: len(unit.items)], kept[len(unit.items) :]
    weights = [0 if unit.arm in same_as else unit.tokens for unit in units]
    with path.open("ab", buffering=0) as file, _Bar(weights[:done], weights[done:]) as bar:
        for place, unit in enumerate(units[done:], done):
            bar.begin(f"{unit.task.name} {unit.items[0].length} {unit.arm}")
            if place and unit.items is not units[place - 1].items:
                found = {}
            if unit.arm in same_as:
                lines = [{**r, "arm": unit.arm} for r in found[same_as[unit.arm]]]
            else:
                lines = _answer(unit, answerers[unit.arm])
            found[unit.arm] = lines
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            bar.advance(weights[place])


class _Bar:
    """Tokens that were read, and the time left; on no terminal a line now and then."""

    def __init__(self, before: Sequence[int], left: Sequence[int]) -> None:
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        total = sum(before) + sum(left)
        self.task = self.bar.add_task("", total=total, completed=sum(before))
        self.left, self.done = sum(left), 0

    def __enter__(self) -> _Bar:
        self.began = self.line = time.monotonic()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def begin(self, what: str) -> None:
        self.what = what
        self.bar.update(self.task, description=what)

    def advance(self, tokens: int) -> None:
        self.bar.advance(self.task, tokens)
        self.done, self.left = self.done + tokens, self.left - tokens
        now = time.monotonic()
        if self.console.is_terminal or now - self.line < SECONDS_BETWEEN_LINES or not self.done:
            return
        self.line = now
        left = timedelta(seconds=round((now - self.began) / self.done * self.left))
        self.console.print(f"{self.what} done, {left} left", highlight=False, soft_wrap=True)


def _answer(unit: _Unit, answerer: Answerer) -> list[dict[str, Any]]:
    outcomes: list[Outcome] = answerer([reading_of(unit.task, item) for item in unit.items])
    return [
        record_of(unit.task, item, unit.arm, outcome)
        for item, outcome in zip(unit.items, outcomes, strict=True)
    ]


def _all_items(
    tokenizer: Any,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    prose: Prose,
    number: int,
    seed: int,
    depths: Sequence[float],
) -> list[tuple[Task, list[Item]]]:
    """The items of every cell; every cell that does not fit is named at once."""
    count = token_counter(tokenizer)
    faults: list[str] = []

    def cell(task: Task, length: int) -> list[Item]:
        try:
            return task.items(count, prose, length=length, number=number, seed=seed, depths=depths)
        except ConfigError as error:
            faults.extend(error.problems)
            return []

    found = [(task, cell(task, length)) for task in tasks for length in lengths]
    if faults:
        raise ConfigError.listing("tasks", faults)
    return found


def _reads(answerer: Answerer, length: int, positions: int | None) -> bool:
    """Whether an arm can read so many tokens with a model of so many positions."""
    if isinstance(answerer, TextArm):
        return True
    most = answerer.positions if isinstance(answerer, ModelArm) else positions
    return most is None or length <= most


def _reading_neighbours(answerers: Mapping[str, Answerer]) -> list[str]:
    return [name for name, x in answerers.items() if isinstance(x, ModelArm) and x.of_rows]


def _check(
    model: Any,
    tasks: Sequence[Task],
    lengths: Sequence[int],
    answerers: Mapping[str, Answerer],
    prose: Prose,
    number: int,
    depths: Sequence[float],
    batch_size: int,
) -> None:
    named = {"tasks": tasks, "lengths": lengths, "arms": answerers, "depths": depths}
    faults = [f"{name}: none given" for name, values in named.items() if not values]
    faults += [f"length {length} is below 1 token" for length in lengths if length < 1]
    faults += [f"depth {depth} is not in [0, 1]" for depth in depths if not 0 <= depth <= 1]
    positions = positions_of(model)
    whole = [x for x in answerers.values() if not isinstance(x, TextArm)]
    # what text arms read of a longer text is not known to fit either
    readers = whole or [model]
    if beyond := [x for x in lengths if not any(_reads(r, x, positions) for r in readers)]:
        faults.append(
            f"lengths {', '.join(map(str, beyond))} are beyond the {positions} positions that "
            f"{type(unwrapped(model)).__name__} was trained on, and no arm asked for reads further;"
            f" ask for at most {positions}, load the model with scaled positions, or choose a "
            "memory whose far tokens stand near, as infllm with positions='clamp'"
        )
    for name, values in (("task", [task.name for task in tasks]), ("length", lengths)):
        faults += [f"{name} {x} is given twice" for x in set(values) if list(values).count(x) > 1]
    if number < 2:
        faults.append(f"number={number}: an interval over items needs at least 2")
    if batch_size < 1:
        faults.append(f"batch_size={batch_size} must be at least 1")
    if readers := [task.name for task in tasks if task.reads_prose and not prose.documents]:
        faults.append(f"prose: none given, and {', '.join(readers)} hide things in it")
    apart = _reading_neighbours(answerers)
    if apart and batch_size < 2:
        faults.append(
            f"batch_size={batch_size}: arms {', '.join(apart)} read another row's state, so they "
            "need at least 2; or leave them out"
        )
    if faults:
        raise ConfigError.listing("run", faults)


def _describe(prose: Prose) -> dict[str, Any]:
    """What a report has to say of the text, and a hash of all of it."""
    text = "\n".join("\n".join(sentences) for sentences in prose.documents)
    return {
        "source": prose.source,
        "licence": prose.licence,
        "documents": len(prose.documents),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in _LIBRARIES}
    return {"memretrofit": __version__, "python": platform.python_version(), **found}


def _costs(
    answerers: Mapping[str, Answerer],
    items: Sequence[tuple[Task, list[Item]]],
    count: Count,
    positions: int | None,
) -> dict[str, Any]:
    """Each arm's cost after the longest prompt that it reads; null for what cannot tell its own."""

    def longest(lengths: set[int]) -> tuple[Task, Item]:
        pairs = [(t, item) for t, cell in items for item in cell if item.length == max(lengths)]
        return max(pairs, key=lambda pair: count(pair[1].prompt))

    lengths = {cell[0].length for _, cell in items}
    found: dict[int, dict[str, Any]] = {}
    for answerer in answerers.values():
        own = {length for length in lengths if _reads(answerer, length, positions)}
        if own and isinstance(answerer, ModelArm | TextArm) and id(answerer) not in found:
            found[id(answerer)] = answerer.cost(reading_of(*longest(own)))
    task, item = longest(lengths)
    empty = dict.fromkeys(
        ("tokens", "cache_bytes", "ms_per_token", "trained_parameters", "active_parameters")
    )
    return {
        "schema_version": SCHEMA_VERSION,
        "task": task.name,
        "length": item.length,
        "tokens": count(item.prompt),
        "arms": {name: found.get(id(x), empty) for name, x in answerers.items()},
    }
