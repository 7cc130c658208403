"""Prefill arms side by side, each in a process of its own: only there is the peak of resident
memory that arm's alone.

A prefill is one forward over random tokens that keeps one position's logits. Each process then
decodes on the cache that it really filled.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from memretrofit.errors import MemretrofitError
from memretrofit.evaluation.bench import FULL, Arm, random_ids, take_turns
from memretrofit.evaluation.bench_room import peak_bytes, reset_peak
from memretrofit.evaluation.cost import cache_bytes, prefill


def bench_prefill(
    folder: Path,
    arms: Mapping[str, Arm],
    lengths: Sequence[int],
    rounds: Callable[[int], int],
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Tokens per second and peak memory of reading `tokens` in one forward, cache bytes after it,
    and milliseconds per token of decoding on that cache.
    """
    rows = []
    with processes(folder, arms) as ask:
        for name in arms:
            ask(name, 64)  # each process allocates its buffers once
        for tokens in sorted(lengths):
            say(f"prefill of {tokens} tokens")
            found = {name: list[Reading]() for name in arms}
            for _ in range(rounds(tokens)):
                for name in arms:
                    found[name].append(ask(name, tokens))
            for name, readings in found.items():
                pairs = zip(found[FULL], readings, strict=True)
                seconds = statistics.median(r.seconds for r in readings)
                rows.append(
                    {
                        "arm": name,
                        "tokens": tokens,
                        "rounds": len(readings),
                        "tokens_per_second": tokens / seconds,
                        "full_over_this": statistics.median(
                            f.seconds / r.seconds for f, r in pairs
                        ),
                        "peak_bytes": max(r.peak_bytes for r in readings),
                        "cache_bytes": readings[-1].cache_bytes,
                        "ms_per_token_after": statistics.median(r.decode_ms for r in readings),
                    }
                )
    return rows


@dataclass(frozen=True)
class Reading:
    """One prefill: seconds, resident bytes at the peak beyond those before it, bytes of its cache,
    and the time of a decoding step on that cache.
    """

    seconds: float
    peak_bytes: int
    cache_bytes: int
    decode_ms: float


@torch.no_grad()
def read_once(
    model: PreTrainedModel, tokens: int, chunk_size: int | None = None, steps: int = 3
) -> Reading:
    """Prefill `tokens`, so many in one forward (None: all), and decode a few."""
    ids, token = random_ids(model, tokens), torch.zeros(1, 1, dtype=torch.long)
    before = reset_peak()
    start = time.perf_counter()
    cache, _ = prefill(model, ids, chunk_size=chunk_size)
    seconds = time.perf_counter() - start
    peak, size = peak_bytes() - before, cache_bytes(cache)
    after = take_turns(
        {"": lambda: model(token, past_key_values=cache, use_cache=True)}, steps, warmup=1
    )
    return Reading(seconds, peak, size, after[""].ms())


@contextmanager
def processes(
    folder: Path, arms: Mapping[str, Arm], chunk_size: int | None = None
) -> Iterator[Callable[[str, int], Reading]]:
    """One process per arm, idle until asked for a prefill of so many tokens (`read_once`)."""
    context = multiprocessing.get_context("spawn")
    ends, started = {}, []
    for name, arm in arms.items():
        ends[name], theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(theirs, folder, arm, torch.get_num_threads(), chunk_size),
            daemon=True,
        )
        process.start()
        theirs.close()
        started.append(process)

    def ask(name: str, tokens: int) -> Reading:
        try:
            ends[name].send(tokens)
            return Reading(**ends[name].recv())
        except (EOFError, OSError):
            raise MemretrofitError(
                f"the process of arm {name!r} ended while it read {tokens} tokens; if the machine "
                "ran out of memory, choose shorter lengths"
            ) from None

    try:
        yield ask
    finally:
        for end in ends.values():
            end.close()
        for process in started:
            process.join(timeout=10)
            process.terminate()


def _serve(pipe: Any, folder: Path, arm: Arm, threads: int, chunk_size: int | None) -> None:
    torch.set_num_threads(threads)
    model = arm.load(folder)
    while True:
        try:
            tokens = pipe.recv()
        except EOFError:
            return
        pipe.send(asdict(read_once(model, tokens, chunk_size)))
