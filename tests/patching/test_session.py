"""The bookkeeping of a session against hand-worked cases: which columns are whose, and what a crop
takes. Whole conversations are in tests/contract/test_segment_session.py."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from memretrofit.errors import StateError
from memretrofit.patching.session import Session, roll_right, session_of, take

YES, NO = True, False


def filled(valid: list[list[bool]] | None = None, columns: int = 4) -> Session:
    """Two rows with columns 0, 1, 2, ... and 10, 11, 12, ..., one layer, one head, width 1."""
    session = Session("owner")
    session.counts = torch.tensor([4, 3])
    session.state = {"memory": torch.tensor([[1.0], [2.0]])}
    keys = torch.arange(columns) + torch.tensor([[0], [10]])
    session.inner.update(keys.float()[:, None, :, None], -keys.float()[:, None, :, None], 0)
    session.valid = None if valid is None else torch.tensor(valid)
    session.seen = session.open = columns
    return session


def keys(session: Session) -> list[list[float]]:
    found = session.layers[0].keys
    assert found is not None
    return found[:, 0, :, 0].tolist()


def test_columns_of_a_row_are_put_side_by_side() -> None:
    """At the right end and in order; columns of nobody go."""
    session = filled([[YES, NO, NO, YES], [NO, YES, NO, NO]])
    session.align()
    assert keys(session)[0] == [0, 3]
    assert keys(session)[1][1] == 11
    assert session.valid is not None
    assert session.valid.tolist() == [[YES, YES], [NO, YES]]
    assert session.columns == 2


def test_a_row_that_begins_anew_has_no_columns() -> None:
    session = filled()
    session.close(torch.tensor([NO, YES]))
    assert session.valid is not None
    assert session.valid.tolist() == [[YES] * 4, [NO] * 4]
    session.close(torch.tensor([YES, NO]))
    assert session.columns == 0
    assert session.valid is None


def test_columns_that_nobody_needs_are_dropped_when_they_are_half() -> None:
    """So that rows which never close together do not hold the whole text."""
    session = filled([[YES, YES, NO, NO], [NO, NO, YES, YES]])
    session.close(torch.tensor([YES, NO]))
    assert session.columns == 2
    assert keys(session)[1] == [12, 13]
    assert session.valid is not None
    assert session.valid.tolist() == [[NO, NO], [YES, YES]]


def test_a_crop_takes_from_a_row_what_it_had() -> None:
    session = filled([[YES, YES, YES, YES], [YES, YES, YES, NO]])
    session.embeds = torch.tensor([[[1.0], [2.0], [3.0], [4.0]], [[0.0], [5.0], [6.0], [7.0]]])
    session.crop(-2)
    assert session.counts is not None
    assert session.counts.tolist() == [2, 2]  # of the second row's two slots one was padding
    assert keys(session) == [[0, 1], [10, 11]]
    assert session.embeds[:, :, 0].tolist() == [[0, 0, 1, 2], [0, 0, 5, 6]]
    assert (session.seen, session.open) == (2, 2)


def test_a_crop_back_to_what_was_remembered() -> None:
    """Recording keeps what was there before each border; a crop goes to the last it can use."""
    session = filled()
    session.activate_past_recording()
    session.remember()
    session.close(torch.tensor([YES, YES]))
    session.state, session.open = {"memory": torch.tensor([[7.0], [8.0]])}, 0
    assert session.counts is not None
    session.inner.update(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1), 0)
    session.counts, session.seen, session.open = session.counts + 1, 5, 1
    session.crop(-2)
    assert session.state["memory"].tolist() == [[1], [2]]
    assert keys(session) == [[0, 1, 2], [10, 11, 12]]
    assert session.seen == 3
    assert not session.earlier


def test_without_recording_it_is_refused_and_nothing_changes() -> None:
    session = filled()
    session.open = 1
    with pytest.raises(StateError, match="opened or closed 1 tokens ago"):
        session.crop(-2)
    assert keys(session) == [[0, 1, 2, 3], [10, 11, 12, 13]]
    assert not session.is_croppable


def test_rows_move_with_everything() -> None:
    session = filled([[YES, YES, YES, YES], [YES, YES, YES, NO]])
    session.record_past = True
    session.remember()
    session.reorder_cache(torch.tensor([1, 1]))
    for each in (session, *session.earlier):
        assert each.state["memory"].tolist() == [[2], [2]]
        assert keys(each) == [[10, 11, 12, 13]] * 2
        assert each.counts is not None
        assert each.counts.tolist() == [3, 3]


def test_a_twin_does_not_see_what_is_read_on() -> None:
    session = filled()
    twin = session.twin()
    session.inner.update(torch.ones(2, 1, 1, 1), torch.ones(2, 1, 1, 1), 0)
    session.crop(-1)
    assert keys(twin) == [[0, 1, 2, 3], [10, 11, 12, 13]]


def test_columns_are_taken_and_moved_by_row() -> None:
    columns = torch.tensor([[[[1.0], [2.0], [3.0]]], [[[4.0], [5.0], [6.0]]]])
    found = take(columns, torch.tensor([[2, 0], [1, 1]]))
    assert found[:, 0, :, 0].tolist() == [[3, 1], [5, 5]]
    moved = roll_right(columns[:, 0], torch.tensor([1, 0]))
    assert moved[:, :, 0].tolist() == [[0, 1, 2], [4, 5, 6]]


def test_a_session_takes_the_place_of_empty_layers_and_keeps_their_wish() -> None:
    cache = DynamicCache()
    cache.layers[:] = [Session("other")]
    with pytest.raises(StateError, match="another patched model"):
        session_of(cache, "owner")
    cache = DynamicCache()
    session = session_of(cache, "owner")
    assert cache.layers == [session]
    assert session_of(cache, "owner") is session
