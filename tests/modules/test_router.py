"""Which leaf a text belongs to: names decide, phrasings do not, and other text belongs to none."""

from __future__ import annotations

import pytest
import torch

from memretrofit.errors import StateError
from memretrofit.modules.bank import PAD, Preparation
from memretrofit.modules.router import Router

SIZE, R = 400, 16
EMBEDDING = torch.randn(SIZE, 24, generator=torch.Generator().manual_seed(1))
NAMES = [torch.tensor([300 + n, 350 + (7 * n) % 40, 330 + n]) for n in range(16)]


def words(*ids: int) -> torch.Tensor:
    return torch.tensor(ids)


PHRASINGS = [
    (words(10, 11, 12), words(13, 14)),
    (words(20, 21), words(22, 23, 24, 25)),
    (words(29), words(30, 31, 32)),
]
HELD_OUT = (words(40, 41, 42, 43, 12), words(44, 45, 46))


def sentence(phrasing, name) -> torch.Tensor:
    return torch.cat([phrasing[0], name, phrasing[1]])


def ordinary(count: int, seed: int) -> list[torch.Tensor]:
    """Text of the words of the phrasings, and rarely a piece of a name."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randint(0, 100, (count, 48), generator=generator)
    rare = torch.randint(100, SIZE, (count, 48), generator=generator)
    mask = torch.rand(count, 48, generator=generator) < 0.05
    return list(torch.where(mask, rare, common))


def router(branching=(4,)) -> Router:
    return Router(embedding=lambda: EMBEDDING, branching=branching, route_tokens=R, seed=0)


def fitted(branching=(4,)) -> Router:
    made = router(branching)
    examples = [sentence(phrasing, name) for name in NAMES for phrasing in PHRASINGS]
    made.fit(Preparation(examples=examples, generic=ordinary(300, 5), embedding=EMBEDDING))
    return made


def rows(texts) -> torch.Tensor:
    found = torch.full((len(texts), R), PAD)
    for row, text in zip(found, texts, strict=True):
        row[: min(len(text), R)] = text[:R]
    return found


def ends(made: Router, texts) -> torch.Tensor:
    """[n] the leaf of each whole text."""
    places = torch.tensor([min(len(text), R) - 1 for text in texts])
    return made(rows(texts))[torch.arange(len(texts)), places, -1]


@pytest.mark.parametrize("branching", [(4,), (2, 3)])
def test_another_phrasing_of_a_name_reaches_its_leaf(branching):
    """Of a phrasing that no example has; by a plain mean of embeddings it goes astray."""
    made = fitted(branching)
    trained = [ends(made, [sentence(p, name) for name in NAMES]) for p in PHRASINGS]
    asked = ends(made, [sentence(HELD_OUT, name) for name in NAMES])
    reached = torch.stack([asked == leaf for leaf in trained]).any(0)
    assert reached.float().mean() > 0.9
    assert len(asked.unique()) > 2

    def means(phrasing) -> torch.Tensor:
        return torch.stack([EMBEDDING[sentence(phrasing, name)].mean(0) for name in NAMES])

    mean, held = torch.stack([means(phrasing) for phrasing in PHRASINGS]), means(HELD_OUT)
    nearest = (torch.cosine_similarity(held[:, None], mean.flatten(0, 1)[None], dim=-1)).argmax(-1)
    assert (nearest % len(NAMES) == torch.arange(len(NAMES))).float().mean() < 0.9


def test_other_text_belongs_to_nothing():
    """Text that the threshold was not set by; nor do phrasings without a name."""
    made = fitted()
    assert (made(rows(ordinary(300, 6))) >= 0).float().mean() < 2e-3
    bare = [torch.cat([before, after]) for before, after in (*PHRASINGS, HELD_OUT)]
    assert (made(rows(bare)) == -1).all()


def test_a_route_is_that_of_what_was_read():
    """A later token changes no earlier route; behind the last token there is none."""
    made = fitted()
    texts = rows([sentence(PHRASINGS[0], name) for name in NAMES])
    found = made(texts)
    for length in (3, 5, 6):
        cut = texts.clone()
        cut[:, length:] = 99
        assert torch.equal(made(cut)[:, :length], found[:, :length])
        cut[:, length:] = PAD
        shorter = made(cut)
        assert torch.equal(shorter[:, :length], found[:, :length])
        assert (shorter[:, length:] == -1).all()
    assert (found[:, 2] == -1).all()
    assert (found[:, 6] >= 0).any()


def test_a_saved_router_routes_alike():
    """Into one that was never fitted, whose buffers are empty."""
    made, other = fitted((2, 3)), router((2, 3))
    texts = rows([sentence(HELD_OUT, name) for name in NAMES])
    assert (other(texts) == -1).all()
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(texts), made(texts))
    wrong = {**made.state_dict(), "centroids_1": torch.zeros(2, 3)}
    with pytest.raises(RuntimeError, match="centroids_1"):
        router((2, 3)).load_state_dict(wrong)


def test_separation_is_reported():
    """Examples that are told from ordinary text, and examples that are ordinary text."""
    examples = [sentence(phrasing, name) for name in NAMES for phrasing in PHRASINGS]
    generic = ordinary(300, 5)
    apart = router().fit(Preparation(examples=examples, generic=generic, embedding=EMBEDDING))
    assert apart.examples_routed > 0.9
    assert apart.generic_prefixes == 300 * 48
    alike = router().fit(
        Preparation(examples=ordinary(48, 9), generic=generic, embedding=EMBEDDING)
    )
    assert alike.examples_low - alike.threshold < apart.examples_low - apart.threshold


@pytest.mark.parametrize(("examples", "generic"), [([], ordinary(3, 0)), ([words(1, 2)], [])])
def test_both_kinds_of_text_are_needed(examples, generic):
    with pytest.raises(StateError, match="some of each"):
        router().fit(Preparation(examples=examples, generic=generic, embedding=EMBEDDING))
