"""The kNN memory against the equations at the head of its file, one token and head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from contract.arms import SINKS, WINDOW, activate
from contract.families import build, tokens
from contract.runs import apart, in_pieces, one_pass
from methods.captured import attention_of
from tolerances import ONE_LAYER, REORDERED, WRONG

from memretrofit.errors import ConfigError, NoTargetError
from memretrofit.methods.knn_memory import KNNMemoryConfig
from memretrofit.methods.window_sinks import WindowSinksConfig
from memretrofit.modules import knn
from memretrofit.retrofit import memory_parameters, patch
from memretrofit.training.transfer import TransferSettings, attention_transfer

LENGTH = 30
EXACT = {"sliding_window": WINDOW, "num_sink_tokens": SINKS}


def model_with(layers: int = 1, opening: float | None = None, **fields):
    model = patch(build("llama", layers=layers), KNNMemoryConfig(**EXACT, **fields))
    if opening is not None:
        with torch.no_grad():
            for parameter in memory_parameters(model).values():
                parameter.fill_(opening)
    return model


def windowed(layers: int = 1):
    return patch(build("llama", layers=layers), WindowSinksConfig(**EXACT))


def turned(x, cos, sin, back=False):
    """Rotary embedding of x [..., K] by (cos, sin) [..., K]."""
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return x * cos - half * sin if back else x * cos + half * sin


# where a query at t and a key at j stand in a search; tokens are counted from the first one stored
PLACES = {
    "absolute": (lambda t: t, lambda j: j),
    "clamp": (lambda t: WINDOW, lambda j: 0),
    "grouped": (
        lambda t: max(t - SINKS, 0) // 3 + WINDOW - WINDOW // 3,
        lambda j: max(j - SINKS, 0) // 3,
    ),
}


def by_hand(found, gates, top_k, *, positions="clamp", late=0, shared=False, cosine=False):
    """(1 - g) window + g far, [T, H, V].

    `late` shifts the token that leaves; `shared` lets the heads of a group choose together;
    `cosine` searches with unit keys (witnesses).
    """
    q, k, v = found.query[0], found.key[0], found.value[0]
    cos, sin = (y[0] for y in found.cos_sin)
    (heads, length, width), groups = q.shape, k.shape[0]
    raw_q, raw_k = (turned(x, cos, sin, back=True) for x in (q, k))
    at_q, at_k = PLACES[positions]
    far_q, far_k = (
        turned(x, cos[[at(t) for t in range(length)]], sin[[at(t) for t in range(length)]])
        for x, at in ((raw_q, at_q), (raw_k, at_k))
    )
    out = torch.zeros(length, heads, v.shape[-1])
    for h in range(heads):
        g = h * groups // heads
        for t in range(length):
            seen = [j for j in range(t + 1) if j < SINKS or j > t - WINDOW]
            local = (k[g, seen] @ q[h, t] / math.sqrt(width)).softmax(0) @ v[g, seen]
            left = list(range(SINKS, t - WINDOW - late + 1))
            if not left:
                out[t, h] = local
                continue
            group = [i for i in range(heads) if i * groups // heads == g]
            asking = far_q[group, t].sum(0) if shared else far_q[h, t]
            ranked = far_k[g, left] @ asking / (far_k[g, left].norm(dim=-1) if cosine else 1)
            best = [left[i] for i in ranked.argsort(descending=True)[:top_k]]
            far = (far_k[g, best] @ far_q[h, t] / math.sqrt(width)).softmax(0) @ v[g, best]
            out[t, h] = (1 - gates[h]) * local + gates[h] * far
    return out


@pytest.mark.parametrize("positions", list(PLACES))
@pytest.mark.parametrize("top_k", [1, 3, 99])
def test_a_gate_mixes_the_window_and_the_nearest_tokens(top_k, positions):
    model = activate(model_with(top_k=top_k, positions=positions, position_group=3))
    found = attention_of(model, tokens(1, LENGTH))
    (opening,) = memory_parameters(model).values()
    gates = opening.detach().tanh()
    case = {"gates": gates, "top_k": top_k, "positions": positions}
    assert apart(found.output[0], by_hand(found, **case)) < ONE_LAYER
    wrong = [{"late": 1}, {"gates": opening.sigmoid()}]
    wrong += [{"positions": "absolute" if positions == "clamp" else "clamp"}]
    if top_k < 9:
        wrong += [{"top_k": top_k + 1}, {"shared": True}, {"cosine": True}]
    for change in wrong:
        assert apart(found.output[0], by_hand(found, **case | change)) > WRONG, change


def test_the_search_is_exact_for_every_size_of_a_piece(monkeypatch):
    """Random queries against all stored keys; pieces of queries change nothing."""
    model, ids = model_with(top_k=5, opening=0.7), tokens(1, 200)
    expected = one_pass(model, ids)
    for scores in (1, 1000):
        monkeypatch.setattr(knn, "SCORES", scores)
        assert apart(one_pass(model, ids), expected) < REORDERED
    _, cache = in_pieces(model, ids, (150,))
    (store,) = cache.layers[0].state
    memory = model.get_submodule("model.layers.0.self_attn.memory")
    query, border = torch.randn(1, 4, 7, 8), torch.tensor([-1, 2, 3, 6, 7, 90, 500])
    index, held = memory.nearest(query, border, store)
    keys, _ = store.live()
    scores = query[0] @ keys[0].repeat_interleave(2, 0).mT  # tokens 0, 1, ... are slots 3, 4, ...
    for h in range(4):
        for t, last in enumerate(border.tolist()):
            count = max(0, min(last - SINKS + 1, keys.shape[2]))
            # a token that returns has its key again: scores tell, and indices would not
            best = scores[h, t, :count].sort(descending=True).values[:5]
            chosen = index[0, h, t][held[0, h, t]]
            assert (chosen < count).all()
            assert len(chosen.unique()) == len(best)
            assert torch.allclose(scores[h, t, chosen].sort(descending=True).values, best)


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_values_lie_elsewhere_and_a_key_is_held_once(placement):
    """The same logits, bit for bit; of 16 numbers per token and head, 8 leave the device, and what
    stays is a key, a slot and the room of hot values. Witness: another text."""
    ids, hot = tokens(2, 200), 4096
    read = {}
    for where in ("device", placement):
        model = model_with(opening=0.7, top_k=5, placement=where, hot_bytes=hot)
        logits, cache = in_pieces(model, ids, (150, 151))
        (store,) = cache.layers[0].state
        memory = model.get_submodule("model.layers.0.self_attn.memory")
        read[where] = logits, store, memory.tier_nbytes(200 - WINDOW - SINKS)
    assert torch.equal(read["device"][0], read[placement][0])
    assert apart(read["device"][0], one_pass(model, tokens(2, 200, seed=1))) > WRONG
    left, groups = 200 - WINDOW - SINKS, 2
    values = left * groups * 8 * 4
    assert read[placement][2] == {"device": values + 8 * left, placement: values}
    assert read["device"][2] == {"device": 2 * values + 8 * left}
    for where, (_, store, predicted) in read.items():
        held = store.tier_nbytes()
        assert store.summary_slab.nbytes == 0
        room = store.block_count() / store.keys.room.shape[0]
        free = 0 if where == "device" else hot
        for tier, expected in predicted.items():
            found = (held[tier] - (free if tier == "device" else 0)) * room / 2  # two rows
            assert abs(found / expected - 1) < 0.01, (where, tier)


@pytest.mark.parametrize("opening", [None, 0.0, -0.5])
def test_a_closed_gate_is_the_window_bit_for_bit(opening):
    """Fresh, or pushed below zero; one pass and pieces, with and without gradients."""
    model, ids = model_with(layers=2, opening=opening), tokens(2, LENGTH)
    expected = one_pass(windowed(layers=2), ids)
    assert torch.equal(one_pass(model, ids), expected)
    assert torch.equal(model(ids, use_cache=False).logits, expected)
    assert apart(one_pass(model_with(layers=2, opening=0.1), ids), expected) > WRONG


def test_an_open_gate_is_the_memory_alone():
    """At g = 1 the window does not count: the first query that finds one token reads its value."""
    found = attention_of(model_with(opening=30.0, top_k=2), tokens(1, LENGTH))
    value = found.value[0, :, SINKS].repeat_interleave(2, dim=0)
    assert apart(found.output[0, WINDOW + SINKS], value) < ONE_LAYER
    assert apart(found.output[0, WINDOW + SINKS - 1], value) > WRONG
    gates = torch.ones(4)
    assert apart(found.output[0], by_hand(found, gates, 2)) < ONE_LAYER


@pytest.mark.parametrize("opening", [0.0, -0.01])
def test_the_closed_gate_gets_a_gradient_and_opens(opening):
    """The target is the same model with open gates; from at or below zero they move up, and not to
    the right place alone: the loss falls."""
    ids = tokens(4, LENGTH)
    target = one_pass(model_with(top_k=99, opening=0.5), ids)
    model = model_with(top_k=99, opening=opening)
    (parameter,) = memory_parameters(model).values()
    optimiser = torch.optim.Adam([parameter], lr=0.05)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = (model(ids, use_cache=False).logits - target).square().mean()
        loss.backward()
        assert (parameter.grad != 0).all()
        optimiser.step()
        losses.append(loss.item())
    assert (parameter > 0.2).all()
    assert losses[-1] < 0.5 * losses[0]


def test_the_other_layers_have_sinks_and_window_alone():
    model, ids = model_with(layers=3, memory_layers=(1,)), tokens(1, LENGTH)
    ((name, _),) = memory_parameters(model).items()
    assert ".1." in name
    assert torch.equal(one_pass(model, ids), one_pass(windowed(layers=3), ids))
    _, cache = in_pieces(model, ids, (20,))
    assert [len(layer.state) for layer in cache.layers] == [0, 1, 0]


def test_attention_transfer_opens_the_gates_of_the_layers_that_have_one():
    model = model_with(layers=3, memory_layers=(1,), top_k=99)
    rows = [{"input_ids": row} for row in tokens(4, LENGTH)]
    steps = attention_transfer(model, rows, TransferSettings(steps=5, learning_rate=0.05))
    (opening,) = memory_parameters(model).values()
    assert (opening != 0).all()
    assert all(len(step.r2) == 1 for step in steps)


def test_memory_layers_that_cannot_be_are_refused():
    with pytest.raises(NoTargetError, match=r"memory_layers=\(1, 5\).*\[5\].*\[0, 1\]"):
        model_with(layers=2, memory_layers=(1, 5))
    with pytest.raises(ConfigError, match=r"memory_layers names \[2\]"):
        KNNMemoryConfig(memory_layers=(1, 2), layers_to_transform=(0, 1))
    with pytest.raises(ConfigError, match=r"memory_layers=\(\)"):
        KNNMemoryConfig(memory_layers=())
    with pytest.raises(ConfigError, match="top_k=0"):
        KNNMemoryConfig(top_k=0)
    with pytest.raises(ConfigError, match="positions='reindexed'"):
        KNNMemoryConfig(positions="reindexed")
