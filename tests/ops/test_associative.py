"""DPFP, the read and the write by hand, and the parallel write against its definition."""

from __future__ import annotations

import pytest
import torch
from rule_cases import difference

from memretrofit.ops import recurrent_delta
from memretrofit.ops.associative import (
    EPSILON,
    associative_read,
    associative_write,
    dpfp,
    recurrent_associative_write,
)

both = pytest.mark.parametrize("write", [recurrent_associative_write, associative_write])
NEGLIGIBLE = 4 * EPSILON
"""What EPSILON may change where keys have length one: a share of it in each of a few factors."""


def empty(batch: int, features: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    zeros = torch.zeros(batch, features, size, dtype=torch.float64)
    return zeros, zeros[..., 0]


def row(*values: float) -> torch.Tensor:
    """[1, 1, n]"""
    return torch.tensor(values, dtype=torch.float64)[None, None]


def case(count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Keys [3, M, 12], values [3, M, 5], strengths, and a state that was written to."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    norm = normal(3, 12).abs()
    return (
        dpfp(normal(3, count, 3), 2),
        normal(3, count, 5),
        normal(3, count).sigmoid(),
        normal(3, 12, 5),
        norm * torch.tensor([0.0, 0.1, 1.0])[:, None],
    )


def test_dpfp_by_hand():
    """u = [1, -2]: r = [1, 0, 0, 2], rolled by one [2, 1, 0, 0], by two [0, 2, 1, 0], by three
    [0, 0, 2, 1].
    """
    u = torch.tensor([1.0, -2.0])
    assert dpfp(u, 1).tolist() == [2, 0, 0, 0]
    assert dpfp(u, 3).tolist() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]


def test_dpfp_is_products_of_places():
    """Feature (s, i) is r_i r_(i - s). At shift d there is nothing, beyond it nothing new."""
    u = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r = [max(x, 0.0) for x in u.tolist()] + [max(-x, 0.0) for x in u.tolist()]
    found = dpfp(u, 11).view(11, 12)
    assert found.tolist() == [[r[i] * r[(i - s) % 12] for i in range(12)] for s in range(1, 12)]
    assert not found[5].any()
    for shift in range(1, 6):
        torch.testing.assert_close(found[shift - 1].sort()[0], found[11 - shift].sort()[0])


@both
def test_two_keys_in_one_write_by_hand(write):
    """A = [[4, 0], [0, 0]], z = [2, 0];  k = [1, 1] and [0, 2], v = [1, 1] and [0, 3], beta 1, 1/2.

    k1 recalls [4, 0] / 2 = [2, 0] and lacks [-1, 1]; z k1 / |k1|^2 = 1.
    k2 recalls 0 / eps = 0, lacks [0, 3], gets half of it; z k2 = 0.
    A' = A + [[-1, 1], [-1, 1]] + [[0, 0], [0, 3]];  z' = z + 0 k1 + 1 k2.
    """
    k, v = torch.cat([row(1, 1), row(0, 2)], 1), torch.cat([row(1, 1), row(0, 3)], 1)
    matrix = torch.tensor([[[4.0, 0], [0, 0]]], dtype=torch.float64)
    norm = torch.tensor([[2.0, 0]], dtype=torch.float64)
    found, grown = write(k, v, row(1, 0.5)[0], matrix, norm)
    expected = torch.tensor([[[3.0, 1], [-1, 4]]]).double()
    torch.testing.assert_close(found, expected, atol=NEGLIGIBLE, rtol=0)
    torch.testing.assert_close(grown, torch.tensor([[2.0, 2]]).double(), atol=NEGLIGIBLE, rtol=0)
    # witness: had k2 met what k1 wrote, it would have recalled [-2, 2] / eps
    one, norm_one = write(k[:, :1], v[:, :1], row(1)[0], matrix, norm)
    after, _ = write(k[:, 1:], v[:, 1:], row(0.5)[0], one, norm_one)
    assert difference(after, found) > 0.1


@both
def test_a_key_reads_back_its_value_and_then_its_last_one(write):
    """Written once: v1. Written again with beta = 1: v2, and the norm stays. With beta = 1/2: their
    mean. Witness: without the correction the norm would be twice the key."""
    k, v1, v2 = dpfp(row(1, -2, 0.5), 2), row(1, 2, 3), row(-4, 0, 4)
    once = write(k, v1, row(1)[0], *empty(1, 12, 3))
    torch.testing.assert_close(associative_read(k, *once), v1, atol=NEGLIGIBLE, rtol=0)
    torch.testing.assert_close(once[1], k[:, 0], atol=NEGLIGIBLE, rtol=0)
    for beta, expected in ((1.0, v2), (0.5, (v1 + v2) / 2)):
        twice = write(k, v2, row(beta)[0], *once)
        torch.testing.assert_close(associative_read(k, *twice), expected, atol=NEGLIGIBLE, rtol=0)
        torch.testing.assert_close(twice[1], once[1], atol=NEGLIGIBLE, rtol=0)
        assert difference(twice[1], 2 * once[1]) > 0.4
    other = write(k, v2, row(0)[0], *once)
    torch.testing.assert_close(associative_read(k, *other), v1, atol=NEGLIGIBLE, rtol=0)


def test_an_empty_state_reads_exactly_zero():
    q = dpfp(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)), 2)
    read = associative_read(q, torch.zeros(2, 12, 4), torch.zeros(2, 12))
    assert torch.equal(read, torch.zeros(2, 5, 4))


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_the_parallel_write_is_its_definition(count):
    """State and every gradient. Witness: keys that meet each other's writes."""
    forms, inputs = (recurrent_associative_write, associative_write), case(count)
    found = []
    for form in forms:
        leaves = [x.clone().requires_grad_() for x in inputs]
        state = form(*leaves)
        make = torch.Generator().manual_seed(1)
        weights = [torch.randn(x.shape, generator=make, dtype=torch.float64) for x in state]
        torch.autograd.backward(state, weights)
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        found.append([*state, *gradients])
    for expected, x in zip(*found, strict=True):
        assert difference(x, expected) < 1e-12
    if count > 1:
        matrix, norm = inputs[3:]
        for i in range(count):
            k, v, beta = (x[:, i : i + 1] for x in inputs[:3])
            matrix, norm = recurrent_associative_write(k, v, beta, matrix, norm)
        assert difference(matrix, found[0][0]) > 1e-3
        assert difference(norm, found[0][1]) > 1e-3


