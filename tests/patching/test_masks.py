"""The registered mask: padding only, without storage, and the base model's own mask wherever
base attention runs."""

from __future__ import annotations

import pytest
import torch
from contract.arms import ARMS, patched
from contract.families import build, tokens
from contract.runs import left_padded, one_pass

from memretrofit.patching.controls import intercepted
from memretrofit.patching.masks import padding_alone, padding_mask, token_ranks
from memretrofit.retrofit import memory_disabled, patch


def given_mask(model, ids, **kwargs):
    """The mask that reaches a patched layer."""
    seen = []

    def look(call):
        seen.append(call.mask)
        return call.remember()

    with intercepted(model, look):
        one_pass(model, ids, **kwargs)
    return seen[0]


def test_no_mask_is_as_large_as_the_square_of_the_text():
    model = patched("llama", "ahn")
    assert given_mask(model, tokens(2, 64)) is None
    ids, mask = left_padded([tokens(1, 64)[0], tokens(1, 50)[0]])
    found = given_mask(model, ids, attention_mask=mask)
    assert found.shape == (2, 1, 64, 64)
    assert found.untyped_storage().nbytes() <= 2 * 64 * found.element_size()
    assert torch.equal(found[:, 0, 0], mask.bool())


def test_a_mask_of_ones_is_no_mask():
    assert (
        given_mask(patched("llama", "ahn"), tokens(2, 20), attention_mask=torch.ones(2, 20)) is None
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox"])
def test_base_attention_gets_the_base_models_mask(family, implementation):
    """Long padded text with the memory off, and unpatched layers beside patched ones: bit for
    bit."""
    base = build(family, implementation=implementation)
    model = patch(build(family, implementation=implementation), ARMS["ahn"])
    ids, mask = left_padded([tokens(1, 40)[0], tokens(1, 25)[0]], extra=2)
    with memory_disabled(model):
        found = one_pass(model, ids, attention_mask=mask)
    expected = one_pass(base, ids, attention_mask=mask)
    assert torch.equal(found[mask.bool()], expected[mask.bool()])


def test_ranks_count_the_real_tokens_of_a_row():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    found = token_ranks(mask[:, None, None, :])
    assert found.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4], [-1] * 5]
    assert token_ranks(None) is None


def test_padding_beyond_the_cache_is_cut():
    """`generate` may pass a mask that is longer than what the layer holds."""
    long = torch.tensor([[0, 1, 1, 1, 1, 0, 0]]).bool()
    found = padding_mask(1, 2, 5, q_offset=3, attention_mask=long)
    assert found.shape == (1, 1, 2, 5)
    assert found[0, 0, 0].tolist() == [False, True, True, True, True]
    assert padding_mask(1, 2, 5, q_offset=3, attention_mask=torch.ones(1, 7).bool()) is None


def causal(padding, begin=0, columns=None):
    """[B, 1, T, columns]: what queries from slot `begin` on see of a text with this padding."""
    length, columns = padding.shape[1], columns or padding.shape[1]
    real = torch.cat([padding.bool(), padding.new_zeros(len(padding), columns - length).bool()], 1)
    slots = torch.arange(columns)
    return (slots <= torch.arange(begin, length)[:, None]) & real[:, None, None]


@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize(("begin", "columns"), [(0, 6), (4, 6), (5, 6), (2, 9)])
def test_a_large_mask_may_say_no_more_than_padding(begin, columns, form):
    """As it is made for a static cache: as many columns as that has room for."""
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    mask = causal(padding, begin, columns)
    if form == "additive":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    known, found = padding_alone(mask, 2, 6 - begin, begin)
    assert known
    assert torch.equal(found[:, 0, -1, :6], padding.bool())
    assert padding_alone(mask[1:], 1, 6 - begin, begin)[0]


def test_a_large_mask_without_padding_is_no_mask():
    assert padding_alone(causal(torch.ones(1, 6), 2, 9), 3, 4, 2) == (True, None)


def test_one_mask_for_all_rows_is_a_mask_of_each():
    known, found = padding_alone(causal(torch.tensor([[0, 1, 1, 1]])), 3, 4, 0)
    assert known
    assert found.shape == (3, 1, 4, 4)


SEEN = causal(torch.ones(1, 4))
BIASED = torch.zeros(SEEN.shape).masked_fill(~SEEN, -torch.inf)
BIASED[..., 0] = -1.0


@pytest.mark.parametrize(
    "mask",
    [
        SEEN & ~SEEN.tril(-2),
        SEEN | torch.tensor([True, True, True, False]),
        SEEN.tril(-1),
        SEEN.long(),
        BIASED,
        SEEN.expand(-1, 2, -1, -1),
        SEEN[:, 0],
        SEEN[..., :3],
    ],
    ids=["window", "both ways", "shifted", "integers", "bias", "by head", "3-D", "too narrow"],
)
def test_other_masks_are_not_taken_for_padding(mask):
    known, found = padding_alone(mask, 1, 4, 0)
    assert not known
    assert found is mask
