"""A tree over directions: each node has a unit centroid, and a point descends to the nearest child
at each level.

The nodes of level l (from 1) have numbers below b_1 ... b_l; the children of node n are
n b_(l+1) + 0, 1, ... Only nodes that were fitted are held.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memretrofit.ops.kmeans import balanced_kmeans

PIECE = 512
"""Points that descend together: their candidates take PIECE * branching * E numbers."""


class Level(NamedTuple):
    """The nodes of one level."""

    numbers: Tensor
    """[m] int64, sorted."""
    centroids: Tensor
    """[m, E] of length 1."""


def fit_tree(points: Tensor, branching: Sequence[int], generator: torch.Generator) -> list[Level]:
    """A level for each of `branching`, from unit points [n, E]: every node's points are clustered
    again. A node that no point descends to has one child, with its own centroid.

    Raises:
        ValueError: no points.
    """
    levels: list[Level] = []
    parents, above = torch.zeros(1, dtype=torch.long), points.mean(0, keepdim=True)
    owner = torch.zeros(len(points), dtype=torch.long, device=points.device)
    for count in branching:
        numbers: list[Tensor] = []
        centroids: list[Tensor] = []
        for place, parent in enumerate(parents.unbind()):
            members = points[owner == parent.to(points.device)]
            found = above[place : place + 1]
            if len(members):
                found = balanced_kmeans(members, count, generator)
            numbers.append(parent * count + torch.arange(len(found)))
            centroids.append(found)
        parents, above = torch.cat(numbers), torch.cat(centroids)
        levels.append(Level(parents.to(points.device), above))
        owner = descend(points, levels, branching)[0][:, -1]
    return levels


def descend(
    points: Tensor, levels: Sequence[Level], branching: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Node numbers [n, levels] of points [n, E], and the product with the last centroid [n]::

        node_l = argmax { c . x : children of node_(l-1) }

    For unit centroids that is the nearest one. Of two equally near ones, the first.
    """
    parts = [_descend(part, levels, branching) for part in torch.split(points, PIECE)]
    nodes, similarity = zip(*parts, strict=True)
    return torch.cat(nodes), torch.cat(similarity)


def _descend(
    points: Tensor, levels: Sequence[Level], branching: Sequence[int]
) -> tuple[Tensor, Tensor]:
    node = torch.zeros(len(points), dtype=torch.long, device=points.device)
    similarity, path = points.new_zeros(len(points)), list[Tensor]()
    for (numbers, centroids), count in zip(levels, branching, strict=False):
        child = torch.arange(count, device=points.device)
        place = torch.searchsorted(numbers, node * count)[:, None] + child
        inside = place < len(numbers)
        place = place.clamp(max=len(numbers) - 1)
        inside &= numbers[place] < (node[:, None] + 1) * count
        # a product for each point alone: what it finds must not depend on the other ones
        scores = (centroids[place] @ points[..., None])[..., 0]
        similarity, best = scores.masked_fill(~inside, -torch.inf).max(-1)
        node = numbers[place.gather(1, best[:, None])[:, 0]]
        path.append(node)
    return torch.stack(path, dim=-1), similarity


def children_of(nodes: Tensor, branching: Sequence[int]) -> Tensor:
    """Node numbers [..., levels] as the number of the child at each level; -1 stays."""
    counts = torch.tensor(list(branching), device=nodes.device)
    return torch.where(nodes < 0, nodes, nodes % counts)


def nodes_of(children: Tensor, branching: Sequence[int]) -> Tensor:
    """The opposite of `children_of`: from the first -1 on, -1."""
    node = torch.zeros_like(children[..., 0])
    found: list[Tensor] = []
    for level, count in enumerate(branching):
        child = children[..., level]
        node = torch.where((node < 0) | (child < 0), -1, node * count + child)
        found.append(node)
    return torch.stack(found, dim=-1)
