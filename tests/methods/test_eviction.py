"""Eviction against the equations at the head of its file, token by token, and against the papers'
rules on a prompt that ends at its first prune."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from contract.arms import SINKS, WINDOW
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass, positions_of
from methods.captured import attention_of
from tolerances import ONE_LAYER, REORDERED, WRONG
from torch.nn import functional as F

from memretrofit.errors import ConfigError
from memretrofit.methods.eviction import PYRAMIDKV, EvictionConfig
from memretrofit.ops.eviction import best, h2o_scores, snapkv_scores
from memretrofit.patching.controls import window_override
from memretrofit.retrofit import patch

LENGTH = 48
SMALL = EvictionConfig(
    sliding_window=WINDOW,
    num_sink_tokens=SINKS,
    budget=WINDOW + SINKS + 6,
    interval=5,
    observation_window=6,
    kernel_size=3,
)
SCORERS = ("snapkv", "h2o")


def by_hand(found, config, *, late=0, causal=True, remembered=None):
    """One query and one KV head at a time: [T, H, V]. `late` moves every prune, `causal` off lets a
    prune count for the queries before it, and of those before a token leaves only the last
    `remembered` count (witnesses)."""
    q, k, v = found.query[0], found.key[0], found.value[0]
    (heads, length, width), groups = q.shape, k.shape[0]
    per = heads // groups
    out = torch.zeros(length, heads, v.shape[-1])
    for g in range(groups):
        held, buffer = [], []
        paid = torch.zeros(length, length)  # [query, key] mean over the group's heads
        for t in range(length):
            near = [j for j in range(t + 1) if j < config.num_sink_tokens]
            near += [
                j
                for j in range(max(0, t - config.sliding_window + 1), t + 1)
                if j >= config.num_sink_tokens
            ]
            leaver = t - config.sliding_window
            if leaver >= config.num_sink_tokens:
                buffer.append(leaver)
                if remembered is not None:
                    paid[: t + 1 - remembered, leaver] = 0
            due = leaver >= config.num_sink_tokens and not (
                (leaver - config.num_sink_tokens + 1 + late) % config.interval
            )
            for step in ("read", "prune") if causal else ("prune", "read"):
                if step == "read":
                    seen = near + held + buffer
                    for h in range(g * per, (g + 1) * per):
                        p = (k[g, seen] @ q[h, t] / math.sqrt(width)).softmax(0)
                        out[t, h] = p @ v[g, seen]
                        paid[t, seen] += p / per
                elif due:
                    candidates = held + buffer
                    first = 0 if config.scorer == "h2o" else t + 1 - config.observation_window
                    scores = paid[first : t + 1, candidates].sum(0)
                    if config.scorer == "snapkv":
                        side = config.kernel_size // 2
                        scores = F.pad(scores, (side, side)).unfold(0, config.kernel_size, 1)
                        scores = scores.mean(-1)
                    room = config.capacity(t + 1, 0, 1)
                    kept = scores.argsort(descending=True)[:room].sort().values
                    held, buffer = [candidates[i] for i in kept.tolist()], []
    return out


@cache
def captured(config):
    return attention_of(patch(build("llama", layers=1), config), tokens(1, LENGTH))


@pytest.mark.parametrize("budget", [SMALL.budget, 0.5])
@pytest.mark.parametrize("scorer", SCORERS)
def test_prunes_stand_at_fixed_places_and_keep_the_best(scorer, budget):
    config = replace(SMALL, scorer=scorer, budget=budget)
    found = captured(config)
    assert apart(found.output[0], by_hand(found, config)) < ONE_LAYER
    wrong = [
        by_hand(found, config, late=1),
        by_hand(found, config, causal=False),
        by_hand(found, replace(config, interval=6)),
        by_hand(found, replace(config, budget=SMALL.budget + 1 if budget != 0.5 else 0.6)),
        by_hand(found, replace(config, scorer="h2o" if scorer == "snapkv" else "snapkv")),
    ]
    if scorer == "snapkv":
        wrong.append(by_hand(found, replace(config, observation_window=5)))
        wrong.append(by_hand(found, replace(config, kernel_size=1)))
    for case in wrong:
        assert apart(found.output[0], case) > WRONG


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_prompt_that_ends_at_a_prune_keeps_what_the_papers_keep(scorer):
    """No sinks, the window is the observation window, one prune at the end of the prompt."""
    prompt = 40
    config = replace(
        SMALL,
        scorer=scorer,
        num_sink_tokens=0,
        budget=WINDOW + 12,
        interval=prompt - WINDOW,
        observation_window=WINDOW,
    )
    model, ids = patch(build("llama", layers=1), config), tokens(1, prompt)
    found = attention_of(model, ids)
    scores = (
        snapkv_scores(found.query[:, :, -WINDOW:], found.key, kernel_size=3)
        if scorer == "snapkv"
        else h2o_scores(found.query, found.key, window=WINDOW)
    )
    valid = torch.ones(1, prompt - WINDOW, dtype=torch.bool)
    expected = best(scores, valid, torch.tensor([12]), 12)[..., None].expand(-1, -1, -1, 8)
    for ends in ((), (9, 20, 21), range(1, prompt)):
        _, cache = in_pieces(model, ids, ends)
        kept_key, kept_value, *_ = cache.layers[0].state
        assert apart(kept_key, found.key.gather(2, expected)) < ONE_LAYER
        assert apart(kept_value, found.value.gather(2, expected)) < ONE_LAYER
    # witness: one token more, and the prune is not there yet
    _, cache = in_pieces(model, ids[:, :-1], ())
    assert (cache.layers[0].state[0] == 0).all()


@pytest.mark.parametrize("window", [WINDOW - 3, WINDOW + 5])
@pytest.mark.parametrize("scorer", SCORERS)
def test_another_window_is_a_patch_with_that_window(scorer, window):
    """Every query that attended a token in the other window counts; as many tokens are kept."""
    config = replace(SMALL, scorer=scorer, observation_window=4)
    model, ids = patch(build("llama", layers=1), config), tokens(1, LENGTH)
    with window_override(model, sliding_window=window, num_sink_tokens=SINKS):
        found = attention_of(model, ids)
    other = replace(config, sliding_window=window, budget=config.budget + window - WINDOW)
    assert apart(found.output[0], by_hand(found, other)) < ONE_LAYER
    assert apart(found.output[0], by_hand(found, config)) > WRONG
    if scorer == "h2o" and window > WINDOW:
        assert apart(found.output[0], by_hand(found, other, remembered=WINDOW)) > WRONG


@pytest.mark.parametrize("scorer", SCORERS)
def test_a_share_of_the_length_follows_each_row(scorer):
    """Rows of other lengths keep other numbers, prune at other places, and are rows alone."""
    model = patch(build("llama"), replace(SMALL, scorer=scorer, budget=0.6, pyramid_beta=4))
    rows = [tokens(1, length, seed=n)[0] for n, length in enumerate((LENGTH, 33, 21))]
    ids, mask = left_padded(rows, extra=2)
    whole = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    pieces, cache = in_pieces(model, ids, (13, 14, 31), mask=mask)
    for n, row in enumerate(rows):
        alone = one_pass(model, row[None])[0]
        assert apart(whole[n, -len(row) :], alone) < REORDERED
        assert apart(pieces[n, -len(row) :], alone) < REORDERED
    kept = [layer.state[4][:, 0].tolist() for layer in cache.layers]
    # The rows prune last at 46, 31 and 21 tokens. Prunes at 16, 21, ... tokens have means of 0, 1,
    # 4, 7, 10, 13, 16. The last layer gets a quarter: 4, 1, 0. The first gets 0, 2, 7, 13, 18,
    # 23, 28, but no more than it had kept and 5 new ones: 0, 2, 7, 12, 17, 22, 27.
    assert kept == [[27.0, 12.0, 2.0], [4.0, 1.0, 0.0]]


def test_layers_of_a_pyramid_hold_their_own_budgets():
    config = replace(PYRAMIDKV, sliding_window=8, observation_window=8, budget=48, interval=4)
    model = patch(build("llama", layers=3), config)
    _, cache = in_pieces(model, tokens(1, 120), ())
    # mean 40 beside the window: low 2, high 78, steps of 38
    assert [layer.state[0].shape[2] for layer in cache.layers] == [78, 40, 2]
    assert [layer.state[4][0, 0].item() for layer in cache.layers] == [78, 40, 2]


@pytest.mark.parametrize("budget", [SMALL.budget, 0.4])
@pytest.mark.parametrize("scorer", SCORERS)
def test_bytes_are_predicted_and_bounded(scorer, budget):
    config = replace(SMALL, scorer=scorer, budget=budget)
    model = patch(build("llama", layers=1), config)
    memory = model.model.layers[0].self_attn.memory
    for length in (12, 40, 200):
        _, cache = in_pieces(model, tokens(2, length), ())
        held = sum(x.nbytes for x in cache.layers[0].state)
        assert held == 2 * memory.state_nbytes(length - WINDOW - SINKS)
    fixed = memory.state_nbytes(10**6) == memory.state_nbytes(0)
    assert fixed == isinstance(budget, int)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": WINDOW + SINKS}, "choose more than 11"),
        ({"budget": 2}, "budget=2"),
        ({"budget": 1.5}, "between 0 and 1"),
        ({"budget": 0.0}, "between 0 and 1"),
        ({"interval": 0}, "interval=0"),
        ({"observation_window": WINDOW + 1}, "at most the window"),
        ({"kernel_size": 4}, "odd"),
        ({"pyramid_beta": 7}, "nothing to the last layer"),
        ({"pyramid_beta": 0}, "pyramid_beta=0"),
        ({"scorer": "h20"}, "h2o"),
    ],
)
def test_sizes_that_cannot_work_are_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        replace(SMALL, **change)
