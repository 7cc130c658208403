"""Which node of a tree a text belongs to, from its first tokens, or that it belongs to nothing.

A prefix is embedded by the n-grams g of one and two tokens that the bank's examples hold. Their
vectors e_g begin as the model's own input embeddings (centred, of length 1, the mean of a pair's),
weighed as in SIF (Arora et al., 2017), and are then smoothed over the examples i,
four times::

    w_g = u_|g| / (1 + (d_g / d)^3) * b / (b + c_g)
    x_i = normalised sum of w_g e_g over g in i         e_g = mean of x_i over i with g
    z_t = sum of w_g e_g over g up to t                 W_t = sum of w_g |e_g|
    x_t = z_t / |z_t| * W_t / (W_t + EVIDENCE)

with d_g the examples that hold g and c_g its count in ordinary text. So what is rare everywhere but
known here decides: names. A phrasing that many examples share averages out, one that a single
example has stands for that example, and little evidence makes a short vector. A mean of embeddings,
or SIF alone, follows the phrasing: of 100 invented facts (8 leaves) about half of the held-out
phrasings reached a leaf of their training sentences, and none was told from ordinary text.

A prefix belongs to nothing if its similarity x . c to the deepest centroid is not above the
threshold: the quantile `1 - ROUTED` of ordinary text, whose own counts are left out (two halves,
each weighed by the counts of the other).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from memretrofit.errors import StateError
from memretrofit.modules.bank import PAD, Preparation
from memretrofit.ops.tree import Level, descend, fit_tree

ORDER_WEIGHTS = (0.3, 1.0)
"""u: of one token, and of two. A rare token alone is weak evidence of a name."""
COMMON, COMMON_SHARE = 12.0, 0.01
"""d: an n-gram in more examples than these, or than this share of them, names none of them."""
BACKGROUND = 0.1
"""b: the weight of an n-gram falls to 1/11 when ordinary text has it once."""
ROUNDS = 4
"""Of smoothing."""
EVIDENCE = 3.0
"""W at which a vector has half of its full length: a name of a few tokens."""
ROUTED = 1e-3
"""Of the prefixes of ordinary text, how many may be taken for one of the examples."""
FITTED = 0.1
"""Shorter vectors, of prefixes before any name, do not shape the tree."""
LEAST = 0.03
"""The smallest threshold. No shorter vector can pass it, so none is looked at."""
PIECE = 256
"""Prefixes that are embedded together."""


@dataclass(frozen=True, kw_only=True)
class Separation:
    """How far what is to be learned and ordinary text are apart."""

    threshold: float
    examples_routed: float
    """Share of the examples whose beginning is above the threshold."""
    examples_low: float
    """Similarity that nineteen of twenty examples exceed."""
    generic_prefixes: int
    """Prefixes of ordinary text that the threshold was set by."""


class Router(nn.Module):
    """The tree, the weights of n-grams and the threshold: buffers, fitted once and saved.

    Before `fit` everything abstains.
    """

    known: Tensor
    """[m] int64 n-grams of the examples, sorted: t for a token, (t + 1) V + u for a pair."""
    weights: Tensor
    """[m] w of each."""
    vectors: Tensor
    """[m, E] e of each."""
    mean: Tensor
    """[E] of the input embeddings of ordinary text."""
    threshold: Tensor
    """[]."""
    evidence: Tensor
    """[] `EVIDENCE`."""
    least: Tensor
    """[] `LEAST`."""

    def __init__(
        self,
        *,
        embedding: Callable[[], Tensor],
        branching: Sequence[int],
        route_tokens: int,
        seed: int,
    ) -> None:
        super().__init__()
        self._embedding, self.branching = embedding, tuple(branching)
        self.route_tokens, self.seed = route_tokens, seed
        self.vocabulary, width = embedding().shape
        """When the bank was made: pairs are numbered by it, also if tokens are added later."""
        self.register_buffer("known", torch.empty(0, dtype=torch.long))
        self.register_buffer("weights", torch.empty(0))
        self.register_buffer("vectors", torch.empty(0, width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("threshold", torch.tensor(torch.inf))
        # what acts when a text is routed is saved with the tree that was fitted with it
        self.register_buffer("evidence", torch.tensor(EVIDENCE))
        self.register_buffer("least", torch.tensor(LEAST))
        for level in range(1, len(branching) + 1):
            self.register_buffer(f"numbers_{level}", torch.empty(0, dtype=torch.long))
            self.register_buffer(f"centroids_{level}", torch.empty(0, width))

    @property
    def levels(self) -> list[Level]:
        """The fitted nodes; empty levels before `fit`."""
        each = range(1, len(self.branching) + 1)
        return [
            Level(self.get_buffer(f"numbers_{n}"), self.get_buffer(f"centroids_{n}").float())
            for n in each
        ]

    def forward(self, prefixes: Tensor) -> Tensor:
        """Node numbers [B, R, levels] of the prefixes of each length of the first R tokens [B, R]
        (`PAD` behind the last one); -1 where a prefix belongs to nothing.
        """
        if not len(self.known):
            return prefixes.new_full((*prefixes.shape, len(self.branching)), -1)
        nodes, similarity = self._nearest(prefixes, self.weights)
        return torch.where(similarity[..., None] > self.threshold, nodes, -1)

    def embed(self, prefixes: Tensor, weights: Tensor) -> Tensor:
        """x [B, R, E] of every prefix, float32."""
        each = []
        for grams in self._grams(prefixes):
            place, known = self._find(grams)
            weight = weights.float()[place] * known
            each.append(self.vectors.float()[place] * weight[..., None])
        evidence = torch.stack(each).norm(dim=-1, keepdim=True).sum(0).cumsum(1)
        z = torch.stack(each).sum(0).cumsum(1)
        length = evidence / (evidence + self.evidence)
        return z / z.norm(dim=-1, keepdim=True).clamp(min=1e-12) * length

    def _nearest(self, prefixes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        points = self.embed(prefixes, weights)
        enough = (points.norm(dim=-1) > self.least) & (prefixes != PAD)
        nodes = prefixes.new_full((*prefixes.shape, len(self.branching)), -1)
        similarity = points.new_zeros(prefixes.shape)
        if enough.any():
            found = descend(points[enough], self.levels, self.branching)
            nodes[enough], similarity[enough] = found
        return nodes, similarity

    def _grams(self, prefixes: Tensor) -> tuple[Tensor, Tensor]:
        """Keys of the token and of the pair that end at each place, -1 where there is none."""
        size = self.vocabulary
        before = torch.cat([torch.full_like(prefixes[:, :1], PAD), prefixes[:, :-1]], dim=1)
        pair = (before + 1) * size + prefixes
        return prefixes, pair.masked_fill((before == PAD) | (prefixes == PAD), -1)

    def _find(self, grams: Tensor) -> tuple[Tensor, Tensor]:
        """The place of each among the known ones, and whether it is one."""
        place = torch.searchsorted(self.known, grams.contiguous()).clamp(max=len(self.known) - 1)
        return place, self.known[place] == grams

    @torch.no_grad()
    def fit(self, preparation: Preparation) -> Separation:
        """Count n-grams, cluster the examples, and set the threshold by ordinary text.

        Raises:
            StateError: no examples, or no ordinary text.
        """
        device = self.mean.device
        examples = self._beginnings(preparation.examples).to(device)
        # an ordinary text is as good from any place on
        pieces = [list(text.split(self.route_tokens)) for text in preparation.generic]
        if not len(examples) or not any(pieces):
            raise StateError(
                f"{len(examples)} examples and {sum(map(len, pieces))} pieces of ordinary text: a "
                "router is fitted to both. Pass some of each."
            )
        folds = [pieces[::2], pieces[1::2]] if len(pieces) > 1 else [[pieces[0]], [pieces[0]]]
        halves = [
            self._beginnings([piece for pieces in fold for piece in pieces]).to(device)
            for fold in folds
        ]
        ordinary = torch.cat(halves)
        self.mean.copy_(self._embedding()[ordinary[ordinary != PAD]].float().mean(0))
        self.known, spread = self._distinct(examples)
        counts = [self._count(half) for half in halves]
        self.weights = self._weights(spread, counts[0] + counts[1], len(examples))
        self.vectors = self._vectors(examples)
        ends = (examples != PAD).sum(-1) - 1
        points = torch.cat([self.embed(part, self.weights) for part in examples.split(PIECE)])
        points = points[(points.norm(dim=-1) > FITTED) & (examples != PAD)]
        points = points / points.norm(dim=-1, keepdim=True)
        generator = torch.Generator().manual_seed(self.seed)
        for level, found in enumerate(fit_tree(points, self.branching, generator), start=1):
            setattr(self, f"numbers_{level}", found.numbers)
            setattr(self, f"centroids_{level}", found.centroids)
        return self._calibrate(examples, ends, spread, halves, counts)

    def _vectors(self, examples: Tensor) -> Tensor:
        """e [m, E]."""
        table = self._embedding().float() - self.mean.float()
        table = table / table.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        first, last = self.known // self.vocabulary - 1, self.known % self.vocabulary
        pair = (table[first.clamp(min=0)] + table[last]) / 2
        vectors = torch.where((first < 0)[:, None], table[last], pair)
        place, known = self._find(torch.cat(self._grams(examples), dim=1))
        text = torch.arange(len(examples), device=place.device)[:, None].expand_as(place)
        text, place = torch.stack([text[known], place[known]]).unique(dim=1)
        count = place.bincount(minlength=len(self.known))[:, None]
        for _ in range(ROUNDS):
            sums = vectors.new_zeros(len(examples), vectors.shape[1])
            sums.index_add_(0, text, (vectors * self.weights[:, None])[place])
            x = sums / sums.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            vectors = torch.zeros_like(vectors).index_add_(0, place, x[text]) / count
        return vectors

    def _calibrate(
        self,
        examples: Tensor,
        ends: Tensor,
        spread: Tensor,
        halves: list[Tensor],
        counts: list[Tensor],
    ) -> Separation:
        found: list[Tensor] = []
        for half, others in zip(halves, reversed(counts), strict=True):
            weights = self._weights(spread, others, len(examples))
            found += [self._nearest(part, weights)[1][part != PAD] for part in half.split(PIECE)]
        generic = torch.cat(found).sort().values
        self.threshold.copy_(generic[int(len(generic) * (1 - ROUTED))].clamp(min=LEAST))
        similarity = torch.cat(
            [self._nearest(part, self.weights)[1] for part in examples.split(PIECE)]
        )[torch.arange(len(examples), device=ends.device), ends]
        return Separation(
            threshold=float(self.threshold),
            examples_routed=float((similarity > self.threshold).float().mean()),
            examples_low=float(similarity.quantile(0.05)),
            generic_prefixes=len(generic),
        )

    def _beginnings(self, texts: Sequence[Tensor]) -> Tensor:
        """[n, route_tokens] of the texts that hold anything."""
        rows = [text[: self.route_tokens] for text in texts if len(text)]
        found = torch.full((len(rows), self.route_tokens), PAD)
        for row, text in zip(found, rows, strict=True):
            row[: len(text)] = text
        return found

    def _distinct(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        """The n-grams of the examples, sorted, and how many examples hold each."""
        grams = torch.cat(self._grams(examples), dim=1).sort(dim=1).values
        first = torch.ones_like(grams, dtype=torch.bool)
        first[:, 1:] = grams[:, 1:] != grams[:, :-1]
        return grams[first & (grams >= 0)].unique(return_counts=True)

    def _count(self, texts: Tensor) -> Tensor:
        """[m] how often each known n-gram stands in the texts."""
        grams = torch.cat(self._grams(texts), dim=1).flatten()
        place = torch.searchsorted(self.known, grams).clamp(max=len(self.known) - 1)
        place = place[self.known[place] == grams]
        return place.bincount(minlength=len(self.known))

    def _weights(self, spread: Tensor, counts: Tensor, examples: int) -> Tensor:
        common = max(COMMON, COMMON_SHARE * examples)
        single = self.known < self.vocabulary
        order = torch.where(single, *ORDER_WEIGHTS)
        return order / (1 + (spread / common) ** 3) * BACKGROUND / (BACKGROUND + counts)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args, **kwargs) -> None:
        # what is fitted has as many n-grams and nodes as its examples gave it
        for name, held in list(self.named_buffers(recurse=False)):
            given = state_dict.get(prefix + name)
            if given is not None and given.shape[1:] == held.shape[1:] and given.ndim == held.ndim:
                setattr(self, name, held.new_empty(given.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
