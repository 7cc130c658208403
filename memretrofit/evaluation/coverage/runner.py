"""Examines many types, each in a process of its own: one that crashes, hangs or eats the memory is
a row of the result, and the others go on.

Nothing here imports torch: the processes come from a server that has imported it once.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Work = Callable[[str], Any]
"""From a type to what JSON can hold; a function of a module, since processes find it by name."""

SECONDS, MEGABYTES = 120, 6144
"""What one type may take unless another limit is asked for."""
PRELOADED = ["memretrofit.evaluation.coverage.examination"]


def run_each(
    names: Iterable[str],
    work: Work,
    *,
    seconds: float = SECONDS,
    megabytes: int = MEGABYTES,
    preloaded: list[str] = PRELOADED,
) -> Iterator[tuple[str, Any, str]]:
    """(type, what `work` gave, "") in order, or (type, None, why it gave nothing).

    Args:
        seconds: wall time after which the process is killed.
        megabytes: address space that it may take beyond what the server holds.
        preloaded: modules that the server imports before it makes processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preloaded)
    for name in names:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(work, name, megabytes, theirs), daemon=True)
        process.start()
        theirs.close()
        found, fault = None, ""
        try:
            if ours.poll(seconds):
                found, fault = ours.recv()
            else:
                fault = f"took more than {seconds:g} seconds"
        except EOFError:
            process.join(1)
            fault = f"its process ended with code {process.exitcode}"
        process.kill()
        process.join()
        ours.close()
        yield name, found, fault


def _work(work: Work, name: str, megabytes: int, answer: Connection) -> None:
    held = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    limit = held * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        answer.send((work(name), ""))
    except MemoryError:
        answer.send((None, f"took more than {megabytes} MB"))
    except Exception as error:  # any failure of a type is a result
        answer.send((None, f"{type(error).__name__}: {error}"))


class Progress:
    """What is known already, one line a type, so that a run that was stopped goes on.

    Lines of another run are dropped: its `key` says what the results depend on.
    """

    def __init__(self, path: Path, key: dict[str, str]) -> None:
        self.path, self.key = path, key
        self.found: dict[str, Any] = {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines and _parsed(lines[0]) == key:
            rows = [row for line in lines[1:] if (row := _parsed(line)) is not None]
            self.found = {row["type"]: row for row in rows}
        self._write([key, *self.found.values()])

    def add(self, row: dict[str, Any]) -> None:
        """Keep the result of one more type."""
        self.found[row["type"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def finish(self) -> None:
        """All is in the report now."""
        self.path.unlink()

    def _write(self, rows: list[Any]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self.path.write_text(text, encoding="utf-8")


def _parsed(line: str) -> Any:
    """A line that a killed run left half written is none."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def examined(
    names: Iterable[str],
    work: Work,
    progress: Progress,
    say: Callable[[str], None],
    **limits: Any,
) -> dict[str, Any]:
    """A row for each type: `work`'s answer with its seconds, or `fault`. Known ones are kept."""
    names = list(names)
    missing = [name for name in names if name not in progress.found]
    start, done = time.monotonic(), 0
    before = start
    for name, found, fault in run_each(missing, work, **limits):
        now = time.monotonic()
        row = {"type": name, "seconds": round(now - before, 1)}
        row |= {"fault": fault} if fault else {"seams": found}
        progress.add(row)
        before, done = now, done + 1
        left = (now - start) / done * (len(missing) - done) / 60
        known = len(names) - len(missing) + done
        say(f"{known}/{len(names)} {name}: {told(row)} ({row['seconds']} s, {left:.0f} min left)")
    return {name: progress.found[name] for name in names}


def told(row: dict[str, Any]) -> str:
    """One row in words."""
    if "fault" in row:
        return f"broken: {row['fault']}"
    return ", ".join(f"{seam} {verdict['status']}" for seam, verdict in row["seams"].items())
