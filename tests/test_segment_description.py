"""`describe` of a model that reads in segments: its bytes are those that a real cache holds."""

from __future__ import annotations

import pytest
import torch
from contract.families import build, tokens
from contract.runs import in_pieces
from contract.segment_arms import ARMS, every_live, reading, segment_of

from memretrofit import describe
from memretrofit.description import base_parameters, cache_bytes_at
from memretrofit.retrofit import memory_parameters


@every_live
def test_the_bytes_are_those_of_a_real_cache(family: str, arm: str) -> None:
    """In the first segments, and where whatever grows has grown; at a border and inside spans."""
    model, size = reading(family, arm), segment_of(arm)
    base = build(family)
    first = range(1, size + 1)
    for length in (*first, *(n for n in range(14 * size, 15 * size))):
        ids = tokens(1, length)
        _, cache = in_pieces(model, ids, [])
        before, after = cache_bytes_at(model, length)
        assert after == cache.layers[0].nbytes(), length
        if length in (3, 14 * size):
            _, plain = in_pieces(base, ids, [])
            held = sum(x.nbytes for y in plain.layers for x in (y.keys, y.values))
            assert before == held


@pytest.mark.parametrize("arm", ["armt", "rmt", "armt-late", "hmt"])
def test_what_is_described(arm: str) -> None:
    model = reading("llama", arm)
    found = describe(model)
    lines = found.splitlines()
    assert str(ARMS[arm]) in lines[0]
    added = sum(p.numel() for p in memory_parameters(model).values())
    base = sum(p.numel() for _, p in base_parameters(model))
    assert f"added parameters: {added:,} ({100 * added / base:.2f}% of the base" in found
    layers = {"armt": "0-1", "armt-late": "1", "rmt": "beside", "hmt": "beside"}[arm]
    (row,) = [line for line in lines if line.split()[:1] == [layers]]
    assert arm.partition("-")[0] in row
    for length in ("1k", "8k", "32k", "128k"):
        (row,) = [line.split() for line in lines if line.split()[:1] == [length]]
        assert row[3:5] == lines_of(lines, "8k")[3:5]  # flat
    assert f"inside a segment of {segment_of(arm)} tokens" in found


def lines_of(lines: list[str], label: str) -> list[str]:
    return next(line.split() for line in lines if line.split()[:1] == [label])


def test_a_wrapped_model_is_described_as_itself() -> None:
    """And nothing changes by being described."""
    model, ids = reading("llama", "armt"), tokens(2, 20)
    before, _ = in_pieces(model, ids, [])
    assert describe(model) == describe(model)
    after, _ = in_pieces(model, ids, [])
    assert torch.equal(before, after)
