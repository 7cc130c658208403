"""DuoAttention-style head plans against their definition, and the plans themselves."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from contract.arms import SINKS, WINDOW
from contract.families import build, tokens
from contract.runs import apart, in_pieces, one_pass
from methods.captured import attention_of
from tolerances import ONE_LAYER, REORDERED, WRONG

from memretrofit import WindowSinksConfig, patch
from memretrofit.config import MethodConfig
from memretrofit.errors import ConfigError, NoTargetError
from memretrofit.evaluation.probes import RetrievalHeads
from memretrofit.methods.head_plan import HeadPlanConfig, plan_heads
from memretrofit.retrofit import is_patched

LENGTH = 40
SMALL = HeadPlanConfig(sliding_window=WINDOW, num_sink_tokens=SINKS)
ALL = ((0, 0), (0, 1), (1, 0), (1, 1))
"""Every KV head of the tiny Llama's two layers."""


def planned(*heads, family="llama", layers=2):
    return patch(build(family, layers=layers), replace(SMALL, full_heads=heads))


def test_all_heads_full_are_the_base_model():
    """In one pass, over several blocks of queries, and token by token. Witness: all heads but
    one."""
    ids = tokens(2, 200)
    expected = one_pass(build("llama"), ids)
    model = planned(*ALL)
    assert apart(one_pass(model, ids), expected) < REORDERED
    assert apart(in_pieces(model, ids, (150, *range(151, 200)))[0], expected) < REORDERED
    for missing in range(len(ALL)):
        fewer = planned(*ALL[:missing], *ALL[missing + 1 :])
        assert apart(one_pass(fewer, ids), expected) > WRONG


@pytest.mark.parametrize("family", ["gpt_neox", "deepseek_v3"])
def test_all_heads_full_are_the_base_model_whatever_it_rotates(family):
    """A part of each head, or a latent: keys are kept as the model rotated them."""
    ids = tokens(2, LENGTH)
    model = planned(*((layer, head) for layer in range(2) for head in range(4)), family=family)
    assert apart(one_pass(model, ids), one_pass(build(family), ids)) < REORDERED


def test_no_full_head_is_the_window_bit_for_bit():
    ids = tokens(2, LENGTH)
    window = patch(build("llama"), WindowSinksConfig(sliding_window=WINDOW, num_sink_tokens=SINKS))
    model = planned()
    assert torch.equal(one_pass(model, ids), one_pass(window, ids))
    ends = (9, 20, 21, 22)
    pieces, cache = in_pieces(model, ids, ends)
    assert torch.equal(pieces, in_pieces(window, ids, ends)[0])
    assert all(layer.state == () for layer in cache.layers)


def by_hand(found, full, window, sinks):
    """[T, H, V], one query and one head at a time: a full KV head's queries see all before them."""
    q, k, v = found.query[0], found.key[0], found.value[0]
    (heads, length, width), groups = q.shape, k.shape[0]
    out = torch.zeros(length, heads, v.shape[-1])
    for h in range(heads):
        g = h * groups // heads
        for t in range(length):
            near = [j for j in range(t + 1) if j < sinks or j > t - window]
            seen = list(range(t + 1)) if g in full else near
            scores = torch.stack([q[h, t] @ k[g, j] / math.sqrt(width) for j in seen])
            out[t, h] = scores.softmax(0) @ v[g, seen]
    return out


@pytest.mark.parametrize("head", [0, 1])
def test_a_full_head_sees_all_and_the_other_its_window(head):
    """Witnesses: the other head full, a window that is off by one."""
    found = attention_of(planned((0, head), layers=1), tokens(1, LENGTH))
    assert apart(found.output[0], by_hand(found, {head}, WINDOW, SINKS)) < ONE_LAYER
    assert apart(found.output[0], by_hand(found, {1 - head}, WINDOW, SINKS)) > WRONG
    for window in (WINDOW - 1, WINDOW + 1):
        assert apart(found.output[0], by_hand(found, {head}, window, SINKS)) > WRONG


