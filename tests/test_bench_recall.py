"""The rows of what recalls, on a tiny model: a filled cache is one that read, what is counted is
what was fetched, and what does not fit is said.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from memretrofit.errors import ConfigError
from memretrofit.evaluation.bench import FULL, Arm, make_arms, random_ids
from memretrofit.evaluation.bench_disk import bench_disk
from memretrofit.evaluation.bench_recall import (
    BUDGET,
    Sizes,
    bench_recall,
    bench_selection,
    choose_keys,
    device_bytes,
    extended,
    fill_store_cache,
    memories,
    stores,
)
from memretrofit.evaluation.cost import cache_bytes, prefill
from memretrofit.methods.infllm import InfLLMConfig
from memretrofit.modules.store import Store

METHOD = InfLLMConfig(sliding_window=12, num_sink_tokens=2, block_size=4, top_k=3)
TOKENS = 1000
"""More than the real prefill of a filled cache."""
TOO_MANY = 10**13
"""Tokens for which no machine has room."""


def build() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=4096,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def arm(method: InfLLMConfig = METHOD):
    model = build()
    return Arm(name="infllm", config=model.config, method=method).share(model)


def full():
    base = build()
    return base, make_arms(base.config, 12, 2)[0][FULL]


def test_the_budget_is_1024_tokens():
    fetched = BUDGET.top_k * BUDGET.block_size
    assert BUDGET.sliding_window + BUDGET.num_sink_tokens + fetched == 1024


@torch.no_grad()
@pytest.mark.parametrize("placement", ["device", "disk"])
def test_a_filled_cache_is_the_shape_of_one_that_read_everything(placement):
    """The same slots, blocks, columns and counters, now and as it goes on, so that a step does the
    same work.
    """
    model, tokens = arm(replace(METHOD, placement=placement)), TOKENS
    read, _ = prefill(model, random_ids(model, tokens), chunk_size=None)
    filled = fill_store_cache(model, tokens)
    for _ in range(METHOD.block_size + 1):
        for mine, theirs in zip(filled.layers, read.layers, strict=True):
            counters = ("seen", "folded", "first", "pinned")
            assert [getattr(mine, c) for c in counters] == [getattr(theirs, c) for c in counters]
            assert mine.keys.shape == theirs.keys.shape
        for mine, theirs in zip(stores(filled), stores(read), strict=True):
            assert (mine.counts, mine.summarised) == (theirs.counts, theirs.summarised)
            count = mine.block_count()
            assert torch.equal(mine.slots[:count], theirs.slots[:count])
        for cache in (read, filled):
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)


@torch.no_grad()
def test_summaries_are_those_that_the_memory_makes():
    """The mean key; the first key of a block would not do."""
    model = arm()
    read, _ = prefill(model, random_ids(model, 100), chunk_size=None)
    for store in stores(read) + stores(fill_store_cache(model, TOKENS)):
        (blocks,) = store.summarised
        keys, made = store.keys.blocks(0, blocks), store.summaries[:blocks]
        assert torch.allclose(made, keys.mean(-2), atol=1e-6, rtol=0)
        assert not torch.allclose(made, keys[..., 0, :], atol=1e-2)


@torch.no_grad()
def test_device_bytes_leave_out_keys_and_values_on_disk_alone():
    model, tokens = arm(), TOKENS
    on_disk = fill_store_cache(arm(replace(METHOD, placement="disk")), tokens)
    beside = fill_store_cache(model, tokens)
    assert device_bytes(beside) == cache_bytes(beside) > Sizes.of(model, tokens - 20).tokens
    kept = sum(store.keys.nbytes + store.values.nbytes for store in stores(on_disk))
    assert device_bytes(on_disk) == cache_bytes(on_disk) - kept


def test_choosing_blocks_of_one_token_is_choosing_keys():
    """Then both forms are one search: the same tokens, and not those of another query."""
    model = arm(replace(METHOD, block_size=1, top_k=7))
    memory, heads = memories(model)[0], 4
    (store,) = memory.initial_state(1, torch.empty(1, heads, 0))
    assert isinstance(store, Store)
    store = extended(store, 50, 0)
    query = torch.randn(2, heads, 1, memory.key_dim)
    keys, _ = store.live()

    def by_blocks(q: torch.Tensor) -> torch.Tensor:
        return memory.choose(q, torch.tensor([49]), store)[:, :, 0]

    one, other = (query[i : i + 1] for i in range(2))
    chosen = torch.zeros(1, heads, 50, dtype=torch.bool)
    chosen.scatter_(-1, choose_keys(one, keys, 7), value=True)
    assert torch.equal(by_blocks(one), chosen)
    assert not torch.equal(by_blocks(other), chosen)


def test_rows_of_every_context_and_arm():
    base, reference = full()
    rows, skipped = bench_recall(base, reference, [64, TOKENS], 2, METHOD)
    names = ["full", "infllm", "infllm_disk"]
    assert [(r["arm"], r["context"]) for r in rows] == [(n, c) for c in (64, TOKENS) for n in names]
    assert skipped == {}
    assert all(value > 0 for row in rows for value in row.values() if not isinstance(value, str))
    held = {(r["arm"], r["context"]): r for r in rows}
    assert all(held["full", c]["full_over_this"] == 1 for c in (64, TOKENS))
    long, short = (held["full", context]["device_bytes"] for context in (TOKENS, 64))
    assert 64 * long == TOKENS * short
    disk = held["infllm_disk", TOKENS]
    assert disk["device_bytes"] < held["infllm", TOKENS]["device_bytes"] < disk["cache_bytes"] * 2
    chosen = bench_selection(base, reference, [64, TOKENS], 2, METHOD)
    assert [(r["choice"], r["context"]) for r in chosen] == [
        (name, context) for context in (64, TOKENS) for name in ("blocks", "every_key")
    ]
    assert all(row["ms_per_token"] == 2 * row["ms_per_layer"] > 0 for row in chosen)


def test_what_does_not_fit_is_said_and_not_guessed():
    base, reference = full()
    rows, skipped = bench_recall(base, reference, [TOO_MANY], 1, METHOD)
    cells = ("ms_per_token", "full_over_this", "device_bytes", "cache_bytes")
    assert [row[cell] for row in rows for cell in cells] == [None] * 12
    assert list(skipped) == [f"{row['arm']} after {TOO_MANY}" for row in rows]
    assert all("GiB are free" in reason for reason in skipped.values())


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match=r"GiB of .*--disk-tokens.*TMPDIR"):
        bench_disk(build(), TOO_MANY, 1, METHOD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("granularity", ["head", "layer"])
def test_a_saved_text_is_counted_by_what_is_fetched_and_leaves_nothing(
    granularity, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    method = replace(METHOD, granularity=granularity)
    base, tokens, steps = build(), TOKENS, 8
    rows = {row["phase"]: row for row in bench_disk(base, tokens, steps, method)}
    assert list(rows) == ["save", "open", "ask", "token"]
    assert list(tmp_path.iterdir()) == []
    memory = memories(arm(method))[0]
    unit = method.block_size * (memory.key_dim + memory.value_dim) * torch.bfloat16.itemsize
    block = 2 * memory.state_heads * unit  # of both layers
    least, each = method.top_k * block, rows["token"]["fetched_bytes"]
    # beside the chosen ones, a block that is not full yet is fetched
    sharing = 1 if granularity == "layer" else 2
    assert least <= each <= sharing * least + block
    assert granularity == "head" or each > least
    assert rows["save"]["fetched_bytes"] == rows["open"]["fetched_bytes"] == 0
    assert rows["ask"]["fetched_bytes"] > each
    stored = 2 * memory.state_heads * (memory.key_dim + memory.value_dim) * 2 * tokens
    assert rows["open"]["device_bytes"] < stored < rows["save"]["file_bytes"]
    assert {row["file_bytes"] for row in rows.values()} == {rows["save"]["file_bytes"]}
    assert base.dtype == torch.float32
    assert Path(tempfile.gettempdir()) == tmp_path
