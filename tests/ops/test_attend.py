"""Exact attention with its normaliser, and the merge of parts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rule_cases import difference

from memretrofit.ops import attend, merge
from memretrofit.ops.attend import merge_all


def draw(seed=0, *, time=5, keys=9, heads=4, groups=2, dtype=torch.float64):
    make = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, time, 8), (2, groups, keys, 8), (2, groups, keys, 6)]
    return [torch.randn(s, generator=make, dtype=torch.float64).to(dtype) for s in shapes]


def spelled_out(q, k, v, mask, scale=8**-0.5, softcap=None):
    """One softmax per query in Python, with k and v looked up per query head."""
    o = q.new_zeros(*q.shape[:3], v.shape[-1])
    lse = q.new_full(q.shape[:3], -math.inf)
    repeats = q.shape[1] // k.shape[1]
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = mask[b, h, t]
        if seen.any():
            s = k[b, h // repeats, seen] @ q[b, h, t] * scale
            s = s if softcap is None else softcap * torch.tanh(s / softcap)
            lse[b, h, t] = s.logsumexp(0)
            o[b, h, t] = s.softmax(0) @ v[b, h // repeats, seen]
    return o, lse


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("shape", [(2, 4, 5, 9), (1, 1, 5, 9), (2, 1, 5, 9), (1, 4, 5, 9)])
def test_it_is_softmax_attention(softcap, scale, shape):
    q, k, v = draw()
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 2, :] = False
    o, lse = attend(q, k, v, mask, scale=scale, softcap=softcap)
    full = mask.expand(2, 4, 5, 9)
    expected, normaliser = spelled_out(q, k, v, full, scale or 8**-0.5, softcap)
    assert difference(o, expected) < 1e-12
    assert torch.equal(lse == -math.inf, normaliser == -math.inf)
    assert (lse - normaliser).nan_to_num(0.0).abs().max() < 1e-12
    assert (o[:, :, 2] == 0).all()
    assert difference(o, spelled_out(q, k, v, full, 1.0, softcap)[0]) > 1e-3  # another scale
    assert difference(o, spelled_out(q, k.flip(1), v, full, scale or 8**-0.5)[0]) > 1e-3


def test_it_is_what_torch_computes():
    q, k, v = draw(dtype=torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(attend(q, k, v)[0], expected)


def test_half_precision_is_accumulated_in_float32():
    q, k, v = draw(dtype=torch.bfloat16, keys=300)
    expected, normaliser = attend(q.float(), k.float(), v.float())
    o, lse = attend(q, k, v)
    assert o.dtype == lse.dtype == torch.float32
    assert torch.equal(o, expected)
    with torch.autocast("cpu", torch.bfloat16):
        o, lse = attend(q, k, v)
    assert torch.equal(o, expected)
    assert torch.equal(lse, normaliser)


def test_gradients_are_those_of_softmax_and_finite_where_nothing_is_visible():
    leaves = [x.requires_grad_() for x in draw(time=3, keys=4, heads=2, groups=1)]
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool()[None, None]

    def call(q, k, v):
        o, lse = attend(q, k, v, mask, softcap=3.0)
        return o, lse[:, :, ::2]  # -inf has no finite difference

    assert torch.autograd.gradcheck(call, leaves)
    o, lse = attend(*leaves, mask)
    (o.sum() + lse.nan_to_num(neginf=0.0).sum()).backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert (leaves[0].grad[:, :, 1] == 0).all()


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 5, 0, dtype=torch.bool)])
def test_no_keys_give_the_neutral_element(mask):
    q, k, v = draw(keys=0)
    o, lse = attend(q, k, v, mask)
    assert torch.equal(o, torch.zeros(2, 4, 5, 6, dtype=torch.float64))
    assert torch.equal(lse, torch.full((2, 4, 5), -math.inf, dtype=torch.float64))


def test_what_it_cannot_read_is_refused():
    q, k, v = draw()
    with pytest.raises(ValueError, match="3 query heads cannot share 2"):
        attend(q[:, :3], k, v)
    with pytest.raises(ValueError, match="boolean"):
        attend(q, k, v, torch.zeros(1, 1, 5, 9))


@given(seed=st.integers(0, 1000), parts=st.integers(1, 5), assignment=st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_any_partition_merges_to_the_undivided_softmax(seed, parts, assignment):
    """Values and gradients; parts that are empty, for every query or some, are among the draws."""
    owner = torch.tensor(
        assignment.draw(st.lists(st.integers(0, parts - 1), min_size=9, max_size=9))
    )
    mask = torch.rand(2, 1, 5, 9, generator=torch.Generator().manual_seed(seed)) < 0.6
    whole = [x.requires_grad_() for x in draw(seed)]
    pieces = [x.detach().clone().requires_grad_() for x in whole]
    q, k, v = pieces
    expected, normaliser = attend(*whole, mask)
    o, lse = attend(q, k, v, torch.zeros_like(mask))
    for part in range(parts):
        own = owner == part
        o, lse = merge(o, lse, *attend(q, k[:, :, own], v[:, :, own], mask[..., own]))
    assert difference(o, expected) < 1e-12
    assert torch.equal(lse == -math.inf, normaliser == -math.inf)
    weight = torch.arange(6, dtype=torch.float64)
    for output, normal in ((expected, normaliser), (o, lse)):
        ((output * weight).sum() + normal[normal > -math.inf].sum()).backward()
    for found, wanted in zip(pieces, whole, strict=True):
        assert difference(found.grad, wanted.grad) < 1e-10


def test_the_tolerance_of_merge_rejects_the_plain_mean():
    q, k, v = draw()
    left, right = attend(q, k[:, :, :3], v[:, :, :3]), attend(q, k[:, :, 3:], v[:, :, 3:])
    expected, _ = attend(q, k, v)
    assert difference(merge(*left, *right)[0], expected) < 1e-12
    assert difference((left[0] + right[0]) / 2, expected) > 1e-2


def test_merge_does_not_overflow():
    """exp(200) is infinite in float32; only differences of normalisers may be raised."""
    one, two = torch.full((1, 1, 1, 2), 1.0), torch.full((1, 1, 1, 2), 3.0)
    o, lse = merge(one, torch.full((1, 1, 1), 200.0), two, torch.full((1, 1, 1), 200.0))
    torch.testing.assert_close(o, torch.full((1, 1, 1, 2), 2.0))
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 200.0 + math.log(2)))


def test_parts_merge_at_once_as_one_after_another():
    """Seven parts of nine keys, two of them empty for every query and all for one. Witness: the
    plain mean of the parts."""
    q, k, v = draw(keys=9)
    cuts = (0, 2, 2, 3, 5, 5, 8, 9)
    member = torch.zeros(7, 9, dtype=torch.bool)
    for part in range(7):
        member[part, cuts[part] : cuts[part + 1]] = True
    mask = member[:, None, None, None, :].repeat(1, 2, 1, 5, 1)
    mask[:, :, :, 3] = False
    parts = [attend(q, k, v, each) for each in mask]
    o, lse = merge_all(*(torch.stack(x) for x in zip(*parts, strict=True)))
    seen = torch.ones(2, 1, 5, 9, dtype=torch.bool)
    seen[:, :, 3] = False
    expected, normaliser = attend(q, k, v, seen)
    assert difference(o, expected) < 1e-12
    assert torch.equal(lse == -math.inf, normaliser == -math.inf)
    assert (lse - normaliser).nan_to_num(0.0).abs().max() < 1e-12
    assert (o[:, :, 3] == 0).all()
    assert difference(torch.stack([part[0] for part in parts]).mean(0), expected) > 1e-3
