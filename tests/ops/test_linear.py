"""The linear rule by hand, and in the limits that it reduces to."""

from __future__ import annotations

import math

import torch
from rule_cases import difference, operands

from memretrofit.ops import chunk_linear, recurrent_linear


def test_three_tokens_by_hand():
    """Write k1 = [1, 0], v1 = [1, 2];  k2 = [0, 1], v2 = [3, 4];  k3 = [.6, .8], v3 = [1, 1].

    Before the second and third the state halves; their β are 1 and ½.
    S1 = [[1, 2], [0, 0]];  S2 = ½ S1 + [[0, 0], [3, 4]] = [[.5, 1], [3, 4]];
    S3 = ½ S2 + ½ [[.6, .6], [.8, .8]] = [[.55, .8], [1.9, 2.4]].
    Reads at scale 2: [1, 0] gives 2 [1, 2];  [0, 1] gives 2 [3, 4];  [1, 1] gives 2 [2.45, 3.2].
    """
    k = torch.tensor([[[[1, 0], [0, 1], [0.6, 0.8]]]]).double()
    v = torch.tensor([[[[1, 2], [3, 4], [1, 1]]]]).double()
    q = torch.tensor([[[[1, 0], [0, 1], [1, 1]]]]).double()
    g = torch.tensor([[[0, math.log(0.5), math.log(0.5)]]]).double()
    beta = torch.tensor([[[1, 1, 0.5]]]).double()
    reads = torch.tensor([[[[2, 4], [6, 8], [4.9, 6.4]]]]).double()
    final = torch.tensor([[[[0.55, 0.8], [1.9, 2.4]]]]).double()
    for rule in (recurrent_linear, chunk_linear):
        o, state = rule(q, k, v, g, beta, scale=2)
        torch.testing.assert_close(o, reads)
        torch.testing.assert_close(state, final)
        # Witness: decay that comes one position late is another memory.
        assert difference(rule(q, k, v, g.roll(1, -1), beta, scale=2)[1], final) > 0.1


def test_without_decay_it_is_attention_without_softmax():
    x = operands("ssd", 37, heads=2)
    q, k, v = x["q"], x["k"], x["v"]
    scores = (q @ k.mT) * 8**-0.5
    for rule in (recurrent_linear, chunk_linear):
        o, _ = rule(q, k, v)
        assert difference(o, scores.tril() @ v) < 1e-12
        assert (
            difference(o, scores.tril(-1) @ v) > 1e-3
        )  # a writer must be read at its own position


def test_strength_is_a_factor_of_the_key():
    """Mamba-2 multiplies its input by dt; the rule takes it as β. Both are one memory."""
    x = operands("ssd", 37)
    o, state = chunk_linear(**x)
    beta = x.pop("beta")
    x["k"] = x["k"] * beta[..., None]
    folded, folded_state = chunk_linear(**x)
    assert difference(folded, o) < 1e-12
    assert difference(folded_state, state) < 1e-12
