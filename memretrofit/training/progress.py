"""What a run tells: a JSON record for each step, and a line on the terminal with the time left."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from memretrofit.errors import StateError
from memretrofit.files import write_text

SECONDS_BETWEEN_LINES = 30.0
"""Where the output is no terminal, a line this often replaces the bar."""


class RunLog:
    """A JSONL file: `stage, step, loss, learning_rate, tokens, tokens_per_second, seconds, ...`.

    A run that goes on after a kill drops what was logged beyond its checkpoint, so that the file
    reads as one uninterrupted run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def records(self) -> list[dict[str, Any]]:
        """All whole records; a kill may have cut off the last line."""
        if not self.path.is_file():
            return []
        *whole, _ = self.path.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in whole]

    def rewind(self, stages: Sequence[str], stage: str, step: int) -> list[dict[str, Any]]:
        """Keep earlier stages and the steps of `stage` before `step`; return what is kept of it."""
        order = {name: number for number, name in enumerate(stages)}
        kept = [
            record
            for record in self.records()
            if (order.get(record["stage"], -1), record["step"]) < (order[stage], step)
        ]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        return [record for record in kept if record["stage"] == stage]

    def append(self, record: dict[str, Any]) -> None:
        """One more line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class StageProgress:
    """Counts tokens and time of one stage, logs each step and shows the rate and the time left.

    Args:
        tokens: how many each step reads.
    """

    def __init__(
        self,
        log: RunLog,
        stages: Sequence[str],
        stage: str,
        tokens: Sequence[int],
        console: Console | None = None,
    ) -> None:
        self.log, self.stages, self.stage = log, stages, stage
        self.steps = len(tokens)
        self.read = [0, *itertools.accumulate(tokens)]
        self.console = console or Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} tokens/s"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(stage, total=self.steps, loss=math.nan, rate=0.0)
        self.first: int | None = None
        self.earlier = 0.0
        self.last_line = -math.inf

    def __enter__(self) -> StageProgress:
        self.began = self.previous = time.monotonic()
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, step: int, loss: float, **fields: Any) -> None:
        """Record step number `step`, which counts from 1.

        Raises:
            StateError: the loss is not a finite number.
        """
        if not math.isfinite(loss):
            raise StateError(
                f"the loss of {self.stage} step {step} is {loss}; lower the learning rate, or "
                "train in float32"
            )
        if self.first is None:
            self.first = step
            kept = self.log.rewind(self.stages, self.stage, step)
            self.earlier = kept[-1]["seconds"] if kept else 0.0
        now = time.monotonic()
        rate = (self.read[step] - self.read[step - 1]) / max(now - self.previous, 1e-9)
        self.previous = now
        record = {
            "stage": self.stage,
            "step": step,
            "loss": loss,
            "tokens": self.read[step],
            "tokens_per_second": round(rate, 1),
            "seconds": round(self.earlier + now - self.began, 3),
            **fields,
        }
        self.log.append(record)
        done = self.read[step] - self.read[self.first - 1]
        average = done / max(now - self.began, 1e-9)
        self.bar.update(self.task, completed=step, loss=loss, rate=average)
        self._line(step, loss, average, now)

    def _line(self, step: int, loss: float, rate: float, now: float) -> None:
        due = now - self.last_line >= SECONDS_BETWEEN_LINES or step == self.steps
        if self.console.is_terminal or not due:
            return
        self.last_line = now
        left = (self.read[-1] - self.read[step]) / rate
        self.console.print(
            f"{self.stage} {step}/{self.steps}  loss {loss:.4f}  {rate:,.0f} tokens/s  "
            f"{duration(left)} left",
            highlight=False,
            soft_wrap=True,
        )


def duration(seconds: float) -> str:
    """`3 h 05 min`, `12 min`, `40 s`."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{math.ceil(seconds)} s"
