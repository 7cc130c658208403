"""M+ against its docstring, one row and one layer at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.arms import activate
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass
from methods.pool_by_hand import ByHand
from tolerances import REORDERED, WRONG

from memretrofit.errors import ConfigError
from memretrofit.methods.memoryllm_pool import MemoryLLMPoolConfig
from memretrofit.methods.mplus import MPLUS_8B, MPlusConfig
from memretrofit.patching.controls import state_shuffled, writes_disabled
from memretrofit.retrofit import patch

LENGTH, QUERY = 8, 3
CONFIG = MPlusConfig(
    segment_length=LENGTH,
    query_length=QUERY,
    num_memory_tokens=3,
    num_blocks=2,
    top_k=4,
    long_term_size=7,
    key_dim=6,
)


def patched(config=CONFIG):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return activate(patch(build("llama"), config))


@pytest.mark.parametrize("stored", ["input", "output"])
def test_logits_are_the_equations(stored):
    """Nine segments: the store fills, shows fewer than top_k rows, overflows. Witnesses: other
    draws, the youngest row first, one row less, and a store that keeps one row more."""
    config = replace(CONFIG, stored=stored)
    model, ids = patched(config), tokens(1, 9 * LENGTH + 5)
    found = one_pass(model, ids)[0]

    def by_hand(config=config, **wrong):
        return ByHand(build("llama"), model, config, **wrong).logits(ids[0])

    assert apart(found, by_hand()) < REORDERED
    for wrong in (
        {"seed": 1},
        {"oldest_first": False},
        {"config": replace(config, top_k=3)},
        {"config": replace(config, long_term_size=8)},
    ):
        assert apart(found, by_hand(**wrong)) > WRONG


def test_before_its_first_write_a_pool_is_the_base_model():
    """Bit for bit, in the two forwards that a segment takes. Witness: the second segment."""
    model, base, ids = patched(), build("llama"), tokens(2, 2 * LENGTH)

    def alone(segment):
        return torch.cat(
            [one_pass(base, segment[:, :QUERY]), one_pass(base, segment)[:, QUERY:]], 1
        )

    first, second = ids.split(LENGTH, dim=1)
    found = one_pass(model, ids)
    assert torch.equal(found[:, :LENGTH], alone(first))
    assert apart(found[:, LENGTH:], alone(second)) > WRONG
    with writes_disabled(model):
        assert torch.equal(one_pass(model, ids)[:, LENGTH:], alone(second))


def test_what_is_recalled_is_all_that_differs_from_the_pool():
    """The pools are the same, so the tokens that look for rows read the same everywhere, and the
    others where the store is empty. Witness: the others, later."""
    model, ids = patched(), tokens(1, 8 * LENGTH)
    sizes = {n: getattr(CONFIG, n) for n in ("segment_length", "num_memory_tokens", "num_blocks")}
    pool = patch(build("llama"), MemoryLLMPoolConfig(**sizes))
    for layer, other in zip(pool.model.layers, model.model.layers, strict=True):
        values = other.memory.state_dict()
        layer.memory.load_state_dict({n: values[n] for n in layer.memory.state_dict()})
    found, expected = one_pass(model, ids)[0], one_pass(pool, ids)[0]
    places = torch.arange(len(found))
    query, early = places % LENGTH < QUERY, places < 2 * LENGTH
    assert apart(found[query | early], expected[query | early]) < REORDERED
    assert apart(found[~(query | early)], expected[~(query | early)]) > WRONG


def test_splits_rows_and_padding_change_nothing():
    """Witness: the rows differ from one another."""
    model, ids = patched(), tokens(2, 9 * LENGTH)
    whole = one_pass(model, ids)
    ends = [1, QUERY, LENGTH + QUERY - 1, 3 * LENGTH + QUERY + 1, 60]
    assert apart(in_pieces(model, ids, ends)[0], whole) < REORDERED
    short = ids[1, : 7 * LENGTH + 4]
    batch, mask = left_padded([ids[0], short])
    found = in_pieces(model, batch, [5, 50], mask=mask)[0]
    assert apart(found[0], whole[0]) < REORDERED
    assert apart(found[1, -len(short) :], one_pass(model, short[None])[0]) < REORDERED
    assert apart(whole[0], whole[1]) > WRONG


@pytest.mark.parametrize("place", [1, QUERY - 1, QUERY, LENGTH - 1])
def test_a_token_changes_nothing_before_it(place):
    """In a segment that reads from its store: the query is before what reads its answer."""
    model, ids = patched(), tokens(1, 8 * LENGTH)
    changed = 6 * LENGTH + place
    other = ids.clone()
    other[0, changed] += 1
    before, after = one_pass(model, ids)[0], one_pass(model, other)[0]
    assert apart(before[:changed], after[:changed]) == 0
    assert apart(before[changed:], after[changed:]) > WRONG


def test_a_shuffled_store_is_the_next_row_s():
    """Row b reads, in the ninth segment, what row b + 1 would have read there."""
    model, ids = patched(), tokens(2, 9 * LENGTH)
    _, cache = in_pieces(model, ids[:, : 8 * LENGTH], [])
    _, swapped = in_pieces(model, ids[:, : 8 * LENGTH].flip(0), [])
    last = ids[:, 8 * LENGTH :]
    expected = in_pieces(model, last, [], cache=swapped)[0]
    with state_shuffled(model):
        found = in_pieces(model, last, [], cache=cache)[0]
    assert apart(found, expected) < REORDERED
    assert apart(found, one_pass(model, ids)[:, 8 * LENGTH :]) > WRONG


def test_the_retriever_takes_gradients():
    """Both maps of both layers, from the loss on a segment that recalls."""
    model = patched()
    model(tokens(1, 8 * LENGTH)).logits[:, 7 * LENGTH :].square().mean().backward()
    for part in (layer.memory for layer in model.model.layers):
        for parameter in part.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0


def test_the_preset_has_the_published_sizes():
    """10,240 rows in the pool, a quarter as many recalled."""
    assert MPLUS_8B.num_memory_tokens * MPLUS_8B.num_blocks == 4 * MPLUS_8B.top_k == 10_240


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_memory_tokens": 9}, "more than the 8 tokens of a segment"),
        ({"query_length": 8}, "no token of a segment of 8 follows it"),
        ({"top_k": 8}, "the store has 7 rows"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(wrong, message):
    """By the config, before any model."""
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **wrong)
