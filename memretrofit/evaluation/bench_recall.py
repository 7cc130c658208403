"""What attention that recalls costs beside full attention: a decoding step, and in it the choice
of blocks.

As in `bench`, arms share their weights and take turns. A store is filled without reading: a real
prefill of twice what the window keeps, then blocks of random keys and values that are appended at
the slots where a text would have put them, and counters that are moved on behind them. How often
a choice of blocks repeats says nothing about text then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from memretrofit.config import exact_tokens
from memretrofit.evaluation.bench import FULL, Arm, advance, fill_cache, random_ids, take_turns
from memretrofit.evaluation.bench_room import lacking
from memretrofit.evaluation.cost import cache_bytes, prefill
from memretrofit.methods.infllm import InfLLMConfig
from memretrofit.modules.recall import RecallMemory
from memretrofit.modules.rolling import SPARE_COLUMNS
from memretrofit.modules.store import Store
from memretrofit.patching.cache import MemoryLayer
from memretrofit.patching.surgery import attention_ledger_of

BUDGET = InfLLMConfig(sliding_window=508, num_sink_tokens=4, block_size=16, top_k=32)
"""1,024 tokens in all: 512 near ones and 512 that each head fetches."""

SLICE = 8192
"""Tokens of a store that are drawn at once."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a row's stores over all layers."""

    tokens: int
    """Keys and values."""
    index: int
    """Slots and summaries, which lie on the device."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokens: int) -> Sizes:
        """Of `tokens` tokens in the stores of a model that recalls."""
        kept, index = 0, 0
        for memory in memories(model):
            blocks = -(-tokens // memory.block_size)
            numbers = blocks * memory.block_size * memory.state_heads
            numbers *= memory.key_dim + memory.value_dim
            kept += numbers * model.dtype.itemsize
            index += memory.state_nbytes(tokens) - 4 * numbers
        return cls(kept, index)


@torch.no_grad()
def bench_recall(
    base: PreTrainedModel,
    full: Arm,
    contexts: Sequence[int],
    rounds: int,
    method: InfLLMConfig = BUDGET,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Milliseconds of one decoding step after `context` tokens, and bytes on the device, of full
    attention and of `method` with its store beside the model and on disk. An arm whose cache does
    not fit has empty cells; the reasons come second.
    """
    arms = {FULL: full}
    for name, placement in (("infllm", "device"), ("infllm_disk", "disk")):
        on = replace(method, placement=placement)
        arms[name] = Arm(name=name, config=full.config, method=on)
    models = {name: arm.share(base) for name, arm in arms.items()}
    rows, skipped = [], {}
    for context in contexts:
        say(f"recall after {context} tokens")
        rows += _decode_after(models, arms, context, rounds, skipped)
    return rows, skipped


def _decode_after(
    models: Mapping[str, PreTrainedModel],
    arms: Mapping[str, Arm],
    context: int,
    rounds: int,
    skipped: dict[str, str],
) -> list[dict[str, Any]]:
    token, caches = torch.zeros(1, 1, dtype=torch.long), dict[str, DynamicCache]()
    for name, model in models.items():
        if reason := _too_large(model, arms[name], context):
            skipped[f"{name} after {context}"] = reason
        elif arms[name].method is None:
            caches[name] = fill_cache(model, arms[name], context)
        else:
            caches[name] = fill_store_cache(model, context, spare=rounds + SPARE_COLUMNS)
    sizes = {name: (device_bytes(cache), cache_bytes(cache)) for name, cache in caches.items()}

    def step(name: str) -> Callable[[], Any]:
        return lambda: models[name](token, past_key_values=caches[name], use_cache=True)

    calls, rows = {name: step(name) for name in caches}, []
    times = take_turns(calls, rounds, warmup=2) if calls else {}
    for name in arms:
        timing, reference = times.get(name), times.get(FULL)
        on_device, everywhere = sizes.get(name, (None, None))
        rows.append(
            {
                "arm": name,
                "context": context,
                "rounds": rounds,
                "ms_per_token": timing and timing.ms(),
                "full_over_this": reference.over(timing) if reference and timing else None,
                "device_bytes": on_device,
                "cache_bytes": everywhere,
            }
        )
    return rows


