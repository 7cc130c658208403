"""What a bank that went on learning still knows: lessons of earlier runs, asked again.

::

    retained = recall now / recall when they were written

Lessons are known by the content of their file, so that a report finds what was measured of them in
the report of the run before, wherever the folders lie now.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from memretrofit.data.lessons import read_lessons
from memretrofit.evaluation.bank_recall import BATCH_ARMS, KINDS, asked, recall, words_of
from memretrofit.evaluation.statistics import accuracy_interval
from memretrofit.hub.record import REPORT, read_json
from memretrofit.hub.tensors import sha256
from memretrofit.recipe import InjectSection


def lessons_file(path: Path) -> dict[str, str]:
    """Name and hash of a file of lessons."""
    return {"name": path.name, "sha256": sha256(path)}


def measure_retention(
    model: Any, tokenizer: Any, section: InjectSection, console: Console
) -> list[dict[str, Any]]:
    """Recall of the lessons in each file of `section.earlier`, and what it was when each was
    written, as far as the report of the bank `section.onto` knows.

    Raises:
        ConfigError: a file cannot be read, or is broken.
        CheckpointError: the report is damaged.
    """
    before = written_recall(Path(section.onto or ""))
    found: list[dict[str, Any]] = []
    for path in map(Path, section.earlier):
        file, kinds = lessons_file(path), dict[str, dict[str, Any]]()
        for kind, pairs in asked(read_lessons(path)).items():
            now = accuracy_interval(recall(model, tokenizer, pairs, BATCH_ARMS["trained"]))
            written = before.get(file["sha256"], {}).get(kind)
            known = written is not None and written["mean"] > 0
            kinds[kind] = {
                "prompts": len(pairs),
                "written": written,
                "now": now._asdict(),
                "retained": now.mean / written["mean"] if written is not None and known else None,
            }
            console.print(f"recall, {path.name}, {KINDS[kind]}: {now.mean:.3f}")
        found.append({**file, "recall": kinds})
    return found


def written_recall(folder: Path) -> dict[str, dict[str, Any]]:
    """Recall of each kind of prompt right after lessons were written, by the hash of their file:
    what the report of a run says of its own lessons, and of those before it.
    """
    if not (folder / REPORT).is_file():
        return {}
    report = read_json(folder / REPORT)
    found = {
        entry["sha256"]: {kind: x["written"] for kind, x in entry["recall"].items()}
        for entry in report.get("retention") or []
    }
    own = {kind: entry["trained"] for kind, entry in report["recall"].items()}
    return found | {report.get("lessons_file", {}).get("sha256", ""): own}


def retention_table(entries: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The same in words, as `markdown.table` takes them."""
    return {
        "title": "Earlier lessons",
        "text": "They were written in earlier runs, and asked again after this one. Retained: "
        "recall now, over recall when they were written.",
        "columns": ["lessons", "prompts", "number", "when written", "now", "retained"],
        "rows": [
            [
                entry["name"],
                KINDS[kind],
                x["prompts"],
                "n/a" if x["written"] is None else words_of(x["written"]),
                words_of(x["now"]),
                "n/a" if x["retained"] is None else f"{x['retained']:.2f}",
            ]
            for entry in entries
            for kind, x in entry["recall"].items()
        ],
    }
