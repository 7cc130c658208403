"""Measure a patched model on text that it was not trained on, and write down all of it.

Four texts: what was held out of the training sources, and sources that training never saw; each as
plain rows, and as rows in which a passage returns beyond the window. The arms are those of
`arms_of`. The headline is the memory gain: what is lost when each row reads another row's state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memretrofit.config import exact_tokens
from memretrofit.data import Document, RowDataset, load_documents, split_documents
from memretrofit.description import cache_bytes_at
from memretrofit.errors import ConfigError
from memretrofit.evaluation.arms import Arm, arms_of, fresh_values, has_window
from memretrofit.evaluation.cost import decode_ms_per_token
from memretrofit.evaluation.likelihood import Scores, compare_arms
from memretrofit.evaluation.plots import plot_cache_bytes, plot_nll_by_position
from memretrofit.evaluation.statistics import summarise
from memretrofit.files import write_json
from memretrofit.patching.controls import memory_disabled, window_override
from memretrofit.recipe import Recipe
from memretrofit.retrofit import memory_parameters, patched_config

OF_THE_MEMORY = ("trained", "zeroed", "no_write", "shuffled")
"""Arms that differ between two trained memories of one base."""
CACHE_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
COST_TOKENS = 8


def held_out_rows(recipe: Recipe, tokenizer: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Rows [R, T] and the start of the returning passage [R] (T where none does), for each text."""
    section = recipe.evaluate
    length = section.sequence_length or recipe.train.sequence_length
    trained = [d for source in recipe.data.sources for d in load_documents(source)]
    _, held_out = split_documents(trained, recipe.data.held_out, recipe.train.seed)
    other = [d for source in recipe.data.held_out_sources for d in load_documents(source)]
    texts: dict[str, tuple[Tensor, Tensor]] = {}
    for name, documents in (("held-out", held_out), ("other domain", other)):
        for suffix, share in (("", 0.0), (", passage repeated", 1.0)):
            if documents:
                texts[name + suffix] = _rows(documents, tokenizer, length, share, recipe)
    return texts


def _rows(
    documents: Sequence[Document], tokenizer: Any, length: int, share: float, recipe: Recipe
) -> tuple[Tensor, Tensor]:
    section, method = recipe.evaluate, recipe.method
    exact = exact_tokens(method) or 0
    rows = RowDataset(
        documents,
        tokenizer,
        length,
        share,
        section.seed,
        minimum_lag=max(length // 2, exact),
        size=section.rows,
    )
    return rows.rows()


def measure(
    model: Any,
    texts: dict[str, tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    known: Mapping[str, Mapping[str, Scores]] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Scores]]]:
    """Results as `render_card` takes them, and the scores behind them.

    Args:
        model: patched and trained.
        texts: what `held_out_rows` gives.
        recipe: its `evaluate` section says how; its `train.seed` gives the untrained arm.
        known: scores of another memory of the same base on the same texts. What does not depend
            on the memory (`full`, `window`) is taken from there, `untrained` is left out because a
            fresh memory is silent, and KL, which needs the teacher, is not measured again.

    Raises:
        ConfigError: other windows are asked for, of a memory that has none.
    """
    section, config = recipe.evaluate, patched_config(model)
    if section.windows and not has_window(model):
        raise ConfigError(
            f"evaluate.windows={list(section.windows)}: {config} has no window; leave them out"
        )
    exact = exact_tokens(config) or 0
    every = arms_of(model, fresh_values(model, recipe.train.seed))
    own = [name for name in every if known is None or name in OF_THE_MEMORY]
    chosen = {name: every[name] for name in own}
    teacher = chosen.get("full")
    scores: dict[str, dict[str, Scores]] = {}
    results: dict[str, Any] = {"texts": {}}
    for text, (rows, repeat_start) in texts.items():
        scores[text] = compare_arms(
            model,
            rows,
            chosen,
            teacher=teacher,
            first_position=exact,
            batch_size=section.batch_size,
        )
        if known is not None:
            scores[text] |= {n: known[text][n] for n in ("full", "window") if n in known[text]}
        repeats = bool((repeat_start < rows.shape[1]).all())
        results["texts"][text] = summarise(
            scores[text],
            first_position=repeat_start if repeats else exact,
            samples=section.bootstrap_samples,
            seed=section.seed,
        ).to_dict()
    if section.windows:
        results["windows"] = _other_windows(model, texts, recipe, every)
    return results, scores


