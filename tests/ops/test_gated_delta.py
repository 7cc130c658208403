"""The gated delta rule by hand, in its limits, and beside another implementation."""

from __future__ import annotations

import math

import pytest
import torch
from rule_cases import difference, operands

from memretrofit.ops import chunk_gated_delta, recurrent_gated_delta, recurrent_linear

both = pytest.mark.parametrize("rule", [recurrent_gated_delta, chunk_gated_delta])


def decay_after_the_correction(q, k, v, g, beta, *, scale, initial_state):
    """The wrong variant that the tolerances below must reject: S = exp(g) (S + β k (v − Sᵀ k)ᵀ)."""
    state, reads = initial_state, []
    for t in range(k.shape[2]):
        key, strength = k[:, :, t, :, None], beta[:, :, t, None, None]
        error = v[:, :, t, None] - key.mT @ state
        state = g[:, :, t, None, None].exp() * (state + strength * key * error)
        reads.append(scale * q[:, :, t, None] @ state)
    return torch.cat(reads, 2), state


@both
def test_three_tokens_by_hand(rule):
    """Write k1 = [1, 0], v1 = [1, 2];  k2 = [0, 1], v2 = [3, 4];  k3 = [.6, .8], v3 = [1, 1].

    Before the second and third the state halves; their β are 1 and ½.
    S1 = [[1, 2], [0, 0]]. It fades to [[.5, 1], [0, 0]], k2 recalls [0, 0]: S2 = [[.5, 1], [3, 4]].
    S2 fades to [[.25, .5], [1.5, 2]], k3 recalls .6 [.25, .5] + .8 [1.5, 2] = [1.35, 1.9] and lacks
    [-.35, -.9]; half of it is written: S3 = [[.25 − .105, .5 − .27], [1.5 − .14, 2 − .36]].
    """
    k = torch.tensor([[[[1, 0], [0, 1], [0.6, 0.8]]]]).double()
    v = torch.tensor([[[[1, 2], [3, 4], [1, 1]]]]).double()
    q = torch.tensor([[[[1, 0], [1, 0], [1, 0]]]]).double()
    g = torch.tensor([[[0, math.log(0.5), math.log(0.5)]]]).double()
    beta = torch.tensor([[[1, 1, 0.5]]]).double()
    final = torch.tensor([[[[0.145, 0.23], [1.36, 1.64]]]]).double()
    o, state = rule(q, k, v, g, beta, scale=1)
    torch.testing.assert_close(state, final)
    torch.testing.assert_close(o, torch.tensor([[[[1, 2], [0.5, 1], [0.145, 0.23]]]]).double())
    torch.testing.assert_close(rule(q, k, v, g, beta)[0], o * 2**-0.5)  # scale is K ** -0.5
    empty = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    wrong = decay_after_the_correction(q, k, v, g, beta, scale=1, initial_state=empty)
    assert difference(wrong[1], final) > 0.1


@both
def test_orthonormal_keys_make_it_a_decaying_sum(rule):
    x = operands("gated_delta", 8, heads=2)
    x["k"] = torch.linalg.qr(torch.randn(2, 2, 8, 8, dtype=torch.float64)).Q
    x["initial_state"] = x["beta"] = None
    for found, expected in zip(rule(**x), recurrent_linear(**x), strict=True):
        assert difference(found, expected) < 1e-12


@both
@pytest.mark.parametrize("time", [1, 63, 130])
def test_another_implementation_agrees(rule, time):
    """Transformers' reference of the rule, in both its forms; layout [B, T, H, K], float32."""
    from transformers.models.qwen3_next import modeling_qwen3_next as reference

    x = operands("gated_delta", time, heads=2, dtype=torch.float32)
    found, state = rule(**x)
    swapped = [x[n].transpose(1, 2) for n in ("q", "k", "v", "g", "beta")]
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        expected, final = getattr(reference, name)(
            *swapped, initial_state=x["initial_state"], output_final_state=True
        )
        assert difference(found, expected.transpose(1, 2)) < 1e-5
        assert difference(state, final) < 1e-5
    wrong, wrong_state = decay_after_the_correction(**x, scale=8**-0.5)
    assert difference(wrong, found) > 1e-2
    assert difference(wrong_state, state) > 1e-2
