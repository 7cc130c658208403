"""A rolling buffer is a list of columns from which the oldest are taken, whatever its storage
does."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memretrofit.modules.rolling import SPARE_COLUMNS, RollingBuffer


def columns(start: int, count: int) -> torch.Tensor:
    """Columns [1, count, 2] that carry their number."""
    return (
        torch.arange(start, start + count, dtype=torch.float32)[None, :, None]
        .expand(1, -1, 2)
        .clone()
    )


def numbers(buffer: RollingBuffer) -> list[int]:
    return buffer.view[0, :, 0].int().tolist()


moves = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 150)),
        st.tuples(st.just("keep"), st.integers(1, 20)),
        st.tuples(st.just("crop"), st.integers(1, 5)),
        st.tuples(st.just("apply"), st.just(0)),
    ),
    max_size=30,
)


@given(moves=moves, sinks=st.integers(0, 4), gradients=st.booleans())
def test_it_is_a_list_that_forgets_its_middle(moves, sinks, gradients):
    """Forbids: pinned columns that are overwritten by themselves, stale columns after a crop, a
    lost column in a repack."""
    buffer, expected, count = RollingBuffer(), [], 0
    with torch.set_grad_enabled(gradients):
        for move, amount in [("append", sinks + 1), *moves]:
            if move == "append":
                new = columns(count, amount).requires_grad_(gradients)
                found = buffer.append(new)
                expected += range(count, count + amount)
                count += amount
                assert found[0, :, 0].int().tolist() == expected
            elif move == "keep" and len(expected) > sinks + amount:
                drop = len(expected) - amount
                buffer.drop(drop, buffer.view[:, :sinks])
                expected = expected[:sinks] + expected[drop:]
            elif move == "crop" and len(expected) > sinks + amount:
                buffer.crop(amount)
                del expected[-amount:]
            elif move == "apply":
                buffer.apply(lambda x: x.repeat(2, 1, 1)[1:])
            assert numbers(buffer) == expected
            assert buffer.nbytes == 8 * buffer._storage.shape[-2]


def test_steady_steps_neither_grow_nor_copy():
    """One storage for a whole run of appends, and never more than the spare room beyond what is
    kept."""
    buffer = RollingBuffer()
    buffer.append(columns(0, 11))
    storages, sizes = [], []
    for step in range(300):
        buffer.append(columns(11 + step, 1))
        buffer.drop(len(numbers(buffer)) - 8, buffer.view[:, :3])
        storages.append(buffer._storage.data_ptr())
        sizes.append(buffer.nbytes)
    assert set(sizes) == {8 * (11 + SPARE_COLUMNS)}
    changes = sum(a != b for a, b in pairwise(storages))
    assert changes <= 300 // SPARE_COLUMNS + 1
    assert numbers(buffer) == [0, 1, 2, *range(303, 311)]


@pytest.mark.parametrize("sinks", [2, 3, 40])
def test_pinned_columns_may_overlap_their_new_place(sinks):
    """One column leaves: the sinks move by one, over themselves."""
    buffer = RollingBuffer()
    buffer.append(columns(0, sinks + 2))
    buffer.append(columns(sinks + 2, 1))
    buffer.drop(sinks + 1, buffer.view[:, :sinks])
    assert numbers(buffer) == [*range(sinks), sinks + 1, sinks + 2]


def test_a_long_append_does_not_stay_alive():
    buffer = RollingBuffer()
    buffer.append(columns(0, 10_000))
    buffer.drop(10_000 - 8, buffer.view[:, :3])
    assert buffer.nbytes == 8 * (11 + SPARE_COLUMNS)


def test_what_was_appended_is_not_written_to():
    """The first columns are the model's own tensor: pinning sinks must not change it."""
    new = columns(0, 30)
    before = new.clone()
    buffer = RollingBuffer()
    buffer.append(new)
    buffer.drop(22, buffer.view[:, :3])
    buffer.append(columns(30, 1))
    assert torch.equal(new, before)


@pytest.mark.parametrize("freeze", [True, False])
def test_gradients_reach_every_kept_column(freeze):
    """A cache that is filled with gradients on: what is kept still leads back to what was
    appended."""
    parts = [columns(0, 12).requires_grad_(), columns(12, 3).requires_grad_()]
    buffer = RollingBuffer()
    buffer.append(parts[0])
    buffer.drop(9, buffer.view[:, :3])
    buffer.append(parts[1] if not freeze else parts[1].detach())
    buffer.view.sum().backward()
    kept = torch.tensor([n < 3 or n >= 9 for n in range(12)])
    assert torch.equal(parts[0].grad[0, :, 0] > 0, kept)
    assert freeze or (parts[1].grad == 1).all()
