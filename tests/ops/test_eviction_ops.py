"""Which tokens a budget keeps: cases worked by hand, and the papers' rules spelled out."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from memretrofit.ops.eviction import (
    best,
    h2o_scores,
    pooled,
    pyramid_budget,
    received,
    snapkv_scores,
)

EXACT = 1e-12


def draw(length=11, *, heads=4, groups=2, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = [(2, heads, length, 8), (2, groups, length, 8)]
    return [2 * torch.randn(s, generator=make, dtype=torch.float64) for s in shapes]


def weights(q, k, *, causal=True, candidates=None):
    """[B, H, T, T] attention of each query, one softmax at a time."""
    batch, heads, length, width = q.shape
    found = q.new_zeros(batch, heads, length, length)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (batch, heads, length))).tolist():
        end = t + 1 if causal else length
        end = min(end, candidates or end)
        keys = k[b, h * k.shape[1] // heads, :end]
        found[b, h, t, :end] = (keys @ q[b, h, t] / math.sqrt(width)).softmax(0)
    return found


def per_kv_head(x, groups):
    return torch.stack([h.mean(1) for h in x.chunk(groups, dim=1)], dim=1)


def test_received_attention_by_hand():
    """Two queries of two heads that share one KV head; the first query does not see key 2."""
    paid = torch.tensor([[[4.0, 1.0, 3.0], [1.0, 2.0, 1.0]], [[1.0, 1.0, 6.0], [5.0, 2.0, 1.0]]])
    scores = paid.log()[None]
    lse = torch.tensor([[[5.0, 4.0], [2.0, 8.0]]]).log()
    visible = torch.tensor([[True, True, False], [True, True, True]])[None, None]
    # key 0: (4/5 + 1/4 + 1/2 + 5/8) / 2, key 1: (1/5 + 2/4 + 1/2 + 2/8) / 2, key 2: (1/4 + 1/8) / 2
    expected = torch.tensor([[[1.0875, 0.725, 0.1875]]])
    assert torch.allclose(received(scores, lse, visible, 1), expected)
    each = received(scores, lse, visible, 2)  # a KV head for each
    assert torch.allclose(each.mean(1, keepdim=True), expected)
    assert torch.allclose(each[0, 0], torch.tensor([1.05, 0.7, 0.25]))


def test_neighbours_beyond_the_ends_are_zeros():
    found = pooled(torch.tensor([[[3.0, 0.0, 0.0, 6.0, 3.0]]]), 3)
    assert torch.allclose(found, torch.tensor([[[1.0, 1.0, 2.0, 3.0, 3.0]]]))
    same = torch.rand(2, 3, 7)
    assert torch.equal(pooled(same, 1), same)


def test_the_best_stay_in_order_of_age():
    scores = torch.tensor([[[1.0, 5.0, 2.0, 5.0, 0.0]], [[1.0, 5.0, 2.0, 5.0, 9.0]]])
    valid = torch.tensor([[True] * 5, [False, True, True, False, False]])
    assert best(scores, valid, torch.tensor([3, 3]), 3)[:, 0].tolist() == [[1, 2, 3], [-1, 1, 2]]
    # another number per row, and more room than there are tokens
    found = best(scores, valid, torch.tensor([1, 2]), 6)
    assert found[:, 0].tolist() == [[-1, -1, -1, -1, -1, 1], [-1, -1, -1, -1, 1, 2]]
    nothing = best(scores, valid, torch.tensor([0, 0]), 2)
    assert (nothing == -1).all()


def test_of_equal_scores_the_older_stays():
    flat = torch.zeros(1, 1, 500)
    found = best(flat, torch.ones(1, 500, dtype=torch.bool), torch.tensor([100]), 100)
    assert found[0, 0].tolist() == list(range(100))


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # low 100 // 20 = 5, high 195, steps of 190 // 3 = 63
        ({"mean": 100, "beta": 20}, [195, 132, 69, 6]),
        ({"mean": 100, "beta": 1}, [100, 100, 100, 100]),
        ({"mean": 100, "beta": 2}, [150, 117, 84, 51]),
        # 188 tokens beside the window: high 188, low 12, steps of 58
        ({"mean": 100, "beta": 20, "length": 220, "window": 32}, [188, 130, 72, 14]),
        # shorter than 2 * 100: no room for steps
        ({"mean": 100, "beta": 20, "length": 199, "window": 32}, [100, 100, 100, 100]),
        ({"mean": 100, "beta": 20, "length": 90, "window": 32}, [58, 58, 58, 58]),
        ({"mean": 100, "beta": 20, "length": 20, "window": 32}, [0, 0, 0, 0]),
    ],
)
def test_budgets_of_a_pyramid(case, expected):
    assert [pyramid_budget(layer=n, layers=4, **case) for n in range(4)] == expected


def test_one_layer_has_the_mean():
    assert pyramid_budget(100, 0, 1, 20) == 100


def test_a_pyramid_has_its_mean_and_never_less():
    """The step is rounded down, so the layers together have up to half a token each more."""
    for mean, layers, beta in ((100, 4, 20), (2016, 30, 20), (57, 7, 3), (448, 32, 20)):
        budgets = [pyramid_budget(mean, n, layers, beta) for n in range(layers)]
        assert 0 <= sum(budgets) / layers - mean <= layers / 2
        assert budgets == sorted(budgets, reverse=True)
        assert budgets[-1] >= mean // beta


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_snapkv_is_the_last_queries_attention_over_everything(kernel_size):
    """Softmax over all keys before each query, the window included; then the candidates alone are
    pooled. Witnesses: a softmax over the candidates, and one that sees later keys."""
    window, (q, k) = 4, draw()

    def spelled_out(**change):
        paid = per_kv_head(weights(q, k, **change)[:, :, -window:].sum(2)[:, :, None], 2)[:, :, 0]
        padded = F.pad(paid[..., :-window], (kernel_size // 2,) * 2)
        return padded.unfold(-1, kernel_size, 1).mean(-1)

    found = snapkv_scores(q[:, :, -window:], k, kernel_size=kernel_size)
    assert (found - spelled_out()).abs().max() < EXACT
    for wrong in ({"candidates": 7}, {"causal": False}):
        assert (found - spelled_out(**wrong)).abs().max() > 1e-3


def test_h2o_is_the_attention_of_all_queries():
    q, k = draw()
    paid = weights(q, k).sum(2)
    expected = per_kv_head(paid[:, :, None], 2)[:, :, 0]
    found = h2o_scores(q, k, window=3)
    assert (found - expected[..., :-3]).abs().max() < EXACT
    assert found.shape[-1] == 8
    assert (paid.sum(-1) - 11).abs().max() < EXACT  # each query pays one in all
