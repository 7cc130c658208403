"""A table reads the same rows from every tier, and only what was opened ever moves."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from memretrofit.errors import ConfigError, StateError
from memretrofit.modules.row_sources import Span
from memretrofit.modules.table import FreshRows, HeldRows, MappedRows, Table

ROWS, SHAPE = 50, (3, 4)
INDEX = torch.tensor([[7, 0, 49], [7, 23, 22]])
DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn]
OFFSET = 5000
"""No multiple of a page: a mapping begins before it."""


def some_rows(dtype=torch.float32):
    return torch.randn(ROWS, *SHAPE).to(dtype)


def mapped(rows, folder, cuts=(0, 20, 21, ROWS)):
    """The rows in several files, with other bytes before and behind them."""
    spans = []
    for low, high in itertools.pairwise(cuts):
        path = folder / f"{low}.bin"
        data = rows[low:high].reshape(-1).view(torch.uint8).numpy().tobytes()
        path.write_bytes(b"\xff" * OFFSET + data + b"\xff" * 99)
        spans.append(Span(path, OFFSET, low, high - low))
    return MappedRows(spans, tuple(rows.shape[1:]), rows.dtype, "test")


def each_source(rows, folder):
    return {
        "ram": HeldRows(rows),
        "device": HeldRows(rows, "device"),
        "disk": mapped(rows, folder),
        "copy": HeldRows.copy_of(mapped(rows, folder), "ram"),
    }


class Watched:
    """A source that notes what is read from it."""

    def __init__(self, source, fault=None):
        self.source, self.fault, self.asked = source, fault, []

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read(self, index):
        self.asked.append(index.tolist())
        if self.fault:
            raise self.fault
        return self.source.read(index)


@pytest.mark.parametrize("hot_bytes", [0, 5 * 48, 10**9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tier_reads_the_same_bits(dtype, hot_bytes, tmp_path):
    rows = some_rows(dtype)
    for name, source in each_source(rows, tmp_path).items():
        table = Table(source, hot_bytes=hot_bytes)
        for _ in range(2):
            assert torch.equal(table(INDEX), rows[INDEX].float()), name
            assert torch.equal(table(INDEX, dtype=dtype).float(), rows[INDEX].float()), name
        assert table(INDEX).dtype == torch.float32
        assert table(torch.tensor(3)).shape == SHAPE
        assert table(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, *SHAPE)


def test_reading_and_opening_leave_the_files_alone(tmp_path):
    source = mapped(some_rows(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    source.read(torch.arange(ROWS)).fill_(9)
    table = Table(source)
    table.open(INDEX)
    nn.init.ones_(table.delta)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="read-only"):
        source._parts[0][0] = 1


@given(st.lists(st.lists(st.integers(0, ROWS - 1), max_size=12), max_size=8), st.integers(1, 9))
def test_hot_rows_are_the_last_used_and_never_stale(calls, room):
    rows = some_rows()
    table, kept, hits = Table(HeldRows(rows), hot_bytes=room * 48 + 47), [], 0
    for call in calls:
        assert torch.equal(table(torch.tensor(call, dtype=torch.long)), rows[call])
        found = [row for row in sorted(set(call)) if row in kept]
        read = [row for row in sorted(set(call)) if row not in kept]
        hits += len(found)
        kept = [row for row in kept if row not in found] + found + read
        kept = kept[-room:]
        assert table.nbytes["device"] <= room * 48
    assert table.hits == hits
    asked = Watched(table.source)
    table.source = asked
    table(torch.arange(ROWS))
    assert [row for call in asked.asked for row in call] == [
        row for row in range(ROWS) if row not in kept
    ]


@pytest.mark.parametrize("hot_bytes", [0, 4 * 48])
def test_prefetch_changes_when_rows_are_read_and_nothing_else(hot_bytes, tmp_path):
    rows = some_rows(torch.bfloat16)
    source = Watched(mapped(rows, tmp_path))
    table, plain = Table(source, hot_bytes=hot_bytes), Table(HeldRows(rows))
    for coming, index in [([1, 2, 3], [2, 3, 3]), ([5], [6]), ([], [5, 0]), (range(50), [49, 0])]:
        table.prefetch(torch.tensor(list(coming), dtype=torch.long))
        assert torch.equal(table(torch.tensor(index)), plain(torch.tensor(index)))
    table.prefetch(torch.tensor([30, 31]))
    source.asked.clear()
    table(torch.tensor([31, 32, 30]))
    assert [31, 30] not in source.asked
    assert [32] in source.asked


def test_prefetch_leaves_out_what_is_at_hand():
    source = Watched(HeldRows(some_rows()))
    table = Table(source, hot_bytes=10**6)
    table(torch.tensor([1, 2]))
    table.open(torch.tensor([3]))
    source.asked.clear()
    table.prefetch(torch.tensor([1, 2, 3]))
    assert not source.asked
    assert table(torch.tensor([1, 2, 3])).shape == (3, *SHAPE)
    assert not source.asked


def test_a_failed_prefetch_is_an_error_of_the_forward_that_wanted_it():
    source = Watched(HeldRows(some_rows()), OSError(5, "Input/output error"))
    table = Table(source)
    table.prefetch(torch.tensor([4]))
    with pytest.raises(OSError, match="Input/output"):
        table(torch.tensor([4]))
    source.fault = None
    assert table(torch.tensor([4])).shape == (1, *SHAPE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opening_changes_no_bit_and_keeps_what_was_learned(dtype, tmp_path):
    rows = some_rows(dtype)
    for source in each_source(rows, tmp_path).values():
        table = Table(source)
        table.open(INDEX[0])
        assert table.delta_index.tolist() == [0, 7, 49]
        assert torch.equal(table(INDEX), rows[INDEX].float())
        with torch.no_grad():
            table.delta[1] += 1
        learned = table.delta.detach().clone()
        parameter = table.delta
        table.open(torch.tensor([7, 0]))
        assert table.delta is parameter  # nothing new: an optimizer that holds it goes on
        table.open(INDEX)
        assert table.delta_index.tolist() == [0, 7, 22, 23, 49]
        assert table.opened == 5
        assert table.is_open(INDEX).all()
        assert not table.is_open(torch.tensor([8]))
        assert torch.equal(table.delta[[0, 1, 4]], learned)
        expected = rows.float().clone()
        expected[7] += 1
        assert torch.equal(table(INDEX), expected[INDEX])
        table.drop()
        assert torch.equal(table(INDEX), rows[INDEX].float())
        assert not table.state_dict()


def test_the_gradient_reaches_exactly_the_rows_asked_for():
    rows = some_rows()
    table, weight = Table(HeldRows(rows)), rows.clone().requires_grad_()
    table.open(torch.tensor([0, 7, 22, 30, 31]))
    factor = torch.randn(*INDEX.shape, *SHAPE)
    (table(INDEX) * factor).sum().backward()
    (weight[INDEX] * factor).sum().backward()
    grad = table.delta.grad
    assert grad.is_sparse
    assert table.delta_index[grad._indices()[0]].tolist() == [0, 7, 22]  # 23 and 49 are not open
    torch.testing.assert_close(grad.to_dense(), weight.grad[table.delta_index])
    assert weight.grad[7].abs().max() > 0.1


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.SGD])
def test_stock_optimizers_move_the_rows_of_a_step_and_hold_state_for_the_delta(optimizer):
    table = Table(FreshRows(10**9, SHAPE, std=1.0))
    table.open(torch.tensor([5, 10**8, 10**9 - 1]))
    step = optimizer([table.delta], lr=0.1)
    start = table.delta.detach().clone()
    for asked in ([5, 10**8], [10**8]):  # SparseAdam's momentum alone must not move row 5 again
        before = table.delta.detach().clone()
        step.zero_grad()
        table(torch.tensor(asked)).square().sum().backward()
        step.step()
        moved = (table.delta != before).flatten(1).any(1).tolist()
        assert moved == [row in asked for row in table.delta_index.tolist()]
    assert torch.equal(table.delta[2], start[2])
    sizes = [x.shape for state in step.state.values() for x in state.values() if hasattr(x, "dim")]
    assert all(size in ((), table.delta.shape) for size in sizes)
    with torch.no_grad():
        assert torch.equal(table(torch.tensor([5]))[0], table.delta[0])


def test_a_state_holds_the_delta_and_loads_into_a_table_with_any():
    table, rows = Table(HeldRows(some_rows())), torch.arange(6)
    assert not table.state_dict()
    table.open(rows)
    nn.init.normal_(table.delta)
    state = copy.deepcopy(table.state_dict())
    assert sorted(state) == ["delta", "delta_index"]
    for opened in ([], [3], [0, 1, 2, 3, 4, 49]):
        other = nn.ModuleDict({"engram": Table(table.source)})
        if opened:
            other["engram"].open(torch.tensor(opened))
        other.load_state_dict({f"engram.{name}": x for name, x in state.items()})
        assert torch.equal(other["engram"](rows), table(rows))
        assert other["engram"].delta_index.tolist() == rows.tolist()
        assert other["engram"].delta.requires_grad
        assert other["engram"].delta is not table.delta


@pytest.mark.parametrize(
    ("index", "shape", "match"),
    [
        ([3, 1], (2, *SHAPE), "sorted"),
        ([1, 1], (2, *SHAPE), "twice"),
        ([1, ROWS], (2, *SHAPE), f"row {ROWS}"),
        ([-1, 1], (2, *SHAPE), "row -1"),
        ([1, 2], (3, *SHAPE), r"\[3, 3, 4\]"),
        ([1, 2], (2, 12), r"\[2, 12\]"),
        ([], (0, *SHAPE), "int64"),
        ([1.0, 2.0], (2, *SHAPE), "float32"),
    ],
)
def test_what_is_no_delta_is_refused_and_changes_nothing(index, shape, match):
    table = Table(HeldRows(some_rows()))
    table.open(torch.tensor([4]))
    before, index = table(INDEX), torch.tensor(index)
    with pytest.raises(StateError, match=match):
        table.load_state_dict({"delta_index": index, "delta": torch.zeros(shape)})
    with pytest.raises(StateError, match=match):
        table.merge(index, torch.zeros(shape))
    with pytest.raises(StateError, match=r"delta_index.*without"):
        table.load_state_dict({"delta_index": torch.tensor([1])})
    assert table.delta_index.tolist() == [4]
    assert torch.equal(table(INDEX), before)


def test_merged_deltas_hold_both_and_refuse_a_conflict():
    one, two = (Table(FreshRows(ROWS, SHAPE, std=1.0)) for _ in range(2))
    one.open(torch.tensor([1, 5, 9]))
    two.open(torch.tensor([0, 5, 40]))
    with torch.no_grad():
        one.delta[[0, 2]] += 1
        two.delta[[0, 2]] -= 1
    alone = one(torch.tensor([1, 9])), two(torch.tensor([0, 40])), two(torch.tensor([5]))
    one.merge(two.delta_index, two.delta)
    assert one.delta_index.tolist() == [0, 1, 5, 9, 40]
    for index, rows in zip(([1, 9], [0, 40], [5]), alone, strict=True):
        assert torch.equal(one(torch.tensor(index)), rows)
    one.merge(two.delta_index, two.delta)  # again: nothing is new
    with torch.no_grad():
        two.delta[1] += 1
    before = one.delta
    with pytest.raises(StateError, match=r"1 rows: row 5\."):
        one.merge(two.delta_index, two.delta)
    assert one.delta is before


@pytest.mark.parametrize("row", [-1, ROWS])
def test_numbers_beyond_the_rows_are_refused(row, tmp_path):
    for source in [*each_source(some_rows(), tmp_path).values(), FreshRows(ROWS, SHAPE)]:
        table, index = Table(source), torch.tensor([3, row])
        for call in (table, table.open, table.prefetch):
            with pytest.raises(StateError, match=f"asked for row {row}"):
                call(index)
        table.open(torch.tensor([3]))
        with pytest.raises(StateError, match=f"asked for row {row}"):
            table(index)


def test_another_tier_holds_the_same_rows(tmp_path):
    rows = some_rows()
    table = Table(mapped(rows, tmp_path), hot_bytes=500)
    table.open(torch.tensor([7]))
    before = table(INDEX)
    assert table.nbytes == {"device": 480 + 48 + 8, "ram": 0, "disk": 50 * 48}
    table.attach(HeldRows.copy_of(table.source, "ram"))
    assert table.tier == "ram"
    assert table.nbytes["ram"] == 50 * 48
    assert torch.equal(table(INDEX), before)
    for other in (rows[1:], rows[:, :2], rows.bfloat16()):
        with pytest.raises(StateError, match="Attach a copy"):
            table.attach(HeldRows(other))


def test_rows_on_the_device_move_with_the_model_and_keep_their_type():
    for tier, where in (("device", "meta"), ("ram", "cpu")):
        model = nn.Sequential(Table(HeldRows(some_rows(), tier)))
        model.bfloat16()
        assert model[0].source.dtype == torch.float32
        model.to("meta")
        assert model[0].source.tensor.device.type == where


def test_copies_share_the_rows_and_not_the_delta(tmp_path):
    table = Table(mapped(some_rows(), tmp_path), hot_bytes=500)
    table.open(torch.tensor([7]))
    table(INDEX)
    table.prefetch(torch.tensor([11]))
    before = table(INDEX)
    for twin in (copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        with torch.no_grad():
            twin.delta += 1
        assert torch.equal(table(INDEX), before)
        moved = (twin(INDEX) != before).flatten(2).any(-1)
        assert torch.equal(moved, INDEX == 7)
    assert copy.deepcopy(table).source is table.source


def test_identity_belongs_to_the_values():
    rows = some_rows()
    assert HeldRows(rows).identity == HeldRows(rows.clone(), "device").identity
    changed = rows.clone()
    changed[49, 2, 3] += 1
    others = [changed, rows.bfloat16(), rows.reshape(ROWS, 12)]
    assert HeldRows(rows).identity not in {HeldRows(x).identity for x in others}
    fresh = FreshRows(9, SHAPE, std=1.0)
    assert HeldRows.copy_of(fresh, "ram").identity == fresh.identity


def test_unusable_sources_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="float64"):
        HeldRows(some_rows().double())
    with pytest.raises(ConfigError, match="0 rows"):
        HeldRows(torch.empty(0, 3))
    with pytest.raises(StateError, match="follow each other"):
        mapped(some_rows(), tmp_path, cuts=(20, ROWS))
    source = mapped(some_rows(), tmp_path, cuts=(0, ROWS))
    span = source.spans[0]
    with pytest.raises(StateError, match="too short"):
        MappedRows([Span(span.path, OFFSET, 0, 10**6)], SHAPE, torch.float32, "test")
