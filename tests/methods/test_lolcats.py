"""LoLCATs against the equations at the head of its file, token by token."""

from __future__ import annotations

import math

import pytest
import torch
from contract.arms import SINKS, WINDOW, activate
from contract.families import build, tokens
from contract.runs import apart, explicit_window, one_pass
from methods.captured import attention_of
from tolerances import ONE_LAYER, WRONG

from memretrofit.methods.lolcats import LoLCATsConfig
from memretrofit.retrofit import memory_parameters, patch

LENGTH = 24


def phi(x, p, side, head):
    """exp(s . (x - m)) [softmax((x - m) U), softmax(-(x - m) U)] of one vector."""
    x = x - p[f"{side}_map.mean"][head]
    logits = x @ p[f"{side}_map.map"][head]
    size = (x @ p[f"{side}_map.scale"][head]).exp()
    return size * torch.cat([logits.softmax(0), (-logits).softmax(0)])


def by_hand(found, p, window, sinks, *, late=0, unrotate=False, separate=False):
    """out = (local + w phi(q) S) / (1 + w phi(q) z), one query and head at a time: [T, H, V].

    `late` shifts the token that leaves; `separate` forgets the common normaliser (witnesses).
    """
    q, k, v = found.query[0], found.key[0], found.value[0]
    far_q, far_k = q, k
    if unrotate:
        cos, sin = (y[0] for y in found.cos_sin)

        def half_turned(y):
            return torch.cat([-y[..., 4:], y[..., :4]], -1)

        far_q, far_k = (y * cos - half_turned(y) * sin for y in (q, k))
    (heads, length, width), groups = q.shape, k.shape[0]
    states = p["key_map.map"].shape[0]
    out = torch.zeros(length, heads, v.shape[-1])
    for h in range(heads):
        g, s = h * groups // heads, h * states // heads
        mass, content = torch.zeros(2 * width), torch.zeros(2 * width, v.shape[-1])
        for t in range(length):
            seen = [j for j in range(t + 1) if j < sinks or j > t - window]
            scores = torch.stack([q[h, t] @ k[g, j] / math.sqrt(width) for j in seen])
            local = scores.softmax(0) @ v[g, seen]
            leaver = t - window - late
            if leaver >= sinks:
                features = phi(far_k[g, leaver], p, "key", s)
                mass, content = mass + features, content + torch.outer(features, v[g, leaver])
            features = phi(far_q[h, t], p, "query", h)
            c = 10 * p["state_weight.weight"][h].clamp(min=0)  # the parameter counts in tens
            slope = p["state_weight.lse_slope"][h]
            weight = c * (p["state_weight.bias"][h] - slope * scores.logsumexp(0)).exp()
            total = 1 if separate else 1 + weight * (features @ mass)
            out[t, h] = (local + weight * (features @ content)) / total
    return out


@pytest.mark.parametrize("space", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("state_heads", ["query", "key_value"])
def test_window_and_state_share_one_normaliser(state_heads, space):
    config = LoLCATsConfig(
        sliding_window=WINDOW, num_sink_tokens=SINKS, state_heads=state_heads, key_space=space
    )
    model = activate(patch(build("llama", layers=1), config))
    found = attention_of(model, tokens(1, LENGTH))
    p = {n.rpartition("memory.")[2]: x.detach() for n, x in memory_parameters(model).items()}
    case = {"window": WINDOW, "sinks": SINKS, "unrotate": space == "pre_rope"}
    assert apart(found.output[0], by_hand(found, p, **case)) < ONE_LAYER
    wrong = (
        {"late": 1},
        {"sinks": SINKS + 1},
        {"separate": True},
        {"unrotate": space != "pre_rope"},
    )
    for change in wrong:
        assert apart(found.output[0], by_hand(found, p, **case | change)) > WRONG, change


def test_it_starts_at_the_window():
    """c = 0 and nothing else: exactly one factor of the branch is zero."""
    model = patch(build("llama"), LoLCATsConfig(sliding_window=WINDOW, num_sink_tokens=SINKS))
    weights = {
        n: p for n, p in memory_parameters(model).items() if n.endswith("state_weight.weight")
    }
    assert len(weights) == 2
    assert all((p == 0).all() for p in weights.values())
    maps = [p for n, p in memory_parameters(model).items() if n.endswith("_map.map")]
    assert all(torch.equal(p, torch.eye(8).expand_as(p)) for p in maps)
    ids = tokens(2, LENGTH)
    expected = explicit_window(build("llama"), ids, WINDOW, SINKS)
    assert apart(one_pass(model, ids), expected) < ONE_LAYER
    with torch.no_grad():
        for parameter in weights.values():
            parameter.fill_(0.1)
    assert apart(one_pass(model, ids), expected) > WRONG


def test_a_large_weight_leaves_the_state_alone():
    """Limit of c: linear attention over what has left, a mean of its values; the window no
    longer counts."""
    model = patch(
        build("llama", layers=1), LoLCATsConfig(sliding_window=WINDOW, num_sink_tokens=SINKS)
    )
    with torch.no_grad():
        for name, parameter in memory_parameters(model).items():
            if name.endswith("state_weight.weight"):
                parameter.fill_(1e7)
    found = attention_of(model, tokens(1, LENGTH))
    t = (
        WINDOW + SINKS
    )  # the first token that finds one in the state: it reads that value, whatever the features
    value = found.value[0, :, SINKS].repeat_interleave(2, dim=0)
    assert apart(found.output[0, t], value) < ONE_LAYER
    assert apart(found.output[0, t - 1], value) > WRONG
