"""Balanced k-means on the unit sphere."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLES = 6400
"""Points that one step looks at, drawn anew for each."""
STEPS = 20
"""Both as in arXiv:2510.02375."""
MOST = 1.5
"""Times its even share that a cluster may hold."""
STARTS = 4
"""Times that it begins anew; the closest result is kept."""


def balanced_kmeans(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Unit centroids [k, E] of unit points [n, E]; k <= count, and less for fewer distinct points.

    ::

        a_i = argmax_j c_j . x_i                        the nearest, on the sphere
        a   : a cluster with more than 1.5 n / k points gives half of them, drawn at random, to
              the smallest one
        c_j = normalised mean of its points

    It starts with k-means++ (Arthur and Vassilvitskii, 2007); the balance rule is that of
    arXiv:2510.02375.

    Raises:
        ValueError: no points, or a count below 1.
    """
    if not len(points) or count < 1:
        raise ValueError(f"{len(points)} points in {count} clusters; both must be at least 1.")
    found = [_fit(points, count, generator) for _ in range(STARTS)]
    sample = _sample(points, generator)
    return max(found, key=lambda centroids: float((sample @ centroids.T).amax(-1).mean()))


def _fit(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    centroids = _spread(_sample(points, generator), count, generator)
    for _ in range(STEPS):
        sample = _sample(points, generator)
        owner = _balanced((sample @ centroids.T).argmax(-1), len(centroids), generator)
        sums = torch.zeros_like(centroids).index_add(0, owner, sample)
        norm = sums.square().sum(-1, keepdim=True).sqrt()
        centroids = torch.where(norm > 0, sums / norm, centroids)
    return centroids


def _sample(points: Tensor, generator: torch.Generator) -> Tensor:
    if len(points) <= SAMPLES:
        return points
    return points[torch.randperm(len(points), generator=generator)[:SAMPLES].to(points.device)]


def _spread(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points that are far from each other: each is drawn by its squared distance to the others."""
    first = int(torch.randint(len(points), (), generator=generator))
    chosen = [points[first]]
    distance = (points - chosen[0]).square().sum(-1)
    while len(chosen) < count:
        weights = distance.double().cpu()
        # rounding leaves a little distance between a point and itself
        weights = weights.masked_fill(weights < 1e-9, 0.0)
        if not weights.any():
            break
        place = int(torch.multinomial(weights, 1, generator=generator))
        chosen.append(points[place])
        distance = torch.minimum(distance, (points - chosen[-1]).square().sum(-1))
    return torch.stack(chosen)


def _balanced(owner: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`owner` [n] after the balance rule."""
    owner = owner.clone()
    sizes = owner.bincount(minlength=count)
    large = torch.nonzero(sizes > MOST * len(owner) / count)[:, 0]
    for cluster in large.unbind():
        members = torch.nonzero(owner == cluster)[:, 0]
        half = torch.randperm(len(members), generator=generator)[: len(members) // 2]
        owner[members[half.to(members.device)]] = sizes.argmin()
        sizes = owner.bincount(minlength=count)
    return owner
