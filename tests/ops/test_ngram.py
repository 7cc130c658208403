"""Hashed n-grams against stored vectors, a definition in plain integers, and the sizes of released
tables. `ngram_golden.json` holds what the authors' demo computes."""

from __future__ import annotations

import json
from itertools import accumulate
from operator import xor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memretrofit.ops.ngram import (
    distinct_primes,
    hash_ngrams,
    is_prime,
    odd_multipliers,
    recent_tokens,
)

GOLDEN = json.loads(Path(__file__).with_name("ngram_golden.json").read_text())
every_golden = pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"seed{case['seed']}")
PLACES, ABSENT = 3, -1


def constants(case):
    return torch.tensor(case["multipliers"]), torch.tensor(case["primes"])


def rows_of(case, ids):
    """[T, layers, orders * heads] of a row of ids, some of them absent."""
    recent = recent_tokens(ids[None], len(ids), max(case["orders"]), ABSENT)
    recent = recent.masked_fill(recent == ABSENT, case["pad"])
    return hash_ngrams(recent, *constants(case), case["orders"])[0]


@every_golden
def test_constants_are_those_of_the_demo(case):
    orders, layers = case["orders"], case["layers"]
    multipliers = odd_multipliers(case["seed"], layers, max(orders), case["num_ids"])
    primes = distinct_primes(case["least"], len(layers), len(orders), case["heads"])
    assert multipliers.tolist() == case["multipliers"]
    assert primes.tolist() == case["primes"]


@every_golden
def test_rows_are_those_of_the_demo(case):
    found = rows_of(case, torch.tensor(case["ids"]))
    assert found.transpose(0, 1).tolist() == case["rows"]


@every_golden
def test_numpy_and_integers_without_a_limit_find_the_same_rows(case):
    """Nothing overflows: 64-bit products and Python's own are one."""
    ids, pad = case["ids"], case["pad"]
    expected = []
    for multipliers, primes in zip(case["multipliers"], case["primes"], strict=True):
        moduli = np.array(primes).reshape(len(case["orders"]), -1)
        rows = []
        for t in range(len(ids)):
            seen = [ids[t - k] if t >= k else pad for k in range(len(multipliers))]
            mixes = list(accumulate((x * m for x, m in zip(seen, multipliers, strict=True)), xor))
            mixes = [mixes[order - 1] for order in case["orders"]]
            by_numpy = np.array(mixes, dtype=np.int64)[:, None] % moduli
            assert by_numpy.tolist() == [
                [mix % int(p) for p in heads] for mix, heads in zip(mixes, moduli, strict=True)
            ]
            rows.append(by_numpy.flatten().tolist())
        expected.append(rows)
    assert expected == case["rows"]


@pytest.mark.parametrize("num_ids", [2, 101, 129_280, 2**31])
def test_multipliers_are_odd_and_no_product_overflows(num_ids):
    drawn = odd_multipliers(3, [0, 1, 2], 4, num_ids)
    assert (drawn % 2 == 1).all()
    assert max(drawn.flatten().tolist()) * (num_ids - 1) < 2**63
    assert len(drawn.unique()) == drawn.numel()


def test_tables_have_as_many_rows_as_released_ones():
    """DeepSeek-V4.1-Flash: {2,3,4}-grams, 8 heads, layers 1 and 14; the rows of its two tables as
    its checkpoint has them."""
    primes = distinct_primes(16_000_000, 2, 3, 8)
    assert primes.sum(1).tolist() == [384_006_168, 384_016_682]
    assert len(primes.unique()) == primes.numel()


def test_primes_are_primes():
    sieve = np.ones(3000, dtype=bool)
    sieve[:2] = False
    for n in range(2, 55):
        sieve[n * n :: n] &= ~sieve[n]
    assert [is_prime(n) for n in range(3000)] == sieve.tolist()
    # products that fool the first bases: strong pseudoprimes to 2, 3, 5, 7 and to 2 .. 23
    assert not any(map(is_prime, (2047, 3_215_031_751, 3_825_123_056_546_413_051)))
    assert is_prime(2**61 - 1)


def test_a_row_begins_with_absent_tokens():
    found = recent_tokens(torch.tensor([[5, 6, 7]]), 3, PLACES, ABSENT)
    assert found.tolist() == [[[5, -1, -1], [6, 5, -1], [7, 6, 5]]]


def test_nothing_reaches_over_padding():
    """From the first absent token on, looking back, all are absent."""
    found = recent_tokens(torch.tensor([[5, -1, 6, 7, 8]]), 3, PLACES, ABSENT)
    assert found.tolist() == [[[6, -1, -1], [7, 6, -1], [8, 7, 6]]]


texts = st.lists(st.integers(0, 100), min_size=1, max_size=9)


@given(text=texts, others=texts, padding=st.integers(0, 4))
def test_rows_do_not_depend_on_the_batch_or_its_padding(text, others, padding):
    """Each row of a left-padded batch finds what it finds alone."""
    case = GOLDEN[1]
    width = padding + max(len(text), len(others))
    batch = torch.full((2, width), ABSENT)
    for row, ids in enumerate((text, others)):
        batch[row, width - len(ids) :] = torch.tensor(ids)
    alone = rows_of(case, torch.tensor(text))
    assert torch.equal(rows_of(case, batch[0])[-len(text) :], alone)
    recent = recent_tokens(batch, width, 4, ABSENT)
    assert torch.equal(recent[:1], recent_tokens(batch[:1], width, 4, ABSENT))


@given(text=texts, data=st.data())
def test_rows_do_not_depend_on_how_a_text_is_cut(text, data):
    new = data.draw(st.integers(1, len(text)))
    ids = torch.tensor([text])
    whole = recent_tokens(ids, len(text), 4, ABSENT)
    assert torch.equal(recent_tokens(ids, new, 4, ABSENT), whole[:, -new:])


def test_one_token_changes_the_rows_of_the_ngrams_that_hold_it_and_no_others():
    case = GOLDEN[0]
    ids = torch.tensor(case["ids"])
    other = ids.clone()
    other[3] += 1
    changed = (rows_of(case, ids) != rows_of(case, other)).any(1)  # any layer
    bigrams, trigrams = changed[:, :3].any(1), changed[:, 3:].any(1)
    assert bigrams.nonzero().flatten().tolist() == [3, 4]
    assert trigrams.nonzero().flatten().tolist() == [3, 4, 5]
