"""InfLLM against the equations at the head of its file, one query at a time, and against the models
that it reduces to."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from contract.arms import SINKS, WINDOW
from contract.families import build, tokens
from contract.runs import apart, explicit_window, in_pieces, one_pass
from methods.captured import attention_of
from methods.test_streaming_llm import rotate
from tolerances import ONE_LAYER, REORDERED, WRONG

from memretrofit.description import cache_bytes_at
from memretrofit.errors import ConfigError
from memretrofit.methods.infllm import InfLLMConfig
from memretrofit.patching.controls import writes_disabled
from memretrofit.retrofit import memory_parameters, patch, unpatch

LENGTH, BLOCK = 40, 4
CONFIG = InfLLMConfig(
    sliding_window=WINDOW, num_sink_tokens=SINKS, block_size=BLOCK, top_k=2, position_group=3
)

# where a query at t and a key at j stand in a search; tokens are counted from the first one stored
PLACES = {
    "absolute": (lambda t: t, lambda j: j),
    "clamp": (lambda t: WINDOW, lambda j: 0),
    "grouped": (lambda t: (t - SINKS) // 3 + WINDOW - WINDOW // 3, lambda j: (j - SINKS) // 3),
    "reindexed": (lambda t: WINDOW, lambda j: 0),
}


def by_hand(found, config, *, open_early=0, worst=False, forgets_rest=False):
    """The equations, token by token: [T, H, V]. Each option is a mistake that the tests reject."""
    q, k, v = found.query[0], found.key[0], found.value[0]
    (heads, length, size), groups = q.shape, k.shape[0]
    sharing, at = heads // groups, PLACES[config.positions]
    raw_q = torch.stack([torch.stack([rotate(x[t], -t) for t in range(length)]) for x in q])
    raw_k = torch.stack([torch.stack([rotate(x[t], -t) for t in range(length)]) for x in k])
    far_q = torch.stack(
        [torch.stack([rotate(x[t], at[0](t)) for t in range(length)]) for x in raw_q]
    )
    far_k = torch.stack(
        [torch.stack([rotate(x[t], at[1](t)) for t in range(length)]) for x in raw_k]
    )
    out = torch.zeros(length, heads, v.shape[-1])
    for t in range(length):
        left = list(range(SINKS, t - WINDOW + 1))
        blocks = [left[i : i + BLOCK] for i in range(0, len(left) + open_early, BLOCK)]
        full = [b for b in blocks if len(b) + open_early >= BLOCK and b]
        rest = [] if forgets_rest else [j for b in blocks if b not in full for j in b]
        scores = torch.zeros(heads, len(full))
        for h in range(heads):
            for n, b in enumerate(full):
                scores[h, n] = far_q[h, t] @ far_k[h // sharing, b].mean(0)
        together = {"head": 1, "kv_head": sharing, "layer": heads}[config.granularity]
        scores = scores.unflatten(0, (-1, together)).sum(1).repeat_interleave(together, dim=0)
        for h in range(heads):
            g = h // sharing
            order = scores[h].argsort(descending=not worst)[: config.top_k].tolist()
            far = sorted([j for n in order for j in full[n]] + rest)
            near = [j for j in range(t + 1) if j < SINKS or j > t - WINDOW]
            place = min(t, WINDOW + SINKS - 1) if config.positions != "absolute" else t
            logits = torch.stack(
                [
                    rotate(raw_q[h, t], place) @ k[g, j] if j < SINKS else q[h, t] @ k[g, j]
                    for j in near
                ]
                + [
                    rotate(raw_q[h, t], WINDOW + len(far) - 1) @ rotate(raw_k[g, j], i)
                    if config.positions == "reindexed"
                    else far_q[h, t] @ far_k[g, j]
                    for i, j in enumerate(far)
                ]
            )
            out[t, h] = (logits / math.sqrt(size)).softmax(0) @ v[g, near + far]
    return out


@pytest.mark.parametrize("granularity", ["head", "kv_head", "layer"])
@pytest.mark.parametrize("positions", list(PLACES))
def test_every_output_is_that_of_the_equations(positions, granularity):
    """Witnesses: the worst blocks, a block that opens a token early, tokens of no full block
    lost."""
    config = replace(CONFIG, positions=positions, granularity=granularity)
    found = attention_of(patch(build("llama", layers=1), config), tokens(1, LENGTH))
    assert apart(found.output[0], by_hand(found, config)) < ONE_LAYER
    for mistake in ({"worst": True}, {"open_early": 1}, {"forgets_rest": True}):
        assert apart(found.output[0], by_hand(found, config, **mistake)) > WRONG


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_neox", "mixtral"])
def test_all_blocks_at_their_true_positions_are_full_attention(family):
    """I1, in one pass and token by token. Witnesses: two blocks only, and other positions."""
    everything = replace(CONFIG, top_k=99, positions="absolute")
    base, ids = build(family), tokens(2, LENGTH)
    expected = one_pass(base, ids)
    model = patch(build(family), everything)
    assert apart(one_pass(model, ids), expected) < REORDERED
    assert apart(in_pieces(model, ids, range(1, LENGTH))[0], expected) < REORDERED
    for wrong in (replace(everything, top_k=2), replace(everything, positions="clamp")):
        unpatch(model)
        assert apart(one_pass(patch(model, wrong), ids), expected) > WRONG


def test_an_empty_store_is_the_window():
    """I2. Witness: the store that was filled."""
    model, ids = patch(build("llama"), replace(CONFIG, positions="absolute")), tokens(2, LENGTH)
    expected = explicit_window(build("llama"), ids, WINDOW, SINKS)
    with writes_disabled(model):
        assert apart(one_pass(model, ids), expected) < REORDERED
    assert apart(one_pass(model, ids), expected) > WRONG


def test_scaled_rotations_are_undone_and_done_as_often_as_the_model_does():
    """YaRN multiplies cos and sin: a key that is rotated twice must not be scaled twice."""
    model, ids = build("llama"), tokens(1, LENGTH)
    model.model.rotary_emb.attention_scaling = 1.3
    expected = one_pass(model, ids)
    found = one_pass(patch(model, replace(CONFIG, top_k=99, positions="absolute")), ids)
    assert apart(found, expected) < REORDERED
    model.model.rotary_emb.attention_scaling = 1.0
    assert apart(one_pass(model, ids), expected) > WRONG  # witness: the scale matters


def test_text_far_beyond_the_trained_positions_is_read_at_trained_distances():
    """Clamped, no distance exceeds the window, and reindexed, that and what is fetched: a far copy
    of a token says what a near copy says. Witness: true positions."""
    spread = {}
    for positions in ("clamp", "reindexed", "absolute"):
        config = replace(CONFIG, positions=positions, top_k=1)
        model = patch(build("llama", layers=1), config)
        ids = torch.full((1, 400), 5)
        ids[:, :SINKS] = tokens(1, SINKS)
        # sinks stand at their true distance; without their pull all that moves is the far side
        logits = one_pass(model, ids)[:, 3 * (WINDOW + SINKS) :]
        spread[positions] = apart(logits, logits[:, -1:].expand_as(logits))
    assert max(spread["clamp"], spread["reindexed"]) < 0.5 * spread["absolute"]


def test_it_adds_no_parameters_and_predicts_its_bytes():
    """A store grows by its blocks: the prediction is what is held, less room for growth."""
    model = patch(build("llama"), CONFIG)
    assert not memory_parameters(model)
    for length in (60, 200):
        _, cache = in_pieces(model, tokens(1, length), ())
        held = sum(layer.nbytes() for layer in cache.layers)
        predicted = cache_bytes_at(model, length)[1]
        assert 0.95 * predicted < held < 1.6 * predicted


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"block_size": 9, "sliding_window": 8}, "block_size=9 is larger than sliding_window=8"),
        ({"top_k": 0}, "top_k"),
        ({"block_size": 0}, "block_size"),
        ({"positions": "nowhere"}, "positions"),
        ({"position_group": 0}, "position_group"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, says):
    with pytest.raises(ConfigError, match=says):
        InfLLMConfig(**fields)
