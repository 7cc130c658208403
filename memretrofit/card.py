"""The model card: a Hub README made from the config, the recipe and the results of a run.

The same inputs give the same text, byte for byte: no date, no host, no path that was not passed in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import yaml

from memretrofit.markdown import code, escape, fence, table

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""A model's id on the Hub: `owner/name`, of old models `name`."""


class Form(NamedTuple):
    """What a repository with a memory holds, and how it is loaded."""

    relation: str
    """To the base model, in the Hub's words."""
    holds: str
    load: str
    """Python that makes `model`; `{name}` is its name."""


ADDED = Form(
    "adapter",
    "This repository holds what was added; the base model is loaded from its own place.",
    "import memretrofit\nfrom transformers import AutoTokenizer\n\n"
    "model = memretrofit.from_pretrained({name!r})\n",
)
STANDALONE = Form(
    "finetune",
    "This repository holds the base model (`base/`) and the memory (`memory/`); to load it, "
    "memretrofit must be installed.",
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    "model = AutoModelForCausalLM.from_pretrained({name!r}, trust_remote_code=True)\n",
)


def render_card(
    *,
    name: str,
    config: Mapping[str, Any],
    base: Mapping[str, Any],
    recipe: str | Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    paper: str | None = None,
    limits: str = "",
    hashes: Mapping[str, str] | None = None,
    licence: str = "apache-2.0",
    tags: Sequence[str] = (),
    form: Form = ADDED,
) -> str:
    """A model card in Markdown with the Hub's YAML front matter.

    Args:
        name: of the model; a repo id `owner/name` once it has one.
        config: `MethodConfig.to_dict()`: `method`, `schema_version` and every field.
        base: `model` (Hub id or path), and where known `revision` and `fingerprint`.
        recipe: what trained it, printed as it stands when it is text, else as YAML; None if
            untrained.
        results: `texts`: name of a held-out text -> `Summary.to_dict()`, the headline first; and
            optionally `cost`: arm -> {`cache_bytes`, `ms_per_token`}, with `cost_tokens`, the
            length at which it was measured; and `tasks`: the `report.json` of a task run, of which
            the notes and the tables are printed. Of a bank: `recall`: kind of prompt -> arm ->
            interval, and `report`: {`notes`, `tables`}, printed.
        paper: of the method, `arXiv:...`.
        limits: Markdown: what it does not do, what was tried and failed. Printed as it stands.
        hashes: file name -> SHA-256.
        licence: Hub identifier of the licence of the memory's weights.
        tags: further tags of the Hub.
        form: what the repository holds.
    """
    texts = dict((results or {}).get("texts") or {})
    entries = [_index_entry(text, summary) for text, summary in texts.items()]
    entries += _recall_entries((results or {}).get("recall") or {})
    front = _front_matter(name, config, base, entries, licence, tags, form)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=1000)}---",
        f"# {escape(name)}",
        _what_it_is(config, base, paper, texts, form),
        "## Use\n\n" + fence(_use(name, base, form), "python"),
    ]
    if results:
        parts.append(_results(texts, results))
    parts.append("## Configuration\n\n" + fence(_yaml(config), "yaml"))
    trained = (
        "The memory was not trained."
        if recipe is None
        else "The exact recipe:\n\n"
        + fence(recipe if isinstance(recipe, str) else _yaml(recipe), "yaml")
    )
    parts.append(f"## How it was trained\n\n{trained}")
    parts.append("## Limits and negative results\n\n" + (limits.strip() or "None were recorded."))
    parts.append("## Provenance\n\n" + _provenance(base, hashes or {}))
    return "\n\n".join(parts) + "\n"