@torch.no_grad()
def bench_selection(
    base: PreTrainedModel,
    full: Arm,
    contexts: Sequence[int],
    rounds: int,
    method: InfLLMConfig = BUDGET,
) -> list[dict[str, Any]]:
    """Milliseconds in which one token's query heads choose their blocks, in one layer and in all,
    against the best of all stored keys, as many tokens, by brute force.
    """
    model = Arm(name="infllm", config=full.config, method=method).share(base)
    memory, heads = memories(model)[0], attention_ledger_of(model).sites[0].num_heads
    generator, rows = torch.Generator().manual_seed(0), []
    for context in contexts:
        (store,) = memory.initial_state(1, torch.empty(1, heads, 0, dtype=base.dtype))
        assert isinstance(store, Store)
        store = extended(store, context, 0)
        keys, _ = store.live()
        query = torch.randn(1, heads, 1, memory.key_dim, generator=generator, dtype=base.dtype)
        border = torch.tensor([context - 1])
        wanted = min(context, method.top_k * method.block_size)
        calls: dict[str, Callable[[], Any]] = {
            "blocks": lambda q=query, b=border, s=store: memory.choose(q, b, s),
            "every_key": lambda q=query, k=keys, n=wanted: choose_keys(q, k, n),
        }
        times = take_turns(calls, rounds, warmup=2)
        rows += [
            {
                "choice": name,
                "context": context,
                "rounds": rounds,
                "ms_per_layer": timing.ms(),
                "ms_per_token": len(memories(model)) * timing.ms(),
                "this_over_blocks": timing.over(times["blocks"]),
            }
            for name, timing in times.items()
        ]
    return rows


def choose_keys(query: Tensor, keys: Tensor, count: int) -> Tensor:
    """The `count` tokens with the highest q . k for one token's query [B, H, 1, K] among keys
    [B, G, T, K]: [B, H, count].
    """
    grouped = query[:, :, 0].unflatten(1, (keys.shape[1], -1))  # [B, G, H/G, K]
    return (grouped @ keys.transpose(-1, -2)).flatten(1, 2).topk(count, dim=-1).indices


@torch.no_grad()
def fill_store_cache(
    model: PreTrainedModel, tokens: int, *, spare: int = 0, one_for_all: bool = False
) -> DynamicCache:
    """A cache of `tokens` tokens of a model that recalls, with room for `spare` more in its stores
    (see the head of this file).

    Args:
        one_for_all: layers of one shape share one store, which is for saving: each layer's file
            gets all of it.
    """
    kept = exact_tokens(attention_ledger_of(model).config) or 0
    read = min(tokens, 2 * kept + SPARE_COLUMNS)
    cache, _ = prefill(model, random_ids(model, read), chunk_size=None)
    held: dict[Any, Store] = {}
    for layer in cache.layers:
        if not isinstance(layer, MemoryLayer) or tokens == read:
            continue
        (store,) = layer.state
        assert isinstance(store, Store)
        shape = (store.keys.room.shape[1:], store.values.room.shape[1:])
        if not one_for_all or shape not in held:
            held[shape] = extended(store, tokens - read, layer.folded, spare)
        layer.state = (held[shape],)
    advance(cache, tokens - read)
    return cache


def extended(store: Store, tokens: int, slot: int, spare: int = 0) -> Store:
    """`store` and random tokens at the slots from `slot` on, drawn in slices. Summaries are mean
    keys, which is what a memory keeps of keys at position 0 (`clamp`).
    """
    size = store.block_size
    blocks = -(-(max(store.counts) + tokens + spare) // size)
    for slab in (store.keys, store.values, store.slot_slab, store.summary_slab):
        slab.reserve(blocks)  # in one step: growing would hold the store twice
    generator = torch.Generator().manual_seed(0)
    shapes = [slab.room.shape for slab in (store.keys, store.values)]
    dtype, device = store.keys.room.dtype, store.lengths.device
    for low in range(0, tokens, SLICE):
        count = min(SLICE, tokens - low)
        key, value = (
            torch.randn(*shape[1:3], count, shape[4], generator=generator, dtype=dtype).to(device)
            for shape in shapes
        )
        slots = torch.arange(slot + low, slot + low + count, device=device)
        writes = torch.ones(1, count, dtype=torch.bool, device=device)
        store = store.append(key, value, slots, writes)
        store = store.summarise(lambda keys, slots: keys.float().mean(-2))
    return store


def device_bytes(cache: Cache) -> int:
    """Bytes of a cache that lie on the model's device: all but keys and values in a store
    elsewhere.
    """
    return cache_bytes(cache) - sum(x.nbytes - x.device_nbytes for x in stores(cache))


def stores(cache: Cache) -> list[Store]:
    """What lies in the layers of a cache."""
    layers = [layer for layer in cache.layers if isinstance(layer, MemoryLayer)]
    return [entry for layer in layers for entry in layer.state if isinstance(entry, Store)]


def memories(model: PreTrainedModel) -> list[RecallMemory]:
    """Those of a patched model that recall, by layer."""
    memories = [seam.memory for seam in attention_ledger_of(model).seams.values()]
    return [memory for memory in memories if isinstance(memory, RecallMemory)]


def _too_large(model: PreTrainedModel, arm: Arm, tokens: int) -> str:
    """Why a cache of `tokens` tokens cannot be held; empty where it can."""
    if arm.method is None:
        few = 64
        needed = cache_bytes(fill_cache(model, arm, few)) * tokens // few
        return lacking(needed, 0)
    sizes = Sizes.of(model, tokens)
    if getattr(arm.method, "placement", None) == "disk":
        return lacking(sizes.index, sizes.tokens)
    return lacking(sizes.index + sizes.tokens, 0)
