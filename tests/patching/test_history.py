"""What a look-up is given of a conversation: against the whole row, after all that may happen to a
cache."""

from __future__ import annotations

import pytest
import torch
from contract.bank_arms import EXAMPLES, bank_of, banked
from contract.runs import in_pieces
from hypothesis import given
from hypothesis import strategies as st

from memretrofit.modules.bank import PAD, Reach, Tokens, first_tokens
from memretrofit.patching.history import History

FIRST, LAST = Reach("first", 4), Reach("last", 3)
pieces = st.lists(
    st.lists(st.sampled_from([PAD, PAD, 5, 6, 7]), min_size=2, max_size=2), min_size=1, max_size=9
)


def by_hand(row: list[int], reach: Reach) -> list[int]:
    if reach.end == "last":
        return row[-reach.length :]
    found = [token for token in row if token != PAD][: reach.length]
    return found + [PAD] * (reach.length - len(found))


def check(history: History, rows: list[list[int]]) -> None:
    for reach in (FIRST, LAST):
        found = history.reached(reach)
        assert found.tolist() == [by_hand(row, reach) for row in rows]


@given(columns=pieces, crop=st.integers(0, 3))
def test_first_and_last_tokens_of_rows_that_grow_move_and_are_cropped(columns, crop):
    history, rows = History("owner"), [[], []]
    assert history.reached(FIRST) is history.reached(LAST) is None
    for column in columns:
        history.append(torch.tensor(column)[:, None])
        rows = [[*row, token] for row, token in zip(rows, column, strict=True)]
        check(history, rows)
    history.apply(lambda x: x[[1, 0, 0]])
    rows = [rows[1], rows[0], rows[0]]
    check(history, rows)
    history.append(torch.tensor([[8], [9], [PAD]]))
    rows = [[*rows[0], 8], [*rows[1], 9], [*rows[2], PAD]]
    check(history, rows)
    crop = min(crop, len(rows[0]) - 1)
    history.crop(crop)
    rows = [row[: len(row) - crop] for row in rows]
    check(history, rows)
    history.append(torch.tensor([[3]] * 3))
    check(history, [[*row, 3] for row in rows])


@pytest.mark.parametrize("arm", ["hierarchical_ffn", "engram", "token_lookup"])
def test_a_look_up_reads_no_more_than_it_asks_for(arm):
    """With what it asks for it finds the rows of the whole text; with less it does not."""
    bank = bank_of(banked("llama", arm))
    for row in EXAMPLES:
        end, length = bank.reach
        before, new = row[None, :-2], row[None, -2:]

        def rows(kept: torch.Tensor, new: torch.Tensor = new) -> dict[str, list[int]]:
            tokens = Tokens(ids=torch.cat([kept, new], dim=1), new=2)
            return {name: index.tolist() for name, index in bank.addresses(tokens).items()}

        kept = first_tokens(before, length) if end == "first" else before[:, -length:]
        kept = kept if length else before[:, :0]
        assert rows(kept) == rows(before)
        if length:
            fewer = kept[:, :1] if end == "first" else kept[:, 1:]
            assert rows(fewer) != rows(before)


@pytest.mark.parametrize("arm", ["hierarchical_ffn", "engram"])
def test_what_is_looked_up_at_a_step_does_not_grow_with_the_conversation(arm):
    model, lengths = banked("llama", arm), []
    bank = bank_of(model)
    bank.register_forward_pre_hook(lambda bank, args: lengths.append(args[0].ids.shape[1]))
    text = torch.cat(EXAMPLES)[None]
    in_pieces(model, text, [100, 101, 102, 120, 121])
    assert lengths[0] == 100
    assert lengths[2] == lengths[1] == lengths[4] == bank.reach.length + 1
