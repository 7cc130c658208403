"""Edges: events of a text read in any pieces against their definition on the whole text."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from modules.edges_by_hand import begins_by_hand

from memretrofit.modules.edges import EDGES, NOT_STORED, Refined, Tail
from memretrofit.ops.segment import conductance, modularity, reach

LENGTH, LEAST, MOST = 70, 2, 7
seeds = st.integers(0, 10**6)


class Text:
    """Rows whose tokens ask for cuts at random, with keys; some begin with padding and sinks."""

    def __init__(self, seed: int, rows: int = 2) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.keys = torch.randn(rows, LENGTH, 4, generator=drawn)
        # neighbours are alike, as in a text
        self.keys = self.keys + self.keys.roll(1, 1) + self.keys.roll(2, 1)
        self.cuts = (torch.rand(rows, LENGTH, generator=drawn) < 0.3).long()
        for row, padding in enumerate(torch.randint(0, 12, (rows,), generator=drawn)):
            self.cuts[row, : int(padding)] = NOT_STORED
        self.kept = 0

    def similarity(self, row: int, slots: torch.Tensor) -> torch.Tensor:
        """Of tokens that the window still holds."""
        assert int(slots.min()) >= self.kept
        found = self.keys[row, slots]
        return found @ found.mT


def by_hand(text: Text, row: int, quality) -> list[int]:
    """Slots at which events begin."""
    return begins_by_hand(text.cuts[row].tolist(), text.keys[row], quality, LEAST, MOST)


class Stream:
    """A rule that reads texts, with what it knows of the slots so far."""

    def __init__(self, rule, rows: int = 2) -> None:
        self.rule = rule
        self.places = torch.full((rows, LENGTH), NOT_STORED)
        self.origins = torch.zeros(rows, LENGTH, dtype=torch.long)

    def read(self, text: Text, low: int, high: int, window: int = LENGTH) -> None:
        """The slots `low` to `high` - 1; what is further back than `window` is gone."""
        history = slice(max(low - window, 0), low)
        tail = Tail(
            end=high,
            cuts=text.cuts[:, history.start : high],
            places=self.places[:, history],
            origins=self.origins[:, history],
            similarity=text.similarity,
        )
        places, origins = self.rule.decide(tail)
        self.places[:, high - places.shape[1] : high] = places
        self.origins[:, high - origins.shape[1] : high] = origins

    def crop(self, seen: int) -> None:
        """Forget what is at `seen` or behind it."""
        self.places[:, seen:], self.origins[:, seen:] = NOT_STORED, 0


def streamed(rule, text: Text, window: int, ends) -> torch.Tensor:
    """Places [rows, LENGTH] of a text that is read in pieces, up to each of `ends` among others.

    Asserts that each token's place is known before the piece in which it leaves.
    """
    stream = Stream(rule)
    ends = sorted({LENGTH, *range(window, LENGTH, rule.piece(window)), *ends})
    for low, high in itertools.pairwise([0, *ends]):
        leaving = slice(max(low - window, 0), max(high - window, 0))
        stored = text.cuts[:, leaving] != NOT_STORED
        assert (stream.places[:, leaving][stored] >= 0).all()
        text.kept = leaving.stop
        stream.read(text, low, high, window)
    return stream.places


def agrees(places: torch.Tensor, begins: list[int]) -> bool:
    """Whether the places of a row are those of events that begin there, as far as both go."""
    known = (places >= 0).nonzero()[-1].item()
    found = (places[: known + 1] == 0).nonzero()[:, 0].tolist()
    counted = all(
        places[t] == t - max(b for b in found if b <= t) for t in range(found[0], known + 1)
    )
    return counted and found == [b for b in begins if b <= known]


@settings(deadline=None)
@given(
    seed=seeds,
    window=st.integers(reach(MOST) + MOST // 2, 30),
    ends=st.lists(st.integers(1, LENGTH - 1), max_size=6),
    quality=st.sampled_from([modularity, lambda a: -conductance(a)]),
)
@example(seed=0, window=reach(MOST) + MOST // 2, ends=list(range(1, LENGTH)), quality=modularity)
def test_refined_edges_are_their_definition(seed, window, ends, quality):
    """However the text is read, in a window that holds an edge and what decides it."""
    text = Text(seed)
    places = streamed(Refined(LEAST, MOST, quality), text, window, ends)
    for row in range(2):
        assert agrees(places[row], by_hand(text, row, quality))


def test_witness_the_quality_the_asker_and_the_direction_move_edges():
    """What the comparison above must tell apart."""
    text = Text(3)
    right = by_hand(text, 0, modularity)
    places = streamed(Refined(LEAST, MOST, modularity), text, 20, ())
    assert agrees(places[0], right)
    for wrong in (lambda a: -modularity(a), conductance, lambda a: torch.arange(len(a)) * 1.0):
        assert not agrees(places[0], by_hand(text, 0, wrong))
    sizes = [b - a for a, b in itertools.pairwise(right)]
    assert min(sizes) >= LEAST
    assert max(sizes) <= MOST


@settings(deadline=None)
@given(seed=seeds, end=st.integers(12, LENGTH - 1), removed=st.integers(1, 12))
def test_edges_that_were_decided_by_cropped_tokens_are_decided_again(seed, end, removed):
    """Other tokens come after the crop than were there before it."""
    assert cropped(seed, end, removed)[0]


def test_witness_a_crop_undoes_edges_before_it():
    """Tokens that stay had another event before the crop, so keeping what was decided is wrong."""
    found = [cropped(seed, 40, 6) for seed in range(10)]
    assert all(right for right, _ in found)
    assert any(undone for _, undone in found)


def cropped(seed: int, end: int, removed: int) -> tuple[bool, bool]:
    """Whether a text of which `removed` tokens up to `end` were first read as others has the edges
    of the text; and whether places of tokens that stayed had to change.
    """
    rule, text, other = Refined(LEAST, MOST, modularity), Text(seed), Text(seed)
    low = end - removed
    drawn = torch.Generator().manual_seed(seed + 1)
    other.keys[:, low:end] = 3 * torch.randn(2, removed, 4, generator=drawn)
    other.cuts[:, low:end] = (other.cuts[:, low:end] == 0).long()
    stream = Stream(rule)
    for begin in range(0, end, 5):
        stream.read(other, begin, min(begin + 5, end))
    before = stream.places[:, :low].clone()
    stream.crop(low)
    for begin in range(low, LENGTH, 5):
        stream.read(text, begin, min(begin + 5, LENGTH))
    undone = (before >= 0) & (before != stream.places[:, :low])
    return torch.equal(stream.places, streamed(rule, text, LENGTH, ())), bool(undone.any())


@settings(deadline=None)
@given(
    seed=seeds,
    hole=st.tuples(st.integers(15, 40), st.integers(1, 25)),
    ends=st.lists(st.integers(1, LENGTH - 1), max_size=6),
)
def test_a_hole_in_a_row_holds_nothing_up(seed, hole, ends):
    """Padding between tokens: their events are known in time, and the same in any split."""
    rule, text = Refined(LEAST, MOST, modularity), Text(seed)
    text.cuts[0, hole[0] : sum(hole)] = NOT_STORED
    assert torch.equal(streamed(rule, text, 40, ends), streamed(rule, text, 40, ()))


@pytest.mark.parametrize("refinement", EDGES)
@pytest.mark.parametrize(("least", "most"), [(1, 1), (3, 3), (2, 9)])
def test_a_piece_fits_the_window(refinement, least, most):
    """Every window that the rule accepts holds what it must, down to pieces of one token."""
    rule = EDGES[refinement](least, most)
    windows = [w for w in range(1, 40) if rule.piece(w) >= 1]
    assert windows[0] <= 2 * most
    for window in windows[:2]:
        text = Text(window)
        sizes = streamed(rule, text, window, ())
        assert int(sizes.max()) == most - 1
