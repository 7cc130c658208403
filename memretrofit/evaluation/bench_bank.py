"""What a bank's rows cost: to look them up in each tier, to open a bank that is larger than memory,
and to train on it.

Lookups take turns, as in `bench`, with the same numbers in the same round for all tiers. `gather`
is torch's own embedding over the tensor that tier `ram` holds. Numbers are drawn evenly, which is
the worst for what is kept, or as words of a text are (the r-th most frequent as 1 / r), scattered
over the table. A cold lookup comes after the system was asked to drop the file's pages.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from memretrofit.errors import ConfigError
from memretrofit.evaluation.bench import take_turns
from memretrofit.evaluation.bench_room import (
    bytes_since,
    forget_pages,
    lacking,
    peak_bytes,
    reset_peak,
    storage_bytes,
)
from memretrofit.hub.bank_file import open_bank, write_bank
from memretrofit.modules.table import FreshRows, HeldRows, Table

NAME = "rows"
WIDTH = 256
"""Numbers of a row of 512 bytes, in bfloat16."""
PER_TOKEN = 48
"""Rows that a token looks up."""
HOT_SHARE = 16
"""The hot rows are one in so many."""
GATHER, RAM, COLD = "gather", "ram", "disk, cold"
LARGE = 32 << 30
"""Bytes of a bank that is larger than the memory of most machines."""


@torch.no_grad()
def bench_lookup(
    rows: int,
    tokens: Sequence[int],
    rounds: int,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Microseconds per token of looking up `PER_TOKEN` rows for each of `tokens` tokens at once,
    and the ratios to a plain gather and to a table in RAM. `hit_rate`: rows that were still hot.

    Raises:
        ConfigError: memory or disk have no room for the rows. Nothing was written.
    """
    source = FreshRows(rows, (WIDTH,), torch.bfloat16, std=1.0)
    nbytes = rows * WIDTH * source.dtype.itemsize
    _check_room(nbytes + nbytes // HOT_SHARE, nbytes)
    found = []
    with _folder() as name:
        say(f"writing a bank of {nbytes / 2**20:,.0f} MiB")
        write_bank({NAME: source}, name)
        held = HeldRows.copy_of(open_bank(name)[NAME], "ram")
        for count in tokens:
            for draw in ("even", "words"):
                say(f"looking up rows of {count} tokens, {draw}")
                found += _warm(held, Path(name), count, draw, rounds)
            found.append(_cold(held, Path(name), count, rounds))
    return found


def _warm(
    held: HeldRows, folder: Path, tokens: int, draw: str, rounds: int
) -> list[dict[str, Any]]:
    warmup = 2
    drawn = _draws(held.rows, tokens, draw, rounds + warmup)
    tables = {
        RAM: Table(held),
        "disk": Table(open_bank(folder)[NAME]),
        "disk, hot": Table(open_bank(folder)[NAME], hot_bytes=held.nbytes // HOT_SHARE),
    }
    lookups: dict[str, Callable[[Tensor], Tensor]] = {
        GATHER: lambda index: functional.embedding(index, held.tensor),
        **{
            name: lambda index, table=table: table(index, dtype=held.dtype)
            for name, table in tables.items()
        },
    }
    for lookup in lookups.values():
        lookup(torch.cat(drawn))  # the pages of all rows, and hot ones where there is room
    for table in tables.values():
        table.hits = table.misses = 0
    turns = {name: iter(drawn) for name in lookups}
    times = take_turns(
        {name: lambda n=name, look=look: look(next(turns[n])) for name, look in lookups.items()},
        rounds,
        warmup,
    )
    return [
        {
            "tier": name,
            "rows": held.rows,
            "draw": draw,
            "tokens": tokens,
            "rounds": rounds,
            "us_per_token": 1000 * timing.ms() / tokens,
            "over_gather": timing.over(times[GATHER]),
            "over_ram": timing.over(times[RAM]),
            "hit_rate": _hit_rate(tables.get(name)),
        }
        for name, timing in times.items()
    ]


def _hit_rate(table: Table | None) -> float | None:
    if table is None or not table.hot_bytes:
        return None
    return table.hits / (table.hits + table.misses)


def _cold(held: HeldRows, folder: Path, tokens: int, rounds: int) -> dict[str, Any]:
    ram, seconds, over_gather, over_ram = Table(held), [], [], []
    for index in _draws(held.rows, tokens, "even", rounds):
        # pages that are mapped and were touched cannot be dropped: each round opens the bank anew
        for path in folder.glob("*.safetensors"):
            forget_pages(path)
        disk = Table(open_bank(folder)[NAME])
        cold = _seconds(lambda index=index, table=disk: table(index, dtype=held.dtype))
        warm = _seconds(lambda index=index: ram(index, dtype=held.dtype))
        plain = _seconds(lambda index=index: functional.embedding(index, held.tensor))
        seconds.append(cold)
        over_ram.append(cold / warm)
        over_gather.append(cold / plain)
    return {
        "tier": COLD,
        "rows": held.rows,
        "draw": "even",
        "tokens": tokens,
        "rounds": rounds,
        "us_per_token": 1e6 * statistics.median(seconds) / tokens,
        "over_gather": statistics.median(over_gather),
        "over_ram": statistics.median(over_ram),
        "hit_rate": None,
    }


def _draws(rows: int, tokens: int, draw: str, count: int) -> list[Tensor]:
    """Numbers [tokens, PER_TOKEN] of so many rounds."""
    generator = torch.Generator().manual_seed(0)
    shape = (tokens, PER_TOKEN)
    if draw == "even":
        return [torch.randint(rows, shape, generator=generator) for _ in range(count)]
    place = torch.randperm(rows, generator=generator)
    ranks = [
        (torch.rand(shape, generator=generator, dtype=torch.float64) * math.log(rows)).exp()
        for _ in range(count)
    ]
    return [place[rank.long().clamp_(1, rows) - 1] for rank in ranks]


def bench_large_bank(
    steps: int,
    *,
    nbytes: int = LARGE,
    opened: int = 4096,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """A bank of `nbytes` bytes of zeros, which take no room on disk: milliseconds to `open` it, to
    let at most `opened` rows train (`prepare`), and of a training `step` that looks up the rows of
    eight tokens, half of them open: forward, backward and SparseAdam. `peak_bytes`: resident
    memory at the peak beyond that before it was opened.
    """
    width = WIDTH * 4  # float32: the delta is of the same size as its rows
    rows, batch = nbytes // (4 * width), 8 * PER_TOKEN
    with _folder() as name:
        say(f"a bank of {nbytes / 2**30:,.0f} GiB")
        write_bank({NAME: FreshRows(rows, (width,))}, name)
        held = sum(path.stat().st_size for path in Path(name).glob("*.safetensors"))
        before, read = reset_peak(), storage_bytes()
        banks: list[Any] = []
        spent = {"open": [_seconds(lambda: banks.append(open_bank(name)))]}
        table = Table(banks[0][NAME])
        numbers = torch.randint(rows, (opened,))
        spent["prepare"] = [_seconds(lambda: table.open(numbers))]
        delta = table.delta
        assert delta is not None
        optimizer = torch.optim.SparseAdam([delta], lr=0.01)

        def step() -> None:
            mine = numbers[torch.randint(len(numbers), (batch // 2,))]
            others = torch.randint(rows, (batch // 2,))
            optimizer.zero_grad()
            (table(torch.cat([mine, others])) - 1).square().mean().backward()
            optimizer.step()

        spent["step"] = [_seconds(step) for _ in range(steps)]
        peak = peak_bytes() - before
        return [
            {
                "phase": phase,
                "opened": table.opened,
                "rounds": len(seconds),
                "ms": 1000 * statistics.median(seconds),
                "file_bytes": held,
                "delta_bytes": delta.nbytes,
                "peak_bytes": peak,
                "read_bytes": bytes_since(read),
            }
            for phase, seconds in spent.items()
        ]


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _folder() -> AbstractContextManager[str]:
    return tempfile.TemporaryDirectory()


def _check_room(memory: int, disk: int) -> None:
    if reason := lacking(memory, disk):
        raise ConfigError(
            f"A bank to look rows up in {reason} Choose fewer rows (--bank-rows), or set TMPDIR to "
            "a folder on a larger disk."
        )
