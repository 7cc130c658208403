"""Trees over directions: greedy descent against the nearest child, and balanced clusters."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from memretrofit.ops.kmeans import _balanced, balanced_kmeans
from memretrofit.ops.tree import Level, children_of, descend, fit_tree, nodes_of


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def directions(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(count, 8, generator=generator), dim=-1)


def by_hand(x: torch.Tensor, levels: list[Level], branching: tuple[int, ...]) -> list[int]:
    """The nearest child by Euclidean distance, level by level."""
    node, path = 0, []
    for (numbers, centroids), count in zip(levels, branching, strict=True):
        mine = [n for n in range(len(numbers)) if int(numbers[n]) // count == node]
        nearest = min(mine, key=lambda n: float((centroids[n] - x).square().sum()))
        node = int(numbers[nearest])
        path.append(node)
    return path


@pytest.mark.parametrize("branching", [(5,), (3, 4), (2, 3, 2)])
def test_greedy_descent_is_the_nearest_child_at_each_level(branching):
    levels, points = fit_tree(directions(200), branching, seeded()), directions(600, seed=1)
    nodes, similarity = descend(points, levels, branching)
    for x, path, found in zip(points, nodes.tolist(), similarity, strict=True):
        assert path == by_hand(x, levels, branching)
        last = levels[-1].centroids[levels[-1].numbers.tolist().index(path[-1])]
        assert float(found) == pytest.approx(float(last @ x), abs=1e-6)
    if len(branching) > 1:  # greedy is not the nearest leaf: that would be another rule
        leaves = levels[-1].numbers[(points @ levels[-1].centroids.T).argmax(-1)]
        assert not torch.equal(nodes[:, -1], leaves)


def test_a_point_descends_alone_as_among_others():
    levels, points = fit_tree(directions(99), (4, 4), seeded()), directions(40, seed=2)
    nodes, similarity = descend(points, levels, (4, 4))
    for n in range(40):
        alone = descend(points[n : n + 1], levels, (4, 4))
        assert torch.equal(alone[0][0], nodes[n])
        assert torch.equal(alone[1][0], similarity[n])


def test_fewer_points_than_leaves_still_reach_the_last_level():
    """Three points in a tree of 64 leaves: a node without points has one child."""
    levels = fit_tree(directions(3), (4, 4, 4), seeded())
    nodes, similarity = descend(directions(3), levels, (4, 4, 4))
    assert len(set(nodes[:, -1].tolist())) == 3
    assert similarity == pytest.approx(torch.ones(3), abs=1e-6)
    assert descend(directions(50, seed=3), levels, (4, 4, 4))[0].min() >= 0


def test_numbers_of_nodes_and_of_children():
    """Tree (2, 3, 4): node 5 of level 2 is child 2 of node 1, and its last child is node 23."""
    nodes = torch.tensor([[1, 5, 23], [0, 1, -1], [-1, -1, -1]])
    children = torch.tensor([[1, 2, 3], [0, 1, -1], [-1, -1, -1]])
    assert torch.equal(children_of(nodes, (2, 3, 4)), children)
    assert torch.equal(nodes_of(children, (2, 3, 4)), nodes)
    assert nodes_of(torch.tensor([[-1, 2, 3]]), (2, 3, 4)).tolist() == [[-1, -1, -1]]


def test_far_clusters_are_found():
    """Three bundles of directions around three axes: their centroids are their means."""
    axes = torch.eye(8)[:3].repeat_interleave(20, 0)
    points = normalize(axes + 0.05 * directions(60), dim=-1)
    means = normalize(points.view(3, 20, 8).mean(1), dim=-1)
    found = balanced_kmeans(points, 3, seeded())
    order = (found @ means.T).argmax(0)
    assert torch.allclose(found[order], means, atol=1e-5)


def test_a_large_cluster_gives_half_to_the_smallest():
    """Nine of ten points in one of two clusters is more than 1.5 times an even share."""
    owner = _balanced(torch.tensor([0] * 9 + [1]), 2, seeded())
    assert owner.bincount().tolist() == [5, 5]
    even = torch.tensor([0] * 7 + [1] * 3)
    assert torch.equal(_balanced(even, 2, seeded()), even)


def test_equal_points_are_one_cluster():
    assert len(balanced_kmeans(directions(1).expand(9, -1), 4, seeded())) == 1
    with pytest.raises(ValueError, match="0 points"):
        balanced_kmeans(directions(0), 4, seeded())
