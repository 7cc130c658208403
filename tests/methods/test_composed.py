"""Window, state and store in one layer: what each part adds is what it adds alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.arms import SINKS, WINDOW, activate
from contract.families import build, tokens
from contract.runs import apart, in_pieces, one_pass
from methods.captured import attention_of
from tolerances import ONE_LAYER, WRONG
from training.tiny import base, rows

from memretrofit import AHNConfig, LoLCATsConfig, WindowSinksConfig, patch
from memretrofit.errors import ConfigError
from memretrofit.evaluation.probes import slot_access
from memretrofit.methods.composed import AHN_RECALL, LOLCATS_RECALL, ComposedConfig
from memretrofit.methods.infllm import InfLLMConfig
from memretrofit.patching.controls import intercepted, writes_disabled
from memretrofit.retrofit import memory_parameters
from memretrofit.training import TransferSettings, attention_transfer

LENGTH = 40
NEAR = {"sliding_window": WINDOW, "num_sink_tokens": SINKS}
FAR = {"block_size": 4, "top_k": 2}
PRESETS = {"ahn": AHN_RECALL, "lolcats": LOLCATS_RECALL}
PLAIN = {"ahn": AHNConfig, "lolcats": LoLCATsConfig}
every_state = pytest.mark.parametrize("state", list(PRESETS))
every_space = pytest.mark.parametrize("space", ["post_rope", "pre_rope"])


def taken_over(plain, config):
    """A composed model whose state has the parameters of a plain one, as the method file says."""
    model = patch(build("llama", layers=1), config)
    own = memory_parameters(model)
    with torch.no_grad():
        for name, parameter in memory_parameters(plain).items():
            own.pop(name.replace(".memory.", ".memory.state.")).copy_(parameter)
    assert not own
    return model


@every_state
def test_a_silent_state_is_recall_alone_bit_for_bit(state):
    """Every preset starts so. Witness: an active state."""
    ids = tokens(2, LENGTH)
    model = patch(build("llama"), replace(PRESETS[state], **NEAR, **FAR))
    recall = patch(build("llama"), InfLLMConfig(**NEAR, **FAR))
    expected = one_pass(recall, ids)
    assert torch.equal(one_pass(model, ids), expected)
    ends = (20, 21, 22, 33)
    assert torch.equal(in_pieces(model, ids, ends)[0], in_pieces(recall, ids, ends)[0])
    assert apart(one_pass(activate(model), ids), expected) > WRONG


def test_an_empty_store_and_a_silent_state_are_the_window_bit_for_bit():
    ids = tokens(2, LENGTH)
    model = patch(build("llama"), replace(AHN_RECALL, **NEAR, **FAR, positions="absolute"))
    with writes_disabled(model):
        found = one_pass(model, ids)
    assert torch.equal(found, one_pass(patch(build("llama"), WindowSinksConfig(**NEAR)), ids))
    assert apart(found, one_pass(model, ids)) > WRONG


@every_space
@pytest.mark.parametrize("state_heads", ["query", "key_value"])
@pytest.mark.parametrize("rule", ["gated_delta", "delta", "ssd"])
def test_ahn_adds_to_recall_what_it_adds_to_the_window(rule, state_heads, space):
    """composed = infllm + (ahn - window), with the state taken over from plain AHN. Witness: the
    state's read left out, and added to the window instead."""
    choices = {"rule": rule, "state_heads": state_heads, "key_space": space, "center_keys": True}
    ids = tokens(2, LENGTH)
    plain = activate(patch(build("llama", layers=1), AHNConfig(**NEAR, **choices)))
    model = taken_over(plain, ComposedConfig(state="ahn", **NEAR, **FAR, **choices))
    recall = patch(build("llama", layers=1), InfLLMConfig(**NEAR, **FAR))
    window = patch(build("llama", layers=1), WindowSinksConfig(**NEAR))
    found, alone, recalled, near = (
        attention_of(x, ids).output for x in (model, plain, recall, window)
    )
    assert apart(found, recalled + alone - near) < ONE_LAYER
    assert apart(found, recalled) > WRONG
    assert apart(found, alone) > WRONG