def _front_matter(
    name: str,
    config: Mapping[str, Any],
    base: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    licence: str,
    tags: Sequence[str],
    form: Form,
) -> dict[str, Any]:
    front: dict[str, Any] = {}
    # The Hub rejects a card whose base is not a repo id, such as a local folder.
    if HUB_ID.fullmatch(str(base["model"])):
        front["base_model"] = str(base["model"])
        front["base_model_relation"] = form.relation
    front["library_name"] = "memretrofit"
    front["pipeline_tag"] = "text-generation"
    front["license"] = licence
    method = str(config.get("method", "unknown"))
    front["tags"] = list(dict.fromkeys(["memretrofit", "memory", "long-context", method, *tags]))
    if any(entry["metrics"] for entry in entries):
        front["model-index"] = [
            {"name": name, "results": [entry for entry in entries if entry["metrics"]]}
        ]
    return front


def _index_entry(text: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    metrics = []
    gain = summary.get("memory_gain")
    if _finite(gain):
        metrics.append(_metric("memory_gain", "Memory gain (nats per token)", gain["mean"]))
    share = summary.get("memory_gain_share")
    if _finite(share):
        label = f"Memory gain (share of {_floor(summary).loss})"
        metrics.append(_metric("memory_gain_share", label, share["mean"]))
    nll = (summary.get("nll") or {}).get("trained")
    if _finite(nll):
        metrics.append(
            _metric("nll", f"Negative log-likelihood {_floor(summary).past}", nll["mean"])
        )
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": "text", "name": text},
        "metrics": metrics,
    }


class _Floor(NamedTuple):
    """What a memory is measured against at the lower end."""

    arm: str
    past: str
    loss: str


def _floor(summary: Mapping[str, Any]) -> _Floor:
    """A window's attention; of a memory beside no window, each segment alone."""
    if "zeroed" in (summary.get("nll") or {}):
        return _Floor("segments alone", "past the first segment", "what segments alone lose")
    return _Floor("window", "past the window", "what the window loses")


def _recall_entries(recall: Mapping[str, Any]) -> list[dict[str, Any]]:
    label = "Recall by generation (share of prompts)"
    return [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": "lessons", "name": kind},
            "metrics": [_metric("recall", label, arms["trained"]["mean"])],
        }
        for kind, arms in recall.items()
    ]


def _metric(kind: str, label: str, value: float) -> dict[str, Any]:
    return {"type": kind, "name": label, "value": round(float(value), 5)}


def _what_it_is(
    config: Mapping[str, Any],
    base: Mapping[str, Any],
    paper: str | None,
    texts: Mapping[str, Any],
    form: Form,
) -> str:
    source = f" ({escape(paper)})" if paper else ""
    window, sinks = config.get("sliding_window"), config.get("num_sink_tokens")
    kept = f" {window} tokens and {sinks} sink tokens are attended exactly." if window else ""
    lines = [
        f"A memory for `{code(base['model'])}`, method `{code(config.get('method'))}`{source}, "
        f"made with memretrofit. {form.holds}{kept}"
    ]
    for text, summary in list(texts.items())[:1]:
        lines.append(_headline(text, summary))
    return "\n\n".join(lines)


def _headline(text: str, summary: Mapping[str, Any]) -> str:
    gain, share = summary.get("memory_gain"), summary.get("memory_gain_share")
    if not _finite(gain):
        return "The memory gain was not measured."
    part = f", {100 * share['mean']:.1f} % of {_floor(summary).loss}" if _finite(share) else ""
    shown = "" if gain["low"] > 0 else " The interval is not above zero: no memory is shown."
    return (
        f"**Memory gain on {escape(text)}: {_interval(gain)} nats per token{part}.** It is the "
        f"rise in negative log-likelihood when the state comes from another text.{shown}"
    )