def _other_windows(model: Any, texts: Any, recipe: Recipe, arms: dict[str, Arm]) -> dict[str, Any]:
    """The plain held-out text again, at windows that are not the method's own."""
    section = recipe.evaluate
    sinks = patched_config(model).num_sink_tokens  # type: ignore[attr-defined]
    text, (rows, _) = next(iter(texts.items()))
    found: dict[str, Any] = {"text": text}
    some = {name: arms[name] for name in ("full", "window", "trained", "shuffled")}
    for window in section.windows:
        with window_override(model, sliding_window=window, num_sink_tokens=sinks):
            scores = compare_arms(
                model,
                rows,
                some,
                teacher=None,
                first_position=window + sinks,
                batch_size=section.batch_size,
            )
        found[str(window)] = summarise(
            scores,
            first_position=window + sinks,
            samples=section.bootstrap_samples,
            seed=section.seed,
        ).to_dict()
    return found


def measure_cost(model: Any, ids: Tensor) -> tuple[dict[str, Any], int]:
    """Cache bytes and decode milliseconds of base and patched model, after reading ids [1, T]."""
    before, after = cache_bytes_at(model, ids.shape[1])
    patched = decode_ms_per_token(model, ids, COST_TOKENS)
    with memory_disabled(model):
        base = decode_ms_per_token(model, ids, COST_TOKENS)
    return {
        "full": {"cache_bytes": before, "ms_per_token": base},
        "trained": {"cache_bytes": after, "ms_per_token": patched},
    }, ids.shape[1]


def _write_files(
    model: Any, path: Path, results: dict[str, Any], scores: dict[str, dict[str, Scores]]
) -> None:
    """The report at `path`, and `nll.png` and `cache.png` beside it."""
    config = patched_config(model)
    window = exact_tokens(config) or 0
    bytes_at = [cache_bytes_at(model, tokens) for tokens in CACHE_LENGTHS]
    results["cache_bytes"] = {
        "tokens": list(CACHE_LENGTHS),
        "full": [before for before, _ in bytes_at],
        "patched": [after for _, after in bytes_at],
    }
    text = next(iter(scores))
    plot_nll_by_position(scores[text], path.parent / "nll.png", window, title=f"{text} text")
    plot_cache_bytes(
        CACHE_LENGTHS,
        {"full": results["cache_bytes"]["full"], "trained": results["cache_bytes"]["patched"]},
        path.parent / "cache.png",
    )
    write_json(path, results)


def _check_split(trained: Mapping[str, Any] | None, recipe: Recipe) -> None:
    """Refuse to call held out what another split trained on."""
    if trained is None:
        return
    now = recipe.to_dict()
    fixed = [("data", "sources"), ("data", "held_out"), ("train", "seed")]
    differ = [f"{a}.{b}" for a, b in fixed if trained[a][b] != now[a][b]]
    if set(now["data"]["held_out_sources"]) & set(trained["data"]["sources"]):
        differ.append("data.held_out_sources")
    if differ:
        raise ConfigError(
            f"{', '.join(differ)} differ from the recipe that trained this memory, so that "
            "held-out text may have been trained on. Measure with the run's own recipe."
        )


def evaluate(
    directory: Path,
    recipe: Recipe,
    output: Path | None = None,
    *,
    known: Mapping[str, Mapping[str, Scores]] | None = None,
) -> tuple[dict[str, Any], dict[str, dict[str, Scores]]]:
    """Measure the model saved in `directory` by the data and evaluate sections of `recipe`.

    Writes the report to `output` (default: `report.json` in `directory`, and then the model card,
    which carries it) and its pictures beside it. Returns the results,
    and the scores behind them, which another model's evaluation may take as `known`.

    Raises:
        CheckpointError: the folder holds no usable memory.
        ConfigError: the text is missing, or was trained on.
    """
    from memretrofit.hub import from_pretrained, read_record, tokenizer_of, write_card

    output = directory / "report.json" if output is None else output
    folder = output.parent
    try:  # before the work, not after it
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {folder}: {error}") from error
    record = read_record(directory)
    _check_split(record.recipe, recipe)
    tokenizer = tokenizer_of(record.base)
    model = from_pretrained(directory).eval()
    texts = held_out_rows(recipe, tokenizer)
    with torch.no_grad():
        results, scores = measure(model, texts, recipe, known=known)
        rows = next(iter(texts.values()))[0]
        results["cost"], results["cost_tokens"] = measure_cost(model, rows[:1])
    results["trained_parameters"] = sum(p.numel() for p in memory_parameters(model).values())
    _write_files(model, output, results, scores)
    if output.resolve() == (directory / "report.json").resolve():
        write_card(directory)
    return results, scores
