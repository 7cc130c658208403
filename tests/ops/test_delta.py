"""The delta rule by hand, and in the limits that it reduces to."""

from __future__ import annotations

import pytest
import torch
from rule_cases import difference, operands

from memretrofit.ops import (
    chunk_delta,
    chunk_gated_delta,
    recurrent_delta,
    recurrent_gated_delta,
    recurrent_linear,
)

both = pytest.mark.parametrize("rule", [recurrent_delta, chunk_delta])


@both
def test_three_tokens_by_hand(rule):
    """Write k1 = [1, 0], v1 = [1, 2];  k2 = k1, v2 = [3, 4], β ½;  k3 = [.6, .8], v3 = [1, 1].

    S1 = [[1, 2], [0, 0]];  k2 recalls [1, 2], lacks [2, 2], gets half of it: S2 = [[2, 3], [0, 0]];
    k3 recalls [1.2, 1.8] and lacks [-.2, -.8]: S3 = [[2 − .12, 3 − .48], [−.16, −.64]].
    """
    k = torch.tensor([[[[1, 0], [1, 0], [0.6, 0.8]]]]).double()
    v = torch.tensor([[[[1, 2], [3, 4], [1, 1]]]]).double()
    beta = torch.tensor([[[1, 0.5, 1]]]).double()
    q = torch.tensor([[[[1, 0], [1, 0], [0.6, 0.8]]]]).double()
    o, state = rule(q, k, v, None, beta, scale=1)
    final = torch.tensor([[[[1.88, 2.52], [-0.16, -0.64]]]]).double()
    torch.testing.assert_close(state, final)
    torch.testing.assert_close(o, torch.tensor([[[[1, 2], [2, 3], [1, 1]]]]).double())
    assert difference(recurrent_linear(q, k, v, None, beta, scale=1)[1], final) > 0.1


@both
def test_a_unit_key_recalls_only_its_last_value(rule):
    x = operands("delta", 9, heads=2, key=16)
    x["k"][:, :, 8] = x["k"][:, :, 2]
    x["q"], x["beta"] = x["k"], torch.ones_like(x["beta"])
    o, state = rule(**x, scale=1.0)
    assert difference(o, x["v"]) < 1e-12
    first = (x["k"][:, :, 2, None] @ state)[:, :, 0]
    assert difference(first, x["v"][:, :, 8]) < 1e-12
    assert difference(first, x["v"][:, :, 2]) > 0.1


@both
def test_it_is_the_gated_rule_at_no_decay(rule):
    x = operands("delta", 45)
    gated = recurrent_gated_delta if rule is recurrent_delta else chunk_gated_delta
    for found, expected in zip(
        rule(**x), gated(**x | {"g": torch.zeros_like(x["beta"])}), strict=True
    ):
        assert difference(found, expected) < 1e-12
        # Witness: even a faint decay is told apart.
    faint, _ = gated(**x | {"g": torch.full_like(x["beta"], -1e-4)})
    assert difference(faint, rule(**x)[0]) > 1e-6


@both
def test_orthonormal_keys_make_it_the_linear_rule(rule):
    x = operands("delta", 8, heads=2)
    x["k"] = torch.linalg.qr(torch.randn(2, 2, 8, 8, dtype=torch.float64)).Q
    x["initial_state"] = x["beta"] = None
    for found, expected in zip(rule(**x), recurrent_linear(**x), strict=True):
        assert difference(found, expected) < 1e-12
    skew = x | {"k": x["k"] + 0.01}
    assert difference(rule(**skew)[0], recurrent_linear(**skew)[0]) > 1e-4


@both
def test_a_decay_is_refused_not_ignored(rule):
    x = operands("gated_delta", 5)
    with pytest.raises(ValueError, match="Use gated_delta"):
        rule(**x)