def _results(texts: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    parts = ["## Results"]
    labels: dict[str, str] = {}
    for summary in texts.values():
        labels.update(summary.get("arms") or {})
    if texts:
        past = _floor(next(iter(texts.values()))).past
        parts.append(
            f"{past[0].upper()}{past[1:]}, nats per token, with bootstrap intervals over "
            "sequences. `KL` is the divergence of full attention from the arm."
        )
    for text, summary in texts.items():
        rows = ["| arm | NLL | KL |", "|---|---|---|"]
        nll, kl = summary.get("nll") or {}, summary.get("kl") or {}
        rows += [
            f"| {escape(labels.get(arm, arm))} | {_interval(value)} | {_interval(kl.get(arm))} |"
            for arm, value in nll.items()
        ]
        differences = [
            ("memory gain (shuffled - trained)", summary.get("memory_gain"), 1, ""),
            (
                f"  its share of {_floor(summary).arm} - full",
                summary.get("memory_gain_share"),
                100,
                " %",
            ),
            ("gap closure", summary.get("gap_closure"), 100, " %"),
            ("write gain (no-write - trained)", summary.get("write_gain"), 1, ""),
        ]
        measured = [
            f"- {label.strip()}: {_interval(value, scale, unit)}"
            for label, value, scale, unit in differences
            if _finite(value)
        ]
        scored = [f"{summary[key]} {key}" for key in ("sequences", "positions") if key in summary]
        if summary.get("level"):
            scored.append(f"{100 * summary['level']:g} % intervals")
        parts.append(f"### {escape(text)}\n\n{', '.join(scored)}".rstrip())
        parts.append("\n".join(rows))
        if measured:
            parts.append("\n".join(measured))
    cost = results.get("cost")
    if cost:
        tokens = results.get("cost_tokens")
        at = f" after {tokens} tokens" if tokens else ""
        rows = [f"| arm | cache bytes{at} | ms per token |", "|---|---|---|"]
        for arm, value in cost.items():
            held, time = value.get("cache_bytes"), value.get("ms_per_token")
            rows.append(
                f"| {escape(labels.get(arm, arm))} | {'n/a' if held is None else f'{held:,}'} "
                f"| {'n/a' if time is None else f'{time:.2f}'} |"
            )
        parts.append("### Cost\n\n" + "\n".join(rows))
    if results.get("report"):
        parts += _tables(results["report"], "###")
    if results.get("tasks"):
        parts += ["### Tasks", *_tables(results["tasks"], "####")]
    return "\n\n".join(parts)


def _tables(report: Mapping[str, Any], level: str) -> list[str]:
    """Notes and tables of a report, under headings of a level."""
    parts = ["\n".join(f"- {escape(note)}" for note in report.get("notes") or [])]
    for entry in report.get("tables") or []:
        parts += [f"{level} {escape(entry['title'])}", escape(entry.get("text") or "")]
        parts.append(table(entry["columns"], entry["rows"]))
    return [part for part in parts if part]


def _use(name: str, base: Mapping[str, Any], form: Form) -> str:
    # a base that came in a package has no folder of its own: its tokenizer lies beside the memory
    packaged = str(base["model"]).startswith("package:")
    tokenizer = name if packaged or form is STANDALONE else str(base["model"])
    return (
        f"{form.load.format(name=name)}"
        f"tokenizer = AutoTokenizer.from_pretrained({tokenizer!r})\n"
        'output = model.generate(**tokenizer("Once upon a time", return_tensors="pt"))'
    )


def _provenance(base: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    rows = ["| what | value |", "|---|---|", f"| base model | `{code(base['model'])}` |"]
    known = [key for key in ("revision", "fingerprint") if base.get(key)]
    rows += [f"| base {key} | `{code(base[key])}` |" for key in known]
    rows += [
        f"| SHA-256 of `{code(file)}` | `{code(digest)}` |"
        for file, digest in sorted(hashes.items())
    ]
    return "\n".join(rows)


def _finite(interval: Any) -> TypeGuard[Mapping[str, float]]:
    return bool(interval) and all(math.isfinite(interval[key]) for key in ("mean", "low", "high"))


def _interval(value: Any, scale: float = 1, unit: str = "") -> str:
    if not _finite(value):
        return "n/a"
    digits = 1 if unit else 4
    mean, low, high = (f"{scale * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean}{unit} ({low} to {high})"


def _yaml(value: Mapping[str, Any]) -> str:
    # A round trip through plain values: configs hold tuples, which safe YAML does not know.
    return yaml.safe_dump(_plain(value), sort_keys=False, allow_unicode=True).rstrip()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
