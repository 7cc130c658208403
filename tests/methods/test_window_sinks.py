"""window_sinks against its definition, one query at a time."""

from __future__ import annotations

import math

import torch
from contract.arms import SINKS, WINDOW
from contract.families import build, tokens
from contract.runs import apart
from methods.captured import attention_of
from tolerances import ONE_LAYER, WRONG

from memretrofit.methods.window_sinks import WindowSinksConfig
from memretrofit.retrofit import memory_parameters, patch

LENGTH = 26


def by_hand(q, k, v, window, sinks):
    """softmax over {j < N} and {t - W < j <= t}, one query and head at a time: [T, H, V]."""
    heads, length, width = q.shape
    out = torch.zeros(length, heads, v.shape[-1])
    for h in range(heads):
        g = h * k.shape[0] // heads
        for t in range(length):
            seen = [j for j in range(t + 1) if j < sinks or j > t - window]
            scores = torch.stack([q[h, t] @ k[g, j] / math.sqrt(width) for j in seen])
            weights = scores.softmax(0)
            out[t, h] = sum(w * v[g, j] for w, j in zip(weights, seen, strict=True))
    return out


def test_each_query_sees_its_sinks_and_its_window():
    model = patch(
        build("llama", layers=1), WindowSinksConfig(sliding_window=WINDOW, num_sink_tokens=SINKS)
    )
    found = attention_of(model, tokens(1, LENGTH))
    q, k, v = found.query[0], found.key[0], found.value[0]
    assert apart(found.output[0], by_hand(q, k, v, WINDOW, SINKS)) < ONE_LAYER
    assert apart(found.output[0], by_hand(q, k, v, WINDOW + 1, SINKS)) > WRONG
    assert apart(found.output[0], by_hand(q, k, v, WINDOW, SINKS - 1)) > WRONG


def test_it_reduces_to_a_plain_sliding_window_without_sinks():
    model = patch(
        build("llama", layers=1), WindowSinksConfig(sliding_window=WINDOW, num_sink_tokens=0)
    )
    found = attention_of(model, tokens(1, LENGTH))
    expected = by_hand(found.query[0], found.key[0], found.value[0], WINDOW, 0)
    assert apart(found.output[0], expected) < ONE_LAYER


def test_it_adds_no_parameters():
    model = patch(build("llama"), WindowSinksConfig(sliding_window=WINDOW))
    assert memory_parameters(model) == {}
