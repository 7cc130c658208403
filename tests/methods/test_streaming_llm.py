"""streaming_llm against the paper's own description: keys rotated again, by their place in the
cache."""

from __future__ import annotations

import math

import pytest
import torch
from contract.arms import SINKS, WINDOW
from contract.families import build, tokens
from contract.runs import apart, one_pass
from methods.captured import attention_of
from tolerances import ONE_LAYER, WRONG

from memretrofit.methods.streaming_llm import StreamingLLMConfig
from memretrofit.methods.window_sinks import WindowSinksConfig
from memretrofit.retrofit import memory_parameters, patch, unpatch

LENGTH = 40


def rotate(x, position, base=10000.0, width=None):
    """R(position) x for one head [K]; the first `width` dims only, in halves, as Llama and
    GPT-NeoX do."""
    width = width or x.shape[-1]
    half = width // 2
    angles = position * base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    a, b, rest = x[:half], x[half:width], x[width:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest])


def by_hand(found, window, sinks, width=None, absolute=False):
    """Un-rotate everything, then for each query build the cache, number its slots, rotate and
    attend: [T, H, V]."""
    q, k, v = found.query[0], found.key[0], found.value[0]
    (heads, length, size), groups = q.shape, k.shape[0]
    q = torch.stack(
        [
            torch.stack([rotate(q[h, t], -t, width=width) for t in range(length)])
            for h in range(heads)
        ]
    )
    k = torch.stack(
        [
            torch.stack([rotate(k[g, t], -t, width=width) for t in range(length)])
            for g in range(groups)
        ]
    )
    out = torch.zeros(length, heads, v.shape[-1])
    for h in range(heads):
        g = h * groups // heads
        for t in range(length):
            kept = [j for j in range(t + 1) if j < sinks or j > t - window]
            slots = kept if absolute else range(len(kept))
            query = rotate(q[h, t], slots[-1], width=width)
            keys = [rotate(k[g, j], slot, width=width) for j, slot in zip(kept, slots, strict=True)]
            weights = torch.stack([query @ key / math.sqrt(size) for key in keys]).softmax(0)
            out[t, h] = sum(w * v[g, j] for w, j in zip(weights, kept, strict=True))
    return out


@pytest.mark.parametrize(("family", "width"), [("llama", None), ("gpt_neox", 4)])
def test_positions_are_those_inside_the_cache(family, width):
    """Whole heads (Llama) and a part of each (GPT-NeoX). Witness: absolute positions, which is
    window_sinks."""
    config = StreamingLLMConfig(sliding_window=WINDOW, num_sink_tokens=SINKS)
    found = attention_of(patch(build(family, layers=1), config), tokens(1, LENGTH))
    assert apart(found.output[0], by_hand(found, WINDOW, SINKS, width)) < ONE_LAYER
    assert apart(found.output[0], by_hand(found, WINDOW, SINKS, width, absolute=True)) > WRONG
    assert apart(found.output[0], by_hand(found, WINDOW - 1, SINKS, width)) > WRONG


def test_the_hand_rotation_is_the_models_own():
    """Else the test above would prove nothing: the keys of one token at two positions differ by
    that rotation."""
    model = patch(build("llama", layers=1), StreamingLLMConfig(sliding_window=WINDOW))
    found = attention_of(model, torch.full((1, 9), 5))
    key = found.key[0, 0]
    assert apart(rotate(key[0], 8), key[8]) < ONE_LAYER
    assert apart(rotate(key[0], 7), key[8]) > WRONG


def test_no_query_stands_further_from_a_sink_than_the_cache_is_long():
    """After the sinks one token, repeated: every step beyond the border is alike, however long
    the text."""
    config = StreamingLLMConfig(sliding_window=WINDOW, num_sink_tokens=SINKS)
    model, ids = build("llama"), torch.full((1, 200), 5)
    ids[:, :SINKS] = tokens(1, SINKS)
    patch(model, config)
    logits = one_pass(model, ids)
    far = 3 * (WINDOW + SINKS)
    assert apart(logits[:, far:], logits[:, -1:].expand_as(logits[:, far:])) < 5 * ONE_LAYER
    unpatch(model)
    patch(model, WindowSinksConfig(sliding_window=WINDOW, num_sink_tokens=SINKS))
    absolute = one_pass(model, ids)
    assert apart(absolute[:, far:], absolute[:, -1:].expand_as(absolute[:, far:])) > WRONG


def test_it_reduces_to_window_sinks_while_the_cache_fills():
    ids, last = tokens(1, LENGTH), WINDOW + SINKS
    slots = one_pass(
        patch(build("llama"), StreamingLLMConfig(sliding_window=WINDOW, num_sink_tokens=SINKS)), ids
    )
    absolute = one_pass(
        patch(build("llama"), WindowSinksConfig(sliding_window=WINDOW, num_sink_tokens=SINKS)), ids
    )
    assert apart(slots[:, :last], absolute[:, :last]) < ONE_LAYER
    assert apart(slots[:, last:], absolute[:, last:]) > WRONG


def test_it_adds_no_parameters():
    model = patch(build("llama"), StreamingLLMConfig(sliding_window=WINDOW))
    assert memory_parameters(model) == {}