def test_no_gradient_goes_through_what_the_norm_lacks():
    """z' = z + c k with c held fixed: dz'/dz is one, not one minus something."""
    k, v, beta, matrix, norm = case(4)
    norm.requires_grad_()
    _, grown = associative_write(k, v, beta, matrix, norm)
    (gradient,) = torch.autograd.grad(grown.sum(), norm)
    assert torch.equal(gradient, torch.ones_like(norm))
    assert not torch.equal(grown.detach() - norm.detach(), k.sum(1))  # some keys were known


@both
def test_orthonormal_keys_one_by_one_are_the_delta_rule(write):
    """A key that comes back among them too. Witness: keys that overlap."""
    keys, v = torch.eye(6).double()[[2, 0, 5, 2, 1]][None], case(5)[1][:1]
    beta = case(5)[2][:1]

    def apart(keys: torch.Tensor) -> float:
        state = empty(1, 6, 5)
        for k_i, v_i, b_i in zip(keys.unbind(1), v.unbind(1), beta.unbind(1), strict=True):
            state = write(k_i[:, None], v_i[:, None], b_i[:, None], *state)
        _, expected = recurrent_delta(keys[:, None], keys[:, None], v[:, None], None, beta[:, None])
        return difference(state[0], expected[:, 0])

    assert apart(keys) < NEGLIGIBLE
    assert apart(torch.nn.functional.normalize(keys + 0.2, dim=-1)) > 1e-2


@both
def test_half_precision_is_widened_and_autocast_ignored(write):
    """bfloat16 operands give what their float32 twins give, bit for bit."""
    k, v, beta, matrix, norm = (x.float() for x in case(3))
    exact = write(k.bfloat16().float(), v.bfloat16().float(), beta, matrix, norm)
    with torch.autocast("cpu", torch.bfloat16):
        found = write(k.bfloat16(), v.bfloat16(), beta, matrix, norm)
        read = associative_read(k, matrix, norm)
    for x, expected in zip(found, exact, strict=True):
        assert x.dtype is torch.float32
        assert torch.equal(x, expected)
    assert torch.equal(read, associative_read(k, matrix, norm))
