"""AHN against the equations at the head of its file, token by token, and against the sizes of
the releases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.arms import SINKS, WINDOW, activate
from contract.families import build, tokens
from contract.runs import apart
from methods.captured import attention_of
from modules.folding import folding
from tolerances import ONE_LAYER, WRONG
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from memretrofit.methods.ahn import AHN_DN, AHN_GDN, AHN_MAMBA2, AHNConfig
from memretrofit.modules.recurrent import RecurrentMemory
from memretrofit.patching.controls import writes_disabled
from memretrofit.retrofit import memory_parameters, patch

LENGTH = 24
RULES = {"gated_delta": AHN_GDN, "delta": AHN_DN, "ssd": AHN_MAMBA2}


def softplus(x):
    return x.exp().log1p()


def recalled(found, parameters, rule, window, sinks, *, late=0, unrotate=False):
    """What the memory adds, [T, H, V]: the docstring's four lines, one token and one head at a
    time.

    `late` shifts the token that leaves (a witness); `unrotate` takes keys and queries before the
    rotary embedding.
    """
    q, k, v, x = found.query[0], found.key[0], found.value[0], found.hidden[0]
    (heads, length, _), groups = q.shape, k.shape[0]
    if unrotate:
        cos, sin = (y[0] for y in found.cos_sin)

        def half_turned(y):
            return torch.cat([-y[..., 4:], y[..., :4]], -1)

        q, k = (y * cos - half_turned(y) * sin for y in (q, k))
    p = {name.rpartition("memory.")[2]: value for name, value in parameters.items()}
    features = x @ p["write_features.weight"].T + p.get(
        "write_features.bias", 0
    )  # [T, gates * states]
    gate = x @ p["read_out.read_gate.weight"].T + p.get("read_out.read_gate.bias", 0)
    gate = gate * gate.sigmoid()  # [T, H]
    states = p["write_features.weight"].shape[0] // (2 if rule == "gated_delta" else 1)
    state = torch.zeros(states, k.shape[-1], v.shape[-1])
    reads = torch.zeros(length, heads, v.shape[-1])
    for t in range(length):
        leaver = t - window - late
        for s in range(states):
            if leaver < sinks:
                continue
            g = s * groups // states
            key = k[g, leaver]
            if "key_center.mean" in p:
                key = key - p["key_center.mean"][s, 0]
            key = key / key.norm()
            first = features[leaver, s]
            if rule == "gated_delta":
                step = softplus(first + p["decay.step_bias"][s])
                fade = (-p["decay.log_rate"][s].exp() * step).exp()
                beta = features[leaver, states + s].sigmoid()
            elif rule == "delta":
                fade, beta = 1.0, first.sigmoid()
            else:
                beta = softplus(first + p["decay.step_bias"][s])
                fade = (-p["decay.log_rate"][s].exp() * beta).exp()
            state[s] = fade * state[s]
            missing = v[g, leaver] if rule == "ssd" else v[g, leaver] - state[s].T @ key
            state[s] += beta * torch.outer(key, missing)
        for h in range(heads):
            query = q[h, t] / q[h, t].norm()
            reads[t, h] = state[h * states // heads].T @ query
            if rule != "ssd":
                reads[t, h] /= q.shape[-1] ** 0.5
    weight, maps = p["read_out.norm_weight"], p["read_out.out_map"]
    out = torch.zeros_like(reads)
    for t in range(length):
        if rule == "ssd":
            whole = (reads[t] * gate[t, :, None]).flatten()
            normed = (whole / (whole.square().mean() + 1e-5).sqrt() * weight).view_as(reads[t])
        else:
            size = (reads[t].square().mean(-1, keepdim=True) + 1e-5).sqrt()
            normed = reads[t] / size * weight * gate[t, :, None]
        for h in range(heads):
            out[t, h] = normed[h] @ maps[h]
    return out


@pytest.mark.parametrize("space", ["post_rope", "pre_rope"])
@pytest.mark.parametrize("state_heads", ["query", "key_value"])
@pytest.mark.parametrize("rule", list(RULES))
def test_what_the_memory_adds_is_the_equations(rule, state_heads, space):
    """Local attention is the same model without writes; the rest is the loop. Witness: the
    leaver one token late."""
    config = AHNConfig(
        rule=rule, sliding_window=WINDOW, num_sink_tokens=SINKS, state_heads=state_heads,
        key_space=space, center_keys=space == "pre_rope",
    )  # fmt: skip
    model = activate(patch(build("llama", layers=1), config))
    found = attention_of(model, tokens(1, LENGTH))
    with writes_disabled(model):
        local = attention_of(model, tokens(1, LENGTH))
    added = (found.output - local.output)[0]
    parameters = {n: p.detach() for n, p in memory_parameters(model).items()}
    case = {"window": WINDOW, "sinks": SINKS, "unrotate": space == "pre_rope"}
    assert apart(added, recalled(found, parameters, rule, **case)) < ONE_LAYER
    assert added[: WINDOW + SINKS].abs().max() == 0
    assert apart(added, recalled(found, parameters, rule, **case, late=1)) > WRONG
    assert apart(added, recalled(found, parameters, rule, **case | {"sinks": SINKS - 1})) > WRONG
    assert (
        apart(added, recalled(found, parameters, rule, **case | {"unrotate": space != "pre_rope"}))
        > WRONG
    )


def test_the_hand_case_of_the_gated_rule():
    """One head, K = V = 2; three tokens leave in turn, written with (decay, strength)::

    k = [1, 0],   v = [1, 2], decay 1,  beta 1    S = [[1, 2], [0, 0]]
    k = [0, 1],   v = [3, 4], decay .5, beta 1    S = [[.5, 1], [3, 4]]
    k = [.6, .8], v = [1, 1], decay .5, beta .5   S / 2 = [[.25, .5], [1.5, 2]], recalls [1.35,
    1.9],
                                                  misses [-.35, -.9], adds half of it along k:
    S = [[.145, .23], [1.36, 1.64]],  and [1, 0] reads [.145, .23]
    """
    memory = RecurrentMemory(
        rule="gated_delta", hidden_size=2, num_heads=1, num_state_heads=1, key_dim=2, value_dim=2,
        sliding_window=4, num_sink_tokens=0, key_space="post_rope", center_keys=False,
    )  # fmt: skip
    decay = torch.tensor([1.0, 0.5, 0.5])
    beta = torch.tensor([1.0, 1.0, 0.5])
    with torch.no_grad():
        memory.decay.log_rate.zero_()
        memory.decay.step_bias.zero_()
    # softplus(a) = -log decay; the first decay, 1, is a step that is as good as zero
    step = -decay.log()
    features = torch.stack([step.expm1().clamp(min=1e-30).log(), torch.logit(beta, eps=1e-7)], -1)
    key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    value = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 1.0]])
    writes = torch.ones(1, 3, dtype=torch.bool)
    block = folding(key[None, None], value[None, None], features[None], writes)
    _, (state,) = memory(block, memory.initial_state(1, key))
    expected = torch.tensor([[0.145, 0.23], [1.36, 1.64]])
    assert apart(state[0, 0], expected) < 1e-5
    assert apart(torch.tensor([1.0, 0.0]) @ state[0, 0], torch.tensor([0.145, 0.23])) < 1e-5
    _, (forgot,) = memory(
        replace(block, leaving_features=block.leaving_features.flip(1)),
        memory.initial_state(1, key),
    )
    assert apart(forgot[0, 0], expected) > WRONG


QWEN = {"3B": (2048, 36, 16, 2), "7B": (3584, 28, 28, 4), "14B": (5120, 48, 40, 8)}


def added_parameters(config, method) -> tuple[int, int]:
    """Parameters of the memory and of the base, on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base = sum(p.numel() for p in model.parameters())
    patch(model, method)
    assert all(p.device.type == "meta" for p in model.parameters())
    return sum(p.numel() for p in memory_parameters(model).values()), base


