"""The file, the table, and what changed since the file was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memretrofit.errors import CheckpointError
from memretrofit.files import write_json, write_text
from memretrofit.markdown import paragraphs, table

SCHEMA_VERSION = 1
MAIN = "attention"
"""The seam whose status is that of the type."""
STATUSES = ("live", "unsupported", "broken")
TITLES = {"attention": "attention", "ffn": "FFN", "sequence": "segments"}

Types = dict[str, dict[str, Any]]


def report(rows: Mapping[str, Mapping[str, Any]], versions: Mapping[str, str]) -> dict[str, Any]:
    """What is written: versions, counts by seam, and each type with its status and reason."""
    types: Types = {}
    for name, row in sorted(rows.items()):
        seams = row.get("seams") or {
            seam: {"status": "broken", "reason": row["fault"]} for seam in TITLES
        }
        types[name] = {key: seams[MAIN][key] for key in ("status", "reason") if key in seams[MAIN]}
        types[name]["seams"] = seams
    return {
        "schema_version": SCHEMA_VERSION,
        **versions,
        "counts": {seam: counts(types, seam) for seam in TITLES},
        "types": types,
    }


def counts(types: Types, seam: str) -> dict[str, int]:
    """How many types are live, unsupported and broken at one seam."""
    found = [entry["seams"][seam]["status"] for entry in types.values()]
    return {status: found.count(status) for status in STATUSES}


def broken(types: Types) -> dict[str, str]:
    """What is neither live nor refused, by type and seam."""
    return {
        f"{name}, {TITLES[seam]}": verdict["reason"]
        for name, entry in types.items()
        for seam, verdict in entry["seams"].items()
        if verdict["status"] not in ("live", "unsupported")
    }


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any], *, whole: bool
) -> dict[str, list[str]]:
    """`lost`: what was live and is not; `won`; `new` types, and `gone` ones if `whole`."""
    old, new = before["types"], after["types"]
    both = [name for name in new if name in old]
    moved: dict[str, list[str]] = {"lost": [], "won": [], "new": [], "gone": []}
    for name in both:
        for seam, verdict in new[name]["seams"].items():
            was = old[name]["seams"].get(seam, {}).get("status")
            now = verdict["status"]
            if (was == "live") != (now == "live"):
                reason = verdict.get("reason", "")
                words = f"{name}, {TITLES[seam]}: {was} -> {now} {reason}".rstrip()
                moved["lost" if was == "live" else "won"].append(words)
    moved["new"] = [f"{name}: {new[name]['status']}" for name in new if name not in old]
    if whole:
        moved["gone"] = [f"{name}: was {old[name]['status']}" for name in old if name not in new]
    return {kind: found for kind, found in moved.items() if found}


def markdown(found: Mapping[str, Any]) -> str:
    """The table of all types, and the reasons of those that are refused."""
    types: Types = found["types"]
    total = len(types)
    live = [f"{found['counts'][seam]['live']} at {title}" for seam, title in TITLES.items()]
    head = (
        f"Of the {total} types of AutoModelForCausalLM in Transformers {found['transformers']}, a "
        f"memory is live in: {', '.join(live)}. Written by scripts/coverage, which holds tiny "
        "random models of each type to what a memory promises."
    )
    rows = [
        [name, *(_cell(entry["seams"][seam]) for seam in TITLES)] for name, entry in types.items()
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, entry in types.items():
        for seam, title in TITLES.items():
            verdict = entry["seams"][seam]
            if verdict["status"] != "live":
                reasons.setdefault((title, verdict["reason"]), []).append(name)
    why = [[title, ", ".join(names), reason] for (title, reason), names in sorted(reasons.items())]
    parts = ["# Architectures", head, table(["type", *TITLES.values()], rows)]
    if why:
        parts += ["## Why not", table(["where", "types", "reason"], why)]
    return paragraphs(parts)


def _cell(verdict: Mapping[str, Any]) -> str:
    if verdict["status"] != "live":
        return verdict["status"]
    return f"live, {verdict['places']}" if "places" in verdict else "live"


def read(path: Path) -> dict[str, Any] | None:
    """The committed file; None where there is none.

    Raises:
        CheckpointError: it is not one of ours.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found["schema_version"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a coverage file ({error}). Delete it, or name another."
        ) from error
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{path}: schema_version {version}, and this is {SCHEMA_VERSION}.")
    return found


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write the file, and the table beside it."""
    write_json(path, found)
    write_text(path.with_suffix(".md"), markdown(found))
