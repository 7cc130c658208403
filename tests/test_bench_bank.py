"""The rows of banks in the bench: what is compared is alike, and nothing is left on disk."""

from __future__ import annotations

import tempfile

import pytest
import torch
from contract.families import build

from memretrofit.errors import ConfigError
from memretrofit.evaluation import bench_bank
from memretrofit.evaluation import bench_bank_decode as bench_bank_decode_module
from memretrofit.evaluation.bench_bank import GATHER, PER_TOKEN, RAM, bench_large_bank, bench_lookup
from memretrofit.evaluation.bench_bank_decode import bench_bank_decode
from memretrofit.methods.engram import EngramConfig
from memretrofit.methods.hierarchical_ffn import HierarchicalFFNConfig

ROWS = 1 << 12
SMALL = {
    "hierarchical_ffn": HierarchicalFFNConfig(branching=(2,), block_sizes=(3,)),
    "engram": EngramConfig(table_size=211, num_heads=2, value_dim=4),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not [*tmp_path.iterdir()]


def test_each_tier_has_its_row_for_each_number_of_tokens():
    rows = bench_lookup(ROWS, (1, 3), rounds=3)
    warm = {
        (tier, draw) for tier in (GATHER, RAM, "disk", "disk, hot") for draw in ("even", "words")
    }
    for tokens in (1, 3):
        found = [(row["tier"], row["draw"]) for row in rows if row["tokens"] == tokens]
        assert sorted(found) == sorted(warm | {("disk, cold", "even")})
    for row in rows:
        assert row["us_per_token"] > 0
        assert (row["over_gather"] == 1) == (row["tier"] == GATHER)
        assert (row["over_ram"] == 1) == (row["tier"] == RAM)
        assert (row["hit_rate"] is None) == (row["tier"] != "disk, hot")


def test_words_repeat_and_even_draws_do_not():
    even, words = (bench_bank._draws(ROWS, 200, draw, 1)[0] for draw in ("even", "words"))
    for drawn in (even, words):
        assert drawn.shape == (200, PER_TOKEN)
        assert 0 <= drawn.min() <= drawn.max() < ROWS
    counts = [torch.bincount(drawn.flatten()).max() for drawn in (even, words)]
    assert counts[0] < 20  # 2.3 on average
    # of the ranks below 2, ln 2 / ln 4096 of all draws
    assert abs(counts[1] / words.numel() - 1 / 12) < 0.02


def test_a_large_bank_takes_room_neither_on_disk_nor_in_memory():
    rows = bench_large_bank(3, nbytes=1 << 33, opened=64)
    assert [row["phase"] for row in rows] == ["open", "prepare", "step"]
    for row in rows:
        assert row["file_bytes"] > 1 << 33
        assert row["delta_bytes"] == 64 * 4096
        assert row["peak_bytes"] < 1 << 27


def test_what_has_no_room_is_refused_before_it_is_written():
    with pytest.raises(ConfigError, match=r"A bank to look rows up in needs .*--bank-rows"):
        bench_lookup(10**12, (1,), rounds=1)


def test_a_step_with_a_bank_is_compared_with_one_without(monkeypatch):
    """Of the same base, in the same rounds, and with rows that are read."""
    monkeypatch.setattr(bench_bank_decode_module, "TEXTS", 4)  # more share all pairs of 101 words
    found = bench_bank_decode(build("llama"), [40], 3, batches=(1, 2), banks=SMALL)
    assert [(row["arm"], row["batch"]) for row in found] == [
        (arm, batch) for batch in (1, 2) for arm in ("full", *SMALL)
    ]
    for row in found:
        assert row["context"] == 40
        assert row["ms_per_token"] > 0
        assert (row["over_full"] == row["over_full_cpu"] == 1) == (row["arm"] == "full")
        assert row["reads"] == (None if row["arm"] == "full" else 1)


def test_a_conversation_shorter_than_what_a_bank_knows_is_refused():
    assert bench_bank_decode(build("llama"), [], 1) == []
    with pytest.raises(ConfigError, match=r"\[8\].*32 or more"):
        bench_bank_decode(build("llama"), [64, 8], 1)
