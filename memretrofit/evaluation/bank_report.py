"""Measure a bank: what it knows (`bank_recall`), what it still knows of earlier lessons
(`bank_retention`), and what it did to everything else.

Forgetting is the perplexity of prose that neither training nor calibration saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from memretrofit.data import RowDataset, load_documents, split_documents
from memretrofit.data.lessons import Lesson, read_lessons
from memretrofit.errors import ConfigError
from memretrofit.evaluation.bank_reads import measure_reads, reads_table
from memretrofit.evaluation.bank_recall import (
    ANSWER_TOKENS,
    ARMS,
    KINDS,
    measure_recall,
    words_of,
)
from memretrofit.evaluation.bank_retention import (
    lessons_file,
    measure_retention,
    retention_table,
)
from memretrofit.evaluation.likelihood import Arm, compare_arms
from memretrofit.evaluation.statistics import paired_bootstrap
from memretrofit.files import write_json, write_text
from memretrofit.markdown import escape, paragraphs, table
from memretrofit.modules.bank import Tokens
from memretrofit.patching.controls import memory_disabled, route_pinned, state_shuffled
from memretrofit.patching.ffn import bank_of
from memretrofit.patching.wrapping import unwrapped
from memretrofit.recipe import Recipe
from memretrofit.training.writing import ROWS, writing_of

BASELINES = {
    "lora_trainable": "as many trainable parameters",
    "lora_active": "as many active parameters",
}
PROSE_TOKENS = 128


def measure_prose(model: Any, rows: Tensor, section: Any, console: Console) -> dict[str, Any]:
    """Mean negative log-likelihood of prose [R, T] in every arm, and its rise over the base."""
    inner = unwrapped(model)
    wrong = bank_of(inner).wrong_routes(Tokens(ids=rows[:1], new=rows.shape[1]))
    arms: dict[str, Arm] = {
        "base": lambda: memory_disabled(inner),
        "trained": nullcontext,
    }
    if wrong is not None:
        arms["misrouted"] = lambda: route_pinned(inner, wrong)
    elif bank_of(inner).addresses(Tokens(ids=rows[:1], new=rows.shape[1])):
        arms["misrouted"] = lambda: state_shuffled(inner)
    return measure_prose_arms(model, rows, arms, section, console)


def measure_prose_arms(
    model: Any, rows: Tensor, arms: Mapping[str, Arm], section: Any, console: Console
) -> dict[str, Any]:
    """The same for other arms, of which one is `base`."""
    scores = compare_arms(
        model,
        rows,
        arms,
        teacher=None,
        first_position=0,
        batch_size=section.batch_size,
        progress=console.is_terminal,
    )
    means = {name: arm.nll.mean(-1) for name, arm in scores.items()}
    found: dict[str, Any] = {"sequences": len(rows), "tokens": rows.shape[1]}
    for name, values in means.items():
        rise = paired_bootstrap(
            values, means["base"], samples=section.bootstrap_samples, seed=section.seed
        )
        untouched = (scores[name].nll == scores["base"].nll).all(-1).float().mean()
        found[name] = {
            "nll": float(values.mean()),
            "perplexity": float(values.mean().exp()),
            "rise": rise._asdict(),
            "perplexity_ratio": float((values.mean() - means["base"].mean()).exp()),
            "untouched_sequences": float(untouched),
        }
        console.print(f"prose, {ARMS[name]}: perplexity {found[name]['perplexity']:.3f}")
    return found


def held_out_prose(recipe: Recipe, tokenizer: Any) -> Tensor:
    """[R, T] rows of the part of the sources that training and calibration never read."""
    documents = [d for source in recipe.data.sources for d in load_documents(source)]
    _, held_out = split_documents(documents, recipe.data.held_out, recipe.train.seed)
    section = recipe.evaluate
    rows = RowDataset(
        held_out, tokenizer, PROSE_TOKENS, 0.0, section.seed, size=section.rows
    ).rows()
    return rows[0]


def evaluate_bank(directory: Path, recipe: Recipe, output: Path) -> dict[str, Any]:
    """Measure the bank saved in `directory`, and write `output` (JSON), a `.md` beside it and, for
    the directory's own report, the model card.

    Raises:
        CheckpointError: the folder holds no usable memory.
        ConfigError: lessons or prose are missing, or the report cannot be written.
    """
    from memretrofit.hub import from_pretrained, read_record, tokenizer_of

    if recipe.data.lessons is None:
        raise ConfigError(f"{directory}: its recipe names no lessons (data.lessons) to ask about")
    console = Console(stderr=True, highlight=False)
    lessons = read_lessons(Path(recipe.data.lessons))
    tokenizer = tokenizer_of(read_record(directory).base)
    model = from_pretrained(directory).eval()
    with torch.no_grad():
        prose = held_out_prose(recipe, tokenizer)
        results: dict[str, Any] = {
            "lessons": len(lessons),
            "lessons_file": lessons_file(Path(recipe.data.lessons)),
            "recall": measure_recall(model, tokenizer, lessons, console),
            "prose": measure_prose(model, prose, recipe.evaluate, console),
            "access": {
                words: measure_reads(model, texts)
                for words, texts in (
                    ("prompts of the lessons", _prompt_ids(tokenizer, lessons)),
                    ("prose", prose),
                )
            },
            "sizes": sizes(model, recipe),
        }
        if recipe.train.inject.earlier:
            results["retention"] = measure_retention(model, tokenizer, recipe.train.inject, console)
    write_results(directory, results, output)
    return results


def _prompt_ids(tokenizer: Any, lessons: Sequence[Lesson]) -> list[Tensor]:
    contexts = [context for lesson in lessons for context in lesson.contexts]
    return [torch.tensor(tokenizer(context)["input_ids"]) for context in contexts]


def write_results(directory: Path, results: dict[str, Any], output: Path) -> None:
    """Write what was measured of a bank, in words too, and its card. See `evaluate_bank`."""
    from memretrofit.hub import write_card

    notes, tables = summary(results)
    results["report"] = {"notes": notes, "tables": tables}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, results)
    write_text(output.with_suffix(".md"), paragraphs([f"# {directory.name}", *_markdown(results)]))
    if output.resolve() == (directory / "report.json").resolve():
        write_card(directory)


def sizes(model: Any, recipe: Recipe) -> dict[str, int]:
    """Rows and numbers that were trained, and what the bank could hold."""
    inner = unwrapped(model)
    tables = [table for _, table in bank_of(inner).each_table()]
    trained = writing_of(recipe.train.inject).parameters(inner).items()
    return {
        "rows": sum(table.rows for table in tables),
        "opened_rows": sum(table.opened for table in tables),
        "row_parameters": sum(p.numel() for name, p in trained if name.endswith(ROWS)),
        "dense_parameters": sum(p.numel() for name, p in trained if not name.endswith(ROWS)),
    }


def summary(results: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """What a card and a report say: sentences, and tables as `markdown.table` takes them."""
    arms = [arm for arm in ARMS if all(arm in entry for entry in results["recall"].values())]
    recalled = {
        "title": "Recall by generation",
        "text": f"{results['lessons']} lessons; the answer stands in {ANSWER_TOKENS} tokens that "
        "follow the prompt. Wilson's intervals. A prompt that reads no trained row at its end "
        "abstains.",
        "columns": ["prompts", "number", *(ARMS[arm] for arm in arms), "read at their end"],
        "rows": [
            [
                KINDS[kind],
                entry["prompts"],
                *(words_of(entry[arm]) for arm in arms),
                "n/a" if entry["reading"] is None else f"{100 * entry['reading']:.0f} %",
            ]
            for kind, entry in results["recall"].items()
        ],
    }
    prose = results["prose"]
    forgotten = {
        "title": "Prose that nothing was trained on",
        "text": f"{prose['sequences']} rows of {prose['tokens']} tokens.",
        "columns": ["arm", "perplexity", "ratio to base", "rise in nats", "rows without a change"],
        "rows": [[ARMS[arm], *_prose_row(prose[arm])] for arm in arms if arm in prose],
    }
    size = results["sizes"]
    for name, entry in (results.get("baselines") or {}).items():
        words = f"LoRA, {BASELINES[name]} (rank {entry['rank']})"
        recalled["columns"].append(words)
        for row, kind in zip(recalled["rows"], results["recall"], strict=True):
            row.append(words_of(entry["recall"][kind]))
        forgotten["rows"].append([words, *_prose_row(entry["prose"])])
    notes = [
        f"{size['opened_rows']:,} of {size['rows']:,} rows were trained: "
        f"{size['row_parameters']:,} numbers, and {size['dense_parameters']:,} dense parameters."
    ]
    access = results.get("access")
    earlier = results.get("retention")
    further = [retention_table(earlier)] if earlier else []
    return notes, [recalled, *further, forgotten, *([reads_table(access)] if access else [])]


def _prose_row(entry: Mapping[str, Any]) -> list[str]:
    return [
        f"{entry['perplexity']:.3f}",
        f"{entry['perplexity_ratio']:.4f}",
        words_of(entry["rise"], 4),
        f"{100 * entry['untouched_sequences']:.1f} %",
    ]


def _markdown(results: Mapping[str, Any]) -> Iterator[str]:
    yield "\n".join(f"- {escape(note)}" for note in results["report"]["notes"])
    for entry in results["report"]["tables"]:
        yield f"## {escape(entry['title'])}"
        yield escape(entry["text"])
        yield table(entry["columns"], entry["rows"])
