"""Product top-k against exact arithmetic over all pairs, and against its definition."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from memretrofit.ops.product_key import exhaustive_topk, product_topk, slot_scores

every_form = pytest.mark.parametrize("form", [exhaustive_topk, product_topk])
TINY = 2.0**-24
"""Half of the last bit of 1 in float32: adding it to 1 changes nothing."""


def by_hand(first: list[float], second: list[float], k: int) -> list[int]:
    """The k largest exact sums; of equal ones the lower slot."""
    sums = [Fraction(x) + Fraction(y) for x in first for y in second]
    return sorted(range(len(sums)), key=lambda slot: (-sums[slot], slot))[:k]


# few values, so that most draws hold ties, and some that float32 cannot add to 1
scores = st.sampled_from([-1.0, 0.0, TINY, 0.5, 1.0, 1.0 + 2 * TINY])
cases = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        st.lists(scores, min_size=n, max_size=n),
        st.lists(scores, min_size=n, max_size=n),
        st.integers(1, n),
    )
)


@every_form
def test_nine_slots_by_hand(form):
    """Sums by slot: 5 4 1, 4 3 0, 2 1 -2. Slots 1 and 3 tie, and so do 2 and 7."""
    first, second = torch.tensor([3.0, 2.0, 0.0]), torch.tensor([2.0, 1.0, -2.0])
    assert form(first, second, 3).tolist() == [0, 1, 3]


@every_form
@given(case=cases)
@example(case=([0.0, TINY, 1.0], [TINY, 1.0, 0.0], 2))
@example(case=([1.0] * 5, [0.0] * 5, 3))
def test_every_tie_is_exact_and_goes_to_the_lower_slot(form, case):
    first, second, k = case
    found = form(torch.tensor(first), torch.tensor(second), k)
    assert found.tolist() == by_hand(first, second, k)


def test_rounded_sums_would_not_do():
    """Witness: in float32, 1 + TINY is 1; a search over rounded sums takes another slot."""
    first, second = torch.tensor([0.0, TINY]), torch.tensor([0.0, 1.0])
    rounded = (first[:, None] + second).flatten()
    assert rounded.argsort(descending=True, stable=True)[0] == 1
    assert product_topk(first, second, 1).tolist() == [3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 5), (16, 3), (64, 32)])
def test_the_product_is_the_exhaustive_search(n, k, dtype):
    make = torch.Generator().manual_seed(n)
    first, second = torch.randn(2, 50, 4, n, generator=make, dtype=dtype)
    assert torch.equal(product_topk(first, second, k), exhaustive_topk(first, second, k))
    # bfloat16 leaves so few values that nearly every row holds ties
    first, second = (x.bfloat16().to(dtype) for x in (first, second))
    assert torch.equal(product_topk(first, second, k), exhaustive_topk(first, second, k))


def test_no_candidate_may_be_left_out():
    """Witness: k best of each half, and one pair fewer than p q <= k, would miss slots."""
    n = k = 6
    for p in range(1, k + 1):
        q = k // p
        # only the p best of one half and the q best of the other stand above zero
        first = torch.tensor([1.0] * p + [-9.0] * (n - p))
        second = torch.tensor([1.0] * q + [-9.0] * (n - q))
        corner = (p - 1) * n + q - 1
        assert corner in product_topk(first, second, p * q)


def test_the_rest_of_the_batch_changes_nothing():
    first, second = torch.randn(2, 9, 20).round(decimals=1)
    whole = product_topk(first, second, 7)
    alone = [product_topk(first[i], second[i], 7) for i in range(9)]
    assert torch.equal(whole, torch.stack(alone))
    assert product_topk(first[:0], second[:0], 7).shape == (0, 7)


def test_scores_carry_gradients_to_both_halves():
    first = torch.tensor([1.0, 2.0], requires_grad=True)
    second = torch.tensor([5.0, 7.0], requires_grad=True)
    found = slot_scores(first, second, torch.tensor([3, 1, 3]))
    assert found.tolist() == [9.0, 8.0, 9.0]
    found.sum().backward()
    assert first.grad is not None
    assert second.grad is not None
    assert first.grad.tolist() == [1.0, 2.0]
    assert second.grad.tolist() == [0.0, 3.0]


def test_a_score_that_is_not_a_number_still_leaves_k_slots():
    """So that training which diverged is told by its loss, not by an index."""
    first, second = torch.tensor([torch.nan, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0])
    for scores in (first, first * torch.nan):
        found = product_topk(scores, second, 3).tolist()
        assert len(set(found)) == 3
        assert set(found) <= set(range(9))


@every_form
def test_more_than_each_half_holds_is_refused(form):
    with pytest.raises(ValueError, match="k is 4, and each half has 3"):
        form(torch.zeros(3), torch.zeros(3), 4)
    with pytest.raises(ValueError, match="k is 0"):
        form(torch.zeros(3), torch.zeros(3), 0)
    with pytest.raises(ValueError, match="3 and 2 keys"):
        form(torch.zeros(3), torch.zeros(2), 1)
