"""Choosing blocks and listing them, against definitions in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memretrofit.ops.select import choose_blocks, listed


def by_hand(scores: list[float], open_blocks: list[bool], k: int) -> list[bool]:
    """The k best open blocks; of two equal ones the older."""
    order = sorted((-s, n) for n, (s, o) in enumerate(zip(scores, open_blocks, strict=True)) if o)
    best = {n for _, n in order[:k]}
    return [n in best for n in range(len(scores))]


# few values, so that most lists hold ties
rows = st.integers(1, 9).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n),
        st.lists(st.booleans(), min_size=n, max_size=n),
    )
)


@given(row=rows, k=st.integers(1, 11))
def test_the_best_open_blocks_are_chosen_and_ties_go_to_the_older(row, k):
    scores, open_blocks = row
    found = choose_blocks(torch.tensor(scores), torch.tensor(open_blocks), k)
    assert found.tolist() == by_hand(scores, open_blocks, k)


def test_each_row_chooses_for_itself():
    scores = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0]])
    open_blocks = torch.tensor([True, True, False])
    assert choose_blocks(scores, open_blocks, 1).tolist() == [
        [True, False, False],
        [False, True, False],
    ]


def test_a_block_that_is_not_open_is_not_chosen_in_place_of_none():
    scores = torch.tensor([5.0, 4.0, 3.0])
    assert not choose_blocks(scores, torch.tensor([False, False, False]), 2).any()


def test_no_block_is_no_choice():
    with pytest.raises(ValueError, match="at least one"):
        choose_blocks(torch.zeros(3), torch.ones(3, dtype=torch.bool), 0)


@given(
    st.integers(1, 4).flatmap(
        lambda queries: st.lists(
            st.lists(st.booleans(), min_size=6, max_size=6), min_size=queries, max_size=queries
        )
    )
)
def test_a_list_holds_what_any_query_chose_and_who_chose_it(chosen):
    wanted = torch.tensor(chosen)
    index, member = listed(wanted)
    used = [n for n in range(6) if any(row[n] for row in chosen)]
    assert index.tolist() == used
    assert (
        torch.zeros(wanted.shape, dtype=torch.bool)
        .scatter(-1, index.expand(len(chosen), -1), member)
        .equal(wanted)
    )


def test_shorter_lists_are_filled_with_blocks_that_no_query_chose():
    wanted = torch.tensor([[[True, True, False]], [[False, False, True]]])  # two heads, one query
    index, member = listed(wanted)
    assert index.shape == (2, 2)
    assert index[0].tolist() == [0, 1]
    assert index[1, 0] == 2
    assert member.tolist() == [[[True, True]], [[True, False]]]
