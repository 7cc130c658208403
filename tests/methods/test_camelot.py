"""CAMELoT against the equations at the head of its file, one token and one head at a time."""

from __future__ import annotations

import math

import pytest
import torch
from contract.arms import SINKS, WINDOW
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass, positions_of
from methods.captured import attention_of
from tolerances import ONE_LAYER, REORDERED, WRONG

from memretrofit.errors import ConfigError
from memretrofit.methods.camelot import CAMELoTConfig
from memretrofit.patching.ledger import ledger_of
from memretrofit.retrofit import patch

LENGTH = 30


def model_with(layers: int = 1, **fields):
    config = CAMELoTConfig(sliding_window=WINDOW, num_sink_tokens=SINKS, **fields)
    return patch(build("llama", layers=layers), config)


def turned(x, cos, sin, back=False):
    """Rotary embedding of x [..., K] by (cos, sin) [..., K]."""
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    return x * cos - half * sin if back else x * cos + half * sin


def without_positions(found):
    """Queries and keys before their rotation, and those queries at the border of the window."""
    cos, sin = (y[0] for y in found.cos_sin)
    q, k = (turned(x, cos, sin, back=True) for x in (found.query[0], found.key[0]))
    return k, turned(q, cos[WINDOW], sin[WINDOW])


def with_sinks_at_their_slots(found):
    """Scores of all queries with all keys [H, T, T], where sinks stand at most W + N - 1 back."""
    q, k = found.query[0], found.key[0].repeat_interleave(2, dim=0)
    cos, sin = (y[0] for y in found.cos_sin)
    steps = (torch.arange(LENGTH) - (WINDOW + SINKS - 1)).clamp(min=0)
    near_q = turned(q, cos[steps], sin[steps], back=True)
    is_sink = torch.arange(LENGTH) < SINKS
    return torch.where(is_sink, near_q @ k.mT, q @ k.mT) / math.sqrt(k.shape[-1])


def by_hand(found, count, threshold, *, late=0, rotated=False, weigh=False):
    """softmax over window and modes: [T, H, V].

    `late` shifts the token that leaves; `rotated` averages keys after their rotation; `weigh` lets
    a mode count as many times as it has tokens (witnesses).
    """
    q, k, v = found.query[0], found.key[0], found.value[0]
    bare, far_q = without_positions(found)
    bare, near = k if rotated else bare, with_sinks_at_their_slots(found)
    (heads, length, width), groups = q.shape, k.shape[0]
    out = torch.zeros(length, heads, v.shape[-1])
    for h in range(heads):
        g, modes = h * groups // heads, []  # each mode: key, value, count, last written
        for t in range(length):
            leaver = t - WINDOW - late
            if leaver >= SINKS:
                key, value = bare[g, leaver], v[g, leaver]
                likeness = [key @ m[0] / (key.norm() * m[0].norm()) for m in modes]
                if modes and max(likeness) >= threshold:
                    m = modes[likeness.index(max(likeness))]
                    m[2] += 1
                    m[0], m[1] = m[0] + (key - m[0]) / m[2], m[1] + (value - m[1]) / m[2]
                    m[3] = t
                else:
                    if len(modes) == count:
                        modes.pop(min(range(count), key=lambda n: modes[n][3]))
                    modes.append([key, value, 1, t])
            seen = [j for j in range(t + 1) if j < SINKS or j > t - WINDOW]
            scores = [near[h, t, j] for j in seen]
            scores += [
                far_q[h, t] @ m[0] / math.sqrt(width) + weigh * math.log(m[2]) for m in modes
            ]
            values = torch.stack([v[g, j] for j in seen] + [m[1] for m in modes])
            out[t, h] = torch.stack(scores).softmax(0) @ values
    return out


@pytest.mark.parametrize(
    ("count", "threshold"), [(4, 0.3), (3, 0.6), (50, 0.3), (4, 2.0), (50, 2.0), (4, -1.0)]
)
def test_window_and_modes_share_one_softmax(count, threshold):
    found = attention_of(
        model_with(num_modes=count, similarity_threshold=threshold), tokens(1, LENGTH)
    )
    assert apart(found.output[0], by_hand(found, count, threshold)) < ONE_LAYER
    wrong = [(count, threshold, {"late": 1}), (count, threshold, {"rotated": True})]
    if threshold < 1:
        wrong += [(count, 1.5, {}), (count, threshold, {"weigh": True})]
    if count < 9 and threshold > 0:
        wrong += [(count + 1, threshold, {})]
    for other_count, other_threshold, change in wrong:
        other = by_hand(found, other_count, other_threshold, **change)
        assert apart(found.output[0], other) > WRONG, change


@pytest.mark.parametrize("count", [5, LENGTH])
def test_above_one_it_is_attention_over_the_last_tokens_that_left(count):
    """With room for all: full attention in which what left stands at the border of the window."""
    found = attention_of(model_with(num_modes=count, similarity_threshold=1.5), tokens(2, LENGTH))
    bare, far_q = without_positions(found)
    t, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    near = (j <= t) & ((j > t - WINDOW) | (j < SINKS))
    far = (j <= t - WINDOW) & (j > t - WINDOW - count) & (j >= SINKS)
    bare, v = (x.repeat_interleave(2, 0) for x in (bare, found.value[0]))
    far_scores = far_q @ bare.mT / math.sqrt(bare.shape[-1])
    scores = torch.where(far, far_scores, with_sinks_at_their_slots(found))
    weights = scores.masked_fill(~(near | far), -torch.inf).softmax(-1)
    assert apart(found.output[0], (weights @ v).transpose(0, 1)) < ONE_LAYER
    fewer = scores.masked_fill(~(near | far & (j > t - WINDOW - count + 1)), -torch.inf).softmax(-1)
    assert count == LENGTH or apart(found.output[0], (fewer @ v).transpose(0, 1)) > WRONG


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_modes_that_merge_and_are_overwritten_are_the_same_in_any_split(threshold):
    """More than a block of queries, in two layers, with padding: what sizes of the contract do not
    reach."""
    model = model_with(layers=2, num_modes=16, similarity_threshold=threshold)
    rows = [tokens(1, length, seed=n)[0] for n, length in enumerate((200, 171))]
    ids, mask = left_padded(rows, extra=3)
    pieces, cache = in_pieces(model, ids, (13, 14, 60, 190, 191), mask=mask)
    whole = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    assert apart(pieces, whole) < REORDERED
    for n, row in enumerate(rows):
        alone = one_pass(model, row[None])[0]
        assert apart(whole[n, -len(row) :], alone) < REORDERED
    (_, counts, _) = cache.layers[0].state
    left = torch.tensor([200, 171])[:, None] - WINDOW - SINKS
    assert (counts.sum(-1) < left).any()  # some modes were overwritten
    assert (counts > 1).any()


def test_the_state_has_the_bytes_it_says_after_any_text():
    model = model_with(num_modes=7)
    (seam,) = ledger_of(model).seams.values()
    for length in (12, 100):
        _, cache = in_pieces(model, tokens(1, length), (length - 1,))
        held = sum(x.nbytes for x in cache.layers[0].state)
        assert held == seam.memory.state_nbytes(length) == 4 * 2 * 7 * (8 + 8 + 2)


def test_a_memory_without_modes_is_refused():
    with pytest.raises(ConfigError, match="num_modes=0"):
        CAMELoTConfig(num_modes=0)
