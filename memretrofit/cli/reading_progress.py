"""How far a long text has been read, and the time that is left."""

from __future__ import annotations

import math
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 30.0
"""Where the output is no terminal, a line this often replaces the bar."""


class ReadingProgress:
    """A bar on a terminal; elsewhere a line now and then, and one at the end."""

    def __init__(self, tokens: int, console: Console | None = None) -> None:
        self.tokens, self.done = tokens, 0
        self.console = console or Console(stderr=True)
        self.bar = Progress(
            TextColumn("reading"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("tokens, left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("reading", total=tokens)

    def __enter__(self) -> ReadingProgress:
        self.began = time.monotonic()
        self.last_line = -math.inf
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, tokens: int) -> None:
        """So many more tokens have been read."""
        self.done += tokens
        self.bar.update(self.task, completed=self.done)
        now = time.monotonic()
        due = now - self.last_line >= SECONDS_BETWEEN_LINES or self.done == self.tokens
        if self.console.is_terminal or not due:
            return
        self.last_line = now
        rate = self.done / max(now - self.began, 1e-9)
        self.console.print(
            f"read {self.done:,}/{self.tokens:,} tokens  {rate:,.0f} tokens/s  "
            f"{math.ceil((self.tokens - self.done) / rate)} s left",
            highlight=False,
            soft_wrap=True,
        )
