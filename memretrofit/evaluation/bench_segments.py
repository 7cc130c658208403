"""What it costs to read a long text in segments, beside full attention and attention over a window.

All arms read the text in pieces of `PIECE` tokens, as a user would who has no room for the hidden
states of all of it. Each has a process of its own, as in `bench_prefill`; they take turns, and
ratios are taken within a round. Full attention, whose time grows with the square of the length, is
left out of lengths beyond the one that is asked for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from memretrofit.evaluation.bench import FULL, Arm
from memretrofit.evaluation.bench_prefill import Reading, processes
from memretrofit.methods.armt import ARMTConfig

PIECE = 4096
"""Tokens of one forward."""
SEGMENTS = "armt"
BESIDE = (FULL, "ahn")
"""What an arm that reads in segments is compared with."""


def segment_arms(arms: Mapping[str, Arm], segment_length: int) -> dict[str, Arm]:
    """Full attention and AHN of `arms`, and ARMT with segments of so many tokens."""
    method = ARMTConfig(segment_length=segment_length)
    found = {name: arms[name] for name in BESIDE}
    return found | {SEGMENTS: Arm(name=SEGMENTS, config=arms[FULL].config, method=method)}


def bench_segments(
    folder: Path,
    arms: Mapping[str, Arm],
    lengths: Sequence[int],
    rounds: Callable[[int], int],
    *,
    full_most: int,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Tokens per second and peak memory of reading each of `lengths`, cache bytes after it, and
    milliseconds of a decoding step then; and why full attention has no row at some lengths.

    `over_shortest` is the time of a token over that at the shortest length: 1 where time is linear
    in the length. `this_over_armt` is an arm's time over that of the arm that reads in segments.

    Args:
        arms: as `segment_arms` gives them.
        rounds: tokens -> how often each arm reads them.
        full_most: tokens that full attention reads at most.
    """
    rows: list[dict[str, Any]] = []
    first: dict[str, float] = {}
    with processes(folder, arms, PIECE) as ask:
        for name in arms:
            ask(name, 64)  # each process allocates its buffers once
        for tokens in sorted(lengths):
            chosen = [name for name in arms if name != FULL or tokens <= full_most]
            say(f"segments: {tokens} tokens by {', '.join(chosen)}")
            found = {name: list[Reading]() for name in chosen}
            for _ in range(rounds(tokens)):
                for name in chosen:
                    found[name].append(ask(name, tokens))
            for name, readings in found.items():
                seconds = statistics.median(reading.seconds for reading in readings)
                first.setdefault(name, seconds / tokens)
                rows.append(
                    {
                        "arm": name,
                        "tokens": tokens,
                        "rounds": len(readings),
                        "tokens_per_second": tokens / seconds,
                        "full_over_this": _over(found.get(FULL), readings),
                        "this_over_armt": _over(readings, found[SEGMENTS]),
                        "over_shortest": seconds / tokens / first[name],
                        "peak_bytes": max(reading.peak_bytes for reading in readings),
                        "cache_bytes": readings[-1].cache_bytes,
                        "ms_per_token_after": statistics.median(x.decode_ms for x in readings),
                    }
                )
    beyond = [tokens for tokens in sorted(lengths) if tokens > full_most]
    reason = f"reads at most {full_most} tokens here, where time grows with the square"
    return rows, {f"{FULL} over {tokens} tokens": reason for tokens in beyond}


def _over(mine: Sequence[Reading] | None, theirs: Sequence[Reading]) -> float | None:
    """Median over rounds of one arm's time by the other's in the same round."""
    if mine is None:
        return None
    return statistics.median(a.seconds / b.seconds for a, b in zip(mine, theirs, strict=True))