def qwen(size):
    hidden, layers, heads, groups = QWEN[size]
    config = Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, intermediate_size=2 * hidden, vocab_size=1000,
    )  # fmt: skip
    assert hidden // heads == 128
    return config


@pytest.mark.parametrize(
    ("size", "preset", "millions"),
    [
        ("3B", AHN_GDN, 13.0),
        ("7B", AHN_GDN, 21.3),
        ("14B", AHN_GDN, 61.0),
        ("3B", AHN_DN, 11.8),
        ("3B", AHN_MAMBA2, 11.9),
    ],
)
def test_the_released_sizes(size, preset, millions):
    """Table of the authors' model cards, in millions to one digit."""
    added, _ = added_parameters(qwen(size), preset)
    assert round(added / 1e6, 1) == millions


def test_the_size_on_smollm2():
    """1,575 thousand, 1.2 % of SmolLM2-135M (its embeddings are tied)."""
    config = LlamaConfig(
        hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, vocab_size=49152, tie_word_embeddings=True,
    )  # fmt: skip
    added, base = added_parameters(config, AHN_GDN)
    assert round(added / 1e3) == 1575
    assert round(100 * added / base, 1) == 1.2


def test_parameters_per_layer_are_the_formula():
    """GDN 3 E H + H V^2 + 2 H + V, without the parameter per head that the authors' code carries
    and never reads."""
    hidden, heads, width = 32, 4, 8
    expected = {
        "gated_delta": 3 * hidden * heads + heads * width**2 + 2 * heads + width,
        "delta": 2 * hidden * heads + heads * width**2 + width,
        "ssd": 2 * (hidden * heads + heads) + heads * width**2 + heads * width + 2 * heads,
    }
    for rule, count in expected.items():
        model = patch(build("llama", layers=1), AHNConfig(rule=rule, sliding_window=WINDOW))
        assert sum(p.numel() for p in memory_parameters(model).values()) == count


def test_it_starts_silent_but_not_dead():
    """Exactly one factor of the branch is zero: the output map. Decay and step start in the
    published ranges."""
    model = patch(build("llama"), replace(AHN_GDN, sliding_window=WINDOW))
    for name, parameter in memory_parameters(model).items():
        zero = name.endswith("out_map")
        assert (parameter.abs().max() == 0) == zero, name
        if name.endswith("log_rate"):
            assert (parameter.exp() > 0).all()
            assert (parameter.exp() < 16).all()
        if name.endswith("step_bias"):
            assert (F.softplus(parameter) > 0.99e-3).all()
            assert (F.softplus(parameter) < 1.01e-1).all()
