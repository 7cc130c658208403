"""A text of many tokens that lies on disk: what it costs to open it, and to ask it something.

Its layers hold one store's worth of random keys and values (`bench_recall`), saved and loaded as
any conversation is.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from memretrofit.errors import ConfigError
from memretrofit.evaluation.bench import random_ids
from memretrofit.evaluation.bench_recall import (
    BUDGET,
    Sizes,
    device_bytes,
    fill_store_cache,
    memories,
    stores,
)
from memretrofit.evaluation.bench_room import bytes_since, forget_pages, lacking, storage_bytes
from memretrofit.evaluation.cost import last_logits_arguments
from memretrofit.hub.memory_file import load_memory, save_memory
from memretrofit.hub.memory_record import read_remembered
from memretrofit.methods.infllm import InfLLMConfig
from memretrofit.retrofit import patch

QUESTION = 16
"""Tokens that are asked of a saved text before its first answer."""


@torch.no_grad()
def bench_disk(
    base: PreTrainedModel,
    tokens: int,
    steps: int,
    method: InfLLMConfig = BUDGET,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """A saved text of `tokens` tokens in a temporary folder, dropped from the system's cache of
    files where that can be asked for. Milliseconds and bytes of four phases: to `save` it, to
    `open` it, to `ask` a question and have the first token, and of each `token` after that.

    `fetched_bytes` are the keys and values of the blocks that were fetched (`Store.reads`);
    `read_bytes` what the process had read from storage, whole pages, where the system tells.

    Raises:
        ConfigError: memory or disk have no room for it. Nothing was written.
    """
    model = copy.deepcopy(base).bfloat16()
    patch(model, replace(method, placement="disk"))
    _check_room(model, tokens)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "text.mem"
        say(f"saving {tokens} tokens to {folder}")
        cache = fill_store_cache(model, tokens, one_for_all=True)
        caches: list[Cache] = [cache]
        ids = random_ids(model, QUESTION + steps)
        asked, *answers = ids.split([QUESTION, *[1] * steps], dim=1)

        def ask(ids: Tensor) -> None:
            last = last_logits_arguments(model)
            model(ids, past_key_values=caches[0], use_cache=True, **last)

        saved = Cost.of(lambda: save_memory(caches.pop(), model, folder), caches)
        record = read_remembered(folder)
        for file in record.files:
            forget_pages(record.path(file))
        say("opening it")
        del cache
        opened = Cost.of(lambda: caches.append(load_memory(model, folder)), caches)
        first = Cost.of(lambda: ask(asked), caches)
        each = [Cost.of(lambda ids=ids: ask(ids), caches) for ids in answers]
        phases = {"save": [saved], "open": [opened], "ask": [first], "token": each}
        return [
            {
                "phase": phase,
                "tokens": tokens,
                "rounds": len(costs),
                "ms": 1000 * statistics.median(cost.seconds for cost in costs),
                "fetched_bytes": statistics.median(cost.fetched for cost in costs),
                "read_bytes": _median([cost.read for cost in costs]),
                "device_bytes": costs[-1].held,
                "file_bytes": record.nbytes(),
            }
            for phase, costs in phases.items()
        ]


@dataclass(frozen=True)
class Cost:
    """Of one call: seconds, bytes of fetched blocks, bytes read from storage, and bytes that the
    cache then holds on the device.
    """

    seconds: float
    fetched: int
    read: int | None
    held: int

    @classmethod
    def of(cls, call: Callable[[], Any], caches: Sequence[Cache]) -> Cost:
        """Of a call that goes on from `caches`, if there is one."""
        fetched, read, start = _fetched(caches), storage_bytes(), time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        held = sum(device_bytes(cache) for cache in caches)
        return cls(seconds, max(0, _fetched(caches) - fetched), bytes_since(read), held)


def _fetched(caches: Sequence[Cache]) -> int:
    return sum(store.reads.nbytes for cache in caches for store in stores(cache))


def _median(found: Sequence[int | None]) -> float | None:
    known = [x for x in found if x is not None]
    return statistics.median(known) if known else None


def _check_room(model: PreTrainedModel, tokens: int) -> None:
    sizes = Sizes.of(model, tokens)
    layers = len(memories(model))
    # the index is read into memory, where half as much again is held when it grows; on disk are
    # the saved files and the one store that they were written from
    written = (sizes.tokens + sizes.index) + sizes.tokens // layers
    if reason := lacking(sizes.index + sizes.index // 2, written):
        raise ConfigError(
            f"A saved text of {tokens} tokens {reason} Choose fewer tokens (--disk-tokens), or set "
            "TMPDIR to a folder on a larger disk."
        )