def test_without_a_plan_every_second_head_is_full():
    ids = tokens(2, LENGTH)
    found = one_pass(patch(build("llama"), SMALL), ids)
    assert torch.equal(found, one_pass(planned((0, 0), (1, 0)), ids))
    assert apart(found, one_pass(planned((0, 1), (1, 1)), ids)) > WRONG


def test_reading_in_slices_is_one_softmax():
    """A block of the store at a time, for each of its five blocks. Witness: a text without
    the tokens of the second block."""
    model, ids = planned((0, 0), (0, 1), layers=1), tokens(2, 330)
    expected = attention_of(model, ids).output
    model.model.layers[0].self_attn.memory.numbers_at_once = 1
    assert apart(attention_of(model, ids).output, expected) < ONE_LAYER
    shorter = torch.cat([ids[:, : SINKS + 64], ids[:, SINKS + 128 :]], dim=1)
    assert apart(attention_of(model, shorter).output[:, -1], expected[:, -1]) > WRONG


def test_only_full_heads_are_stored():
    """K + V numbers for each token of each full head: 8 + 8 floats, for what left of 300 tokens."""
    left = 300 - WINDOW - SINKS
    held = {}
    for heads in ((), ((0, 1),), ((0, 0), (0, 1))):
        _, cache = in_pieces(planned(*heads, layers=1), tokens(1, 300), ())
        numbers = [x.numel() for store in cache.layers[0].state for x in store.live()]
        held[len(heads)] = sum(numbers)
    assert held == {0: 0, 1: left * 16, 2: 2 * left * 16}


def test_a_plan_takes_the_highest_scores_of_all_layers():
    """Of equal scores the earlier head; a share is rounded to whole heads."""
    scores = {3: [0.1, 0.9], 5: [0.5, 0.5]}
    assert plan_heads(scores, 0.25) == ((3, 1),)
    assert plan_heads(scores, 0.5) == ((3, 1), (5, 0))
    assert plan_heads(scores, 0.6) == plan_heads(scores, 0.5)
    assert plan_heads(scores, 0) == ()
    assert plan_heads(scores, 1) == ((3, 0), (3, 1), (5, 0), (5, 1))
    for bad in ((scores, 1.5), (scores, -0.1), (scores, math.nan), ({}, 0.5)):
        with pytest.raises(ConfigError, match="share"):
            plan_heads(*bad)


def test_retrieval_scores_become_a_plan_and_a_config_that_survives_json():
    """The score of a KV head is the highest of the query heads that share it."""
    found = RetrievalHeads(
        layers=(0, 1),
        scores=((0.0, 0.2, 0.1, 0.1), (0.0, 0.0, 0.6, 0.0)),
        active=((0.0,) * 4,) * 2,
        num_key_value_heads=(2, 2),
        trials=1,
        answered=1,
    )
    scores = dict(zip(found.layers, found.key_value_scores(), strict=True))
    config = replace(SMALL, full_heads=plan_heads(scores, share=0.5))
    assert config.full_heads == ((0, 0), (1, 1))
    assert MethodConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert is_patched(patch(build("llama"), config))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"full_heads": ((0, 1), (0, 1))}, "twice"),
        ({"full_heads": ((0, -1),)}, "negative"),
        ({"full_heads": ((0, 0), (2, 0)), "layers_to_transform": (0, 1)}, r"\[2\]"),
        ({"full_heads": ((0, 0, 0),)}, "full_heads"),
    ],
)
def test_plans_that_mean_nothing_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(SMALL, **changes)


@pytest.mark.parametrize(
    ("family", "heads", "error", "words"),
    [
        ("llama", (0, 2), ConfigError, "0 to 1; found 2"),
        ("llama", (7, 0), NoTargetError, r"\[7\]"),
        ("gemma3", (1, 0), NoTargetError, r"\[1\]"),  # a sliding layer
    ],
)
def test_heads_that_are_not_there_are_refused_and_nothing_is_left(family, heads, error, words):
    model, ids = build(family), tokens(1, LENGTH)
    with pytest.raises(error, match=words):
        patch(model, replace(SMALL, full_heads=(heads,)))
    assert not is_patched(model)
    assert torch.equal(one_pass(model, ids), one_pass(build(family), ids))
