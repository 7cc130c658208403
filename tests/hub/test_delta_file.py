"""Edits on disk: small, undone by dropping them, and refused by every other bank."""

from __future__ import annotations

import json
import resource
import struct

import pytest
import torch
from torch import nn

from memretrofit.errors import CheckpointError, StateError
from memretrofit.hub.bank_file import open_bank, write_bank
from memretrofit.hub.delta_file import load_delta, save_delta
from memretrofit.hub.record import DELTA
from memretrofit.modules.table import FreshRows, HeldRows, Table

ALL = torch.arange(20)


def tables(seed=0, rows=20):
    return {
        "rows": Table(FreshRows(rows, (3, 4), seed=seed, std=1.0)),
        "generic": Table(FreshRows(2, (4,), seed=seed)),
    }


def trained(*rows, **kwargs):
    bank = tables(**kwargs)
    bank["rows"].open(torch.tensor(rows))
    nn.init.normal_(bank["rows"].delta)
    return bank


def load(path, bank):
    for name, delta in load_delta(path, bank).items():
        bank[name].merge(*delta)


def test_an_edit_is_saved_loaded_and_dropped(tmp_path):
    path, bank = tmp_path / "new" / DELTA, trained(3, 19)
    save_delta(bank, path)
    assert path.stat().st_size < 3 * 4096  # two rows, and not the bank
    other = tables()
    fresh = other["rows"](ALL)
    load(path, other)
    assert torch.equal(other["rows"](ALL), bank["rows"](ALL))
    assert not torch.equal(other["rows"](ALL), fresh)
    assert other["generic"].delta is None
    other["rows"].drop()
    assert torch.equal(other["rows"](ALL), fresh)


def test_an_edit_fits_its_rows_in_every_tier(tmp_path):
    bank = trained(3, 19)
    save_delta(bank, tmp_path / DELTA)
    for number, shard_bytes in enumerate((100, 10**6)):
        folder = tmp_path / str(number)
        write_bank({n: t.source for n, t in bank.items()}, folder, shard_bytes=shard_bytes)
        mapped = {name: Table(source) for name, source in open_bank(folder).items()}
        held = {n: Table(HeldRows.copy_of(t.source, "ram")) for n, t in mapped.items()}
        for other in (mapped, held):
            load(tmp_path / DELTA, other)
            assert torch.equal(other["rows"](ALL), bank["rows"](ALL))
        save_delta(mapped, tmp_path / "again")
        load(tmp_path / "again", tables())


def test_one_changed_bit_is_noticed(tmp_path):
    """An edit may be shared alone: every value that it holds is in the hash."""
    path, bank = tmp_path / DELTA, trained(3, 19)
    save_delta(bank, path)
    content = bytearray(path.read_bytes())
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    place = content.index(bank["rows"].delta.detach().numpy().tobytes(), begin)
    for byte in (place, place + 2, place + 95):
        changed = content.copy()
        changed[byte] ^= 1
        path.write_bytes(changed)
        with pytest.raises(CheckpointError, match="not what was saved"):
            load_delta(path, tables())


def test_edits_of_other_rows_merge(tmp_path):
    one, two, both = trained(3, 19), trained(4), tables()
    for name, bank in (("one", one), ("two", two)):
        save_delta(bank, tmp_path / name)
        load(tmp_path / name, both)
    assert both["rows"].delta_index.tolist() == [3, 4, 19]
    expected = tables()["rows"](ALL)
    expected[[3, 19]], expected[4] = one["rows"].delta.detach(), two["rows"].delta.detach()[0]
    assert torch.equal(both["rows"](ALL), expected)
    save_delta(trained(19), tmp_path / "three")
    with pytest.raises(StateError, match=r"row 19\."):
        load(tmp_path / "three", both)


@pytest.mark.parametrize("other", [{"seed": 1}, {"rows": 21}])
def test_an_edit_of_another_bank_is_refused(other, tmp_path):
    save_delta(trained(3, **other), tmp_path / DELTA)
    bank = tables()
    with pytest.raises(CheckpointError, match=r"table 'rows' \(fresh-1 .*Open the bank"):
        load(tmp_path / DELTA, bank)
    with pytest.raises(CheckpointError, match="this bank has tables generic"):
        load_delta(tmp_path / DELTA, {"generic": bank["generic"]})
    assert bank["rows"].delta is None


def test_what_cannot_be_saved_leaves_the_old_edit(tmp_path):
    path, bank = tmp_path / DELTA, trained(3)
    save_delta(bank, path)
    before = path.read_bytes()
    with pytest.raises(StateError, match="No row"):
        save_delta(tables(), path)
    with torch.no_grad():
        bank["rows"].delta[0, 0, 0] = torch.inf
    with pytest.raises(StateError, match="'rows' holds nan or infinity"):
        save_delta(bank, path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"Saving .* failed"):
        save_delta(trained(4), tmp_path / "file" / DELTA)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4100, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="failed: File too large"):
            save_delta(trained(4), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert {x.name for x in tmp_path.iterdir()} == {DELTA, "file"}


def metadata(**changes):
    return lambda header: header["__metadata__"].update(changes)


def forged(index, dtype="I64"):
    """Other bytes for the numbers of the rows, which lie first."""

    def change(path):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        new = torch.tensor(index).numpy().tobytes()
        path.write_bytes(data[: 8 + length] + new + data[8 + length + len(new) :])

    return change


@pytest.mark.parametrize("index", [[19, 3], [3, 3], [3, 20], [-1, 3]])
def test_forged_row_numbers_are_refused(index, tmp_path):
    save_delta(trained(3, 19), tmp_path / DELTA)
    forged(index)(tmp_path / DELTA)
    with pytest.raises(CheckpointError, match=r"table 'rows'.*delta_index"):
        load_delta(tmp_path / DELTA, tables())


@pytest.mark.parametrize(
    "change",
    [
        metadata(kind="memretrofit.delta.9"),
        metadata(tables="{"),
        metadata(tables="[]"),
        metadata(tables="[" * 100_000),
        metadata(tables=3),
        metadata(tables=json.dumps({"rows": {}, "more": {}})),
        lambda header: header.pop("__metadata__"),
        lambda header: header.update(__metadata__=[]),
        lambda header: header.update(other=header.pop("rows.index")),
    ],
)
def test_a_header_that_is_no_delta_is_refused(change, tmp_path):
    path = tmp_path / DELTA
    save_delta(trained(3, 19), path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(CheckpointError, match="no delta of this release"):
        load_delta(path, tables())


@pytest.mark.parametrize("lost", [1, 60, 4000])
def test_a_truncated_edit_is_refused(lost, tmp_path):
    path = tmp_path / DELTA
    save_delta(trained(3, 19), path)
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        load_delta(path, tables())
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_delta(tmp_path / "missing", tables())