def by_hand(found, memory, *, late=0, window_only=False):
    """(full + w phi(q) S) / (1 + w phi(q) z) with everything recalled, one token at a time:
    [T, H, V].

    `late` shifts the token that enters the state; `window_only` takes the weight from the lse of
    the window alone (witnesses).
    """
    q, k, v = found.query[0], found.key[0], found.value[0]
    far_q, far_k = q, k
    if memory.state.key_space == "pre_rope":
        cos, sin = (y[0] for y in found.cos_sin)

        def half_turned(y):
            return torch.cat([-y[..., 4:], y[..., :4]], -1)

        far_q, far_k = (y * cos - half_turned(y) * sin for y in (q, k))
    (heads, length, width), sharing = q.shape, q.shape[0] // k.shape[0]
    with torch.no_grad():
        read = memory.state.query_map(far_q[None])[0]
        write = memory.state.key_map(memory.state.per_state_head(far_k[None]))[0]
    out = torch.zeros(length, heads, v.shape[-1])
    for h in range(heads):
        g, s = h // sharing, h * write.shape[0] // heads
        for t in range(length):
            scores = k[g, : t + 1] @ q[h, t] / width**0.5
            full = scores.softmax(0) @ v[g, : t + 1]
            j = torch.arange(t + 1)
            near = scores[(j < SINKS) | (j > t - WINDOW)] if window_only else scores
            left = slice(SINKS, max(SINKS, t - WINDOW - late + 1))
            mass = write[s, left] @ read[h, t]
            weight = memory.state.state_weight(near.logsumexp(0).expand(1, heads, 1))[0, h, 0]
            out[t, h] = (full + weight * (mass @ v[g, left])) / (1 + weight * mass.sum())
    return out.detach()


@every_space
@pytest.mark.parametrize("state_heads", ["query", "key_value"])
def test_lolcats_shares_the_normaliser_of_window_and_recalled(state_heads, space):
    choices = {"state_heads": state_heads, "key_space": space}
    plain = activate(patch(build("llama", layers=1), LoLCATsConfig(**NEAR, **choices)))
    everything = {"block_size": 4, "top_k": LENGTH, "positions": "absolute"}
    model = taken_over(plain, replace(LOLCATS_RECALL, **NEAR, **everything, **choices))
    memory = model.model.layers[0].self_attn.memory
    found = attention_of(model, tokens(1, LENGTH))
    assert apart(found.output[0], by_hand(found, memory)) < ONE_LAYER
    for wrong in ({"late": 1}, {"window_only": True}):
        assert apart(found.output[0], by_hand(found, memory, **wrong)) > 50 * ONE_LAYER, wrong


@every_state
def test_the_state_is_that_of_the_plain_method_and_a_plain_one_can_be_taken_over(state):
    """Left padding included: the state meets the keys that the model made, wherever it put them."""
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :7] = 0
    plain = activate(patch(build("llama", layers=1), PLAIN[state](**NEAR)))
    model = taken_over(plain, replace(PRESETS[state], **NEAR, **FAR))
    caches = [in_pieces(x, ids, (15, 16, 30), mask=mask)[1] for x in (plain, model)]
    alone, (store, together) = (cache.layers[0].state for cache in caches)
    assert torch.equal(together, alone[0])
    assert store.live()[0].shape[2] == LENGTH - WINDOW - SINKS


@every_state
def test_slots_are_accessed_as_in_the_plain_method(state):
    plain = activate(patch(build("llama", layers=1), PLAIN[state](**NEAR)))
    model = taken_over(plain, replace(PRESETS[state], **NEAR, **FAR))
    ids = tokens(1, LENGTH)
    found, expected = slot_access(model, ids), slot_access(plain, ids)
    assert torch.equal(found.writes[0].shares, expected.writes[0].shares)
    assert torch.equal(found.reads[0].shares, expected.reads[0].shares)


@every_space
def test_calibration_sees_the_keys_in_the_space_of_the_state(space):
    """The means that LoLCATs takes from the model are those of plain LoLCATs. Witness: the other
    space."""
    means = {}
    for config in (
        LoLCATsConfig(**NEAR, key_space=space),
        replace(LOLCATS_RECALL, **NEAR, **FAR, key_space=space),
        LoLCATsConfig(**NEAR, key_space="pre_rope" if space == "post_rope" else "post_rope"),
    ):
        model = patch(build("llama", layers=1), config)

        def show(call):
            call.calibrate()
            return call.full()

        with torch.no_grad(), intercepted(model, show):
            model(tokens(2, LENGTH), use_cache=False)
        found = memory_parameters(model)
        (name,) = (name for name in found if name.endswith("key_map.mean"))
        means[len(means)] = found[name].detach()
    assert torch.equal(means[1], means[0])
    assert apart(means[2], means[0]) > WRONG


def test_attention_transfer_teaches_the_state_what_recall_leaves():
    """Before the first step the loss is that of recall alone, below the window's 1; then it
    falls."""
    config = replace(LOLCATS_RECALL, sliding_window=16, num_sink_tokens=2, **FAR)
    model = patch(base(), config)
    settings = TransferSettings(steps=30, windows=(16,), sinks=(2,), batch_size=4)
    steps = attention_transfer(model, rows(count=120), settings)
    assert steps[0].loss < 0.99
    assert sum(step.loss for step in steps[-6:]) / 6 < 0.97 * steps[0].loss


def test_choices_that_the_state_does_not_have_are_refused():
    for wrong in ({"rule": "delta"}, {"center_keys": True}):
        with pytest.raises(ConfigError, match="state='ahn'"):
            replace(LOLCATS_RECALL, **wrong)
    with pytest.raises(ConfigError, match="block_size=9"):
        replace(AHN_RECALL, sliding_window=8, block_size=9)
