"""Landmark attention against the equations at the head of its file, token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from contract.arms import SINKS, WINDOW, activate
from contract.families import build, tokens
from contract.runs import apart, one_pass
from methods.captured import attention_of
from tolerances import ONE_LAYER, REORDERED, WRONG

from memretrofit.errors import ConfigError
from memretrofit.methods.infllm import InfLLMConfig
from memretrofit.methods.landmark import LandmarkConfig
from memretrofit.patching.controls import memory_disabled, memory_silenced, window_override
from memretrofit.retrofit import memory_parameters, patch
from memretrofit.training import DistillSettings, self_distillation, trainable_parameters
from memretrofit.training.losses import forward_kl

LENGTH = 34
SMALL = LandmarkConfig(sliding_window=WINDOW, num_sink_tokens=SINKS, block_size=4, top_k=2)
ALL = 9
"""More blocks than there are."""


def turned(x, cos, sin):
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def by_hand(found, p, *, size=4, top_k=2, late=0, joint=False, plain=False, packed=False):
    """The equations for one query and head at a time: [T, H, V].

    `packed` puts what is fetched side by side before the window, a landmark at its block's first
    token. Witnesses: `late` shifts what has left, `joint` is one softmax over the tokens of the
    chosen blocks, `plain` forgets what the landmarks learned.
    """
    q, k, v = found.query[0], found.key[0], found.value[0]
    cos, sin = (y[0] for y in found.cos_sin)
    far_q = turned(turned(q, cos, -sin), cos[WINDOW], sin[WINDOW])
    far_k = turned(k, cos, -sin)  # at position 0, where the rotation is none
    (heads, length, width), groups = q.shape, k.shape[0]
    share = heads // groups
    out = torch.zeros(length, heads, v.shape[-1])
    for g, t in torch.cartesian_prod(torch.arange(groups), torch.arange(length)):
        seen = [j for j in range(t + 1) if j < SINKS or j > t - WINDOW]
        stored = list(range(SINKS, int(t) - WINDOW - late + 1))
        blocks = [stored[i : i + size] for i in range(0, len(stored) // size * size, size)]
        tail = stored[len(blocks) * size :]
        learned = 0.0 if plain else 1.0
        pooling, offset = (learned * p[f"landmark.{x}"][g] for x in ("pooling", "offset"))
        pooling = pooling / math.sqrt(width)
        keys = [(far_k[g, b] @ pooling).softmax(0) @ (far_k[g, b] + offset) for b in blocks]
        fit = [sum(far_q[h, t] @ key for h in range(g * share, (g + 1) * share)) for key in keys]
        chosen = sorted(sorted(range(len(blocks)), key=lambda n: -fit[n])[:top_k])
        fetched = len(chosen) * size + len(tail)
        # place of each fetched token, and of the query behind them
        at = torch.arange(fetched) if packed else torch.zeros(fetched, dtype=torch.long)
        query_at = WINDOW + max(fetched - 1, 0) if packed else WINDOW
        for h in range(g * share, (g + 1) * share):
            bias = p["bias"][h] if not plain else math.log(size)
            place = min(int(t), WINDOW + SINKS - 1)  # where the query stands for sinks
            slot_q = turned(turned(q[h, t], cos[t], -sin[t]), cos[place], sin[place])
            near = [k[g, j] @ (slot_q if j < SINKS else q[h, t]) for j in seen]
            asking = turned(turned(q[h, t], cos[t], -sin[t]), cos[query_at], sin[query_at])
            last = at[len(chosen) * size :]
            scores = torch.cat(
                [torch.stack(near), turned(far_k[g, tail], cos[last], sin[last]) @ asking]
            )
            logits, values = [scores / math.sqrt(width)], [v[g, seen + tail]]
            for rank, n in enumerate(chosen):
                of = at[rank * size : (rank + 1) * size]
                inside = turned(far_k[g, blocks[n]], cos[of], sin[of]) @ asking / math.sqrt(width)
                landmark = (turned(keys[n], cos[of[0]], sin[of[0]]) @ asking)[None]
                landmark = landmark / math.sqrt(width) + bias
                logits.append(inside if joint else landmark)
                mixed = inside.softmax(0)[None] @ v[g, blocks[n]]
                values.append(v[g, blocks[n]] if joint else mixed)
            out[t, h] = torch.cat(logits).softmax(0) @ torch.cat(values)
    return out


@pytest.mark.parametrize("positions", ["clamp", "reindexed"])
@pytest.mark.parametrize("top_k", [2, ALL])
def test_attention_is_two_level(top_k, positions):
    """Two of the blocks, and all of them: the dense form."""
    model = patch(build("llama", layers=1), replace(SMALL, top_k=top_k, positions=positions))
    found = attention_of(activate(model), tokens(1, LENGTH))
    p = {n.rpartition("memory.")[2]: x.detach() for n, x in memory_parameters(model).items()}
    assert p.keys() == {"landmark.pooling", "landmark.offset", "bias"}
    case = {"top_k": top_k, "packed": positions == "reindexed"}
    assert apart(found.output[0], by_hand(found, p, **case)) < ONE_LAYER
    wrong = [{"late": 1}, {"top_k": 1}, {"joint": True}, {"plain": True}, {"size": 5}]
    for change in (*wrong, {"packed": not case["packed"]}):
        assert apart(found.output[0], by_hand(found, p, **case | change)) > WRONG


def test_a_block_of_one_token_is_its_own_landmark():
    """Untrained, its logit is its log-sum-exp: the oracle. At true positions and with all blocks
    this is the base model, with some of them InfLLM; a block of four is neither."""
    ids = tokens(2, LENGTH)

    def output(config):
        return one_pass(patch(build("llama"), config), ids)

    whole = replace(SMALL, block_size=1, top_k=LENGTH, positions="absolute")
    base = one_pass(build("llama"), ids)
    assert apart(output(whole), base) < REORDERED
    assert apart(output(replace(whole, block_size=4)), base) > WRONG
    some = replace(SMALL, top_k=5)
    infllm = InfLLMConfig(
        sliding_window=WINDOW, num_sink_tokens=SINKS, block_size=4, top_k=5, granularity="kv_head"
    )

    def difference(size):
        return apart(*(output(replace(config, block_size=size)) for config in (some, infllm)))

    assert difference(1) < REORDERED
    assert difference(4) > WRONG


@pytest.mark.parametrize("window", [WINDOW - 3, WINDOW + 3])
def test_a_drawn_window_is_that_window(window):
    """Training draws windows: blocks, borders and positions are those of a patch with it."""
    model, ids = activate(patch(build("llama"), SMALL)), tokens(2, LENGTH)
    other = activate(patch(build("llama"), replace(SMALL, sliding_window=window)))
    with window_override(model, sliding_window=window, num_sink_tokens=SINKS):
        found = one_pass(model, ids)
    assert apart(found, one_pass(other, ids)) < REORDERED
    assert apart(found, one_pass(model, ids)) > WRONG


def test_training_makes_the_memory_worth_more(tmp_path):
    """Landmarks and LoRA, by distillation on four rows: the loss falls, and without the memory
    what was gained is lost."""
    ids = tokens(4, 64)
    config = LandmarkConfig(sliding_window=12, num_sink_tokens=2, block_size=4, top_k=16)
    model, promised = trainable_parameters(
        patch(build("llama"), config), "memory+lora", lora_rank=2
    )
    inner = model.get_base_model()
    with memory_disabled(inner):
        teacher = one_pass(inner, ids)[:, 14:]

    def loss():
        return forward_kl(one_pass(inner, ids)[:, 14:], teacher).item()

    before = loss()
    settings = DistillSettings(max_steps=15, learning_rate=1e-2, batch_size=4)
    rows = [{"input_ids": row} for row in ids]
    self_distillation(model, promised, rows, settings, tmp_path)
    after = loss()
    with memory_silenced(inner):
        silenced = loss()
    assert after < 0.7 * before < 0.7 * silenced


def test_a_block_larger_than_the_window_is_refused():
    with pytest.raises(ConfigError, match="block_size=9 is larger than sliding_window=8"):
        replace(SMALL, block_size=9)
