"""Try every causal language model type of the installed Transformers; write coverage.json.

    scripts/coverage                     # all types; goes on where a stopped run was
    scripts/coverage llama gemma3_text   # these alone; writes nothing
    scripts/coverage --fresh             # forget a stopped run

A tiny random model of each type, in a process of its own, is held to what a memory promises at each
of three sites (memretrofit/evaluation/coverage). A type at a site is live or refused by a typed
error; anything else is broken, and the run fails. It also fails, and says what broke, where
something was live in the committed coverage.json and is not any more: run it on a new release of
Transformers. coverage.md beside coverage.json is the same as a table.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console

import memretrofit
from memretrofit.errors import ConfigError, MemretrofitError, did_you_mean
from memretrofit.evaluation.coverage import report, runner
from memretrofit.evaluation.coverage.examination import examine_type
from memretrofit.evaluation.coverage.tiny import causal_types

ROOT = Path(__file__).parent.parent
SOURCES = ("ops", "modules", "patching", "methods", "evaluation/coverage")
"""What the results depend on, beside Transformers."""


def main(
    types: Annotated[list[str] | None, typer.Argument(help="Types to try; all of them.")] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Where the results go.")] = ROOT
    / "coverage.json",
    seconds: Annotated[
        float, typer.Option(min=1, help="Wall time for one type, then its process is killed.")
    ] = runner.SECONDS,
    megabytes: Annotated[
        int, typer.Option(min=256, help="Memory for one type.")
    ] = runner.MEGABYTES,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget a stopped run.")] = False,
) -> None:
    """Try every architecture; print what is live, write coverage.json and coverage.md."""
    console = Console(stderr=True, soft_wrap=True)
    try:
        known = causal_types()
        for name in types or []:
            if name not in known:
                raise ConfigError(f"no type {name!r}; {did_you_mean(name, known)}")
        before = report.read(json_file)
        path = json_file.with_suffix(".running")
        if fresh or types:
            path = path if fresh else json_file.with_suffix(".some")
            path.unlink(missing_ok=True)
        progress = runner.Progress(path, run_key())
        rows = runner.examined(
            types or known,
            examine_type,
            progress,
            lambda text: console.print(text, markup=False, highlight=False),
            seconds=seconds,
            megabytes=megabytes,
        )
    except MemretrofitError as error:
        console.print(f"{type(error).__name__}: {error}", markup=False)
        raise typer.Exit(2) from None
    found = report.report(rows, {"transformers": transformers.__version__})
    if not types:
        report.write(json_file, found)
    progress.finish()
    raise typer.Exit(told(found, before, whole=not types))


def run_key() -> dict[str, str]:
    """What results depend on: a run that was stopped goes on only where nothing of it changed."""
    package, digest = Path(memretrofit.__file__).parent, hashlib.sha256()
    for source in SOURCES:
        for path in sorted((package / source).rglob("*.py")):
            digest.update(path.read_bytes())
    return {"transformers": transformers.__version__, "source": digest.hexdigest()}


def told(found: dict[str, Any], before: dict[str, Any] | None, *, whole: bool) -> int:
    """Print counts, what is broken and what changed; the exit status."""
    console = Console(soft_wrap=True, highlight=False)
    for seam, title in report.TITLES.items():
        counts = ", ".join(f"{n} {status}" for status, n in found["counts"][seam].items())
        console.print(f"{title}: {counts}")
    faults = report.broken(found["types"])
    for name, reason in faults.items():
        console.print(f"broken: {name}: {reason}", markup=False)
    changes = report.changes(before, found, whole=whole) if before else {}
    for kind, words in changes.items():
        for line in words:
            console.print(f"{kind}: {line}", markup=False)
    return 1 if faults or "lost" in changes else 0


if __name__ == "__main__":
    typer.run(main)
