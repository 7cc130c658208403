"""Banks on disk: what was written is read, whatever is wrong is named, and nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import struct

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from memretrofit.errors import CheckpointError, ConfigError
from memretrofit.evaluation.bench_room import peak_bytes, reset_peak
from memretrofit.hub.bank_file import INDEX, open_bank, write_bank
from memretrofit.modules.table import FreshRows, HeldRows, Table

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
SHARD = "bank-00002-of-00004.safetensors"


def sources(dtype=torch.float32):
    """A table in three shards of 4, 4 and 2 rows (`write`), and one that needs a single one."""
    big, small = torch.randn(10, 2, 8).to(dtype), torch.randn(3, 5).to(dtype)
    return {"rows": HeldRows(big), "generic": HeldRows(small)}


def write(tables, folder, **kwargs):
    itemsize = next(iter(tables.values())).dtype.itemsize
    write_bank(tables, folder, shard_bytes=4 * 16 * itemsize, **kwargs)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def bank(tmp_path):
    folder = tmp_path / "bank"
    write(sources(), folder)
    return folder


def edit_index(folder, change):
    values = json.loads((folder / INDEX).read_text())
    change(values)
    (folder / INDEX).write_text(json.dumps(values))


def edit_header(path, change):
    """Change the header of a shard and leave its rows."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bank_on_disk_is_the_bank_in_memory(dtype, tmp_path):
    tables, told = sources(dtype), []
    write(tables, tmp_path, progress=lambda done, total: told.append((done, total)))
    total = sum(source.nbytes for source in tables.values())
    assert told == sorted(told)
    assert told[-1] == (total, total)
    opened = open_bank(tmp_path)
    assert {*opened} == {*tables}
    index = torch.tensor([[9, 0, 4], [3, 3, 8]])
    for name, source in tables.items():
        assert opened[name].identity == source.identity
        assert (opened[name].rows, opened[name].shape) == (source.rows, source.shape)
        number = index % source.rows
        tiers = [source, opened[name], HeldRows.copy_of(opened[name], "device")]
        rows = [Table(tier)(number, dtype=dtype).view(torch.uint8) for tier in tiers]
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], rows[2])
        assert torch.equal(rows[0], source.tensor[number].view(torch.uint8))


def test_shards_are_plain_safetensors_from_a_page_on(bank):
    index = json.loads((bank / INDEX).read_text())
    assert {*content(bank)} == {INDEX, *index["weight_map"].values()}
    assert [*index["weight_map"]] == ["rows[0:4]", "rows[4:8]", "rows[8:10]", "generic[0:3]"]
    opened = open_bank(bank)
    for part, file in index["weight_map"].items():
        name, _, span = part.partition("[")
        low, high = map(int, span[:-1].split(":"))
        expected = opened[name].read(torch.arange(low, high))
        assert torch.equal(load_file(bank / file)[part], expected)
        (length,) = struct.unpack("<Q", (bank / file).read_bytes()[:8])
        assert (8 + length) % 4096 == 0


def test_a_bank_larger_than_memory_opens_and_trains(tmp_path):
    rows = 9 << 20
    write_bank({"rows": FreshRows(rows, (1024,))}, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert sum(path.stat().st_size for path in shards) > 36 << 30
    assert sum(path.stat().st_blocks * 512 for path in shards) < 1 << 20
    before = {path: path.stat().st_mtime_ns for path in shards}
    held = reset_peak()
    table = Table(open_bank(tmp_path)["rows"], hot_bytes=1 << 20)
    asked = torch.randint(rows, (50, 8))
    table.open(asked)
    optimizer = torch.optim.SparseAdam([table.delta], lr=0.1)
    for index in asked:
        optimizer.zero_grad()
        (table(torch.cat([index, torch.randint(rows, (8,))])) - 1).square().mean().backward()
        optimizer.step()
    assert peak_bytes() - held < 64 << 20
    assert table(asked).min() > 0
    assert {path: path.stat().st_mtime_ns for path in shards} == before


def test_a_bank_is_never_written_again(bank):
    before = content(bank)
    with pytest.raises(CheckpointError, match=r"holds a bank.*another folder"):
        write(sources(), bank)
    assert content(bank) == before


@pytest.fixture
def small_disk():
    """Files end at 3 pages: a write beyond fails as on a full disk, in the system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("blank", [False, True])
def test_a_full_disk_leaves_nothing_behind(blank, tmp_path):
    tables = {"generic": HeldRows(torch.randn(4, 4)), "rows": HeldRows(torch.randn(9000, 4))}
    if blank:
        tables["rows"] = FreshRows(9000, (4,))
    (tmp_path / "card.md").write_text("mine")
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(CheckpointError, match=r"Saving to .* failed: File too large"):
            write_bank(tables, folder)
    assert content(tmp_path) == {"card.md": b"mine"}
    assert [path.name for path in tmp_path.iterdir()] == ["card.md"]


def test_a_bank_without_room_is_refused_before_it_is_begun(tmp_path):
    with pytest.raises(CheckpointError, match=r"needs 40960000000000 bytes, and \d+ are free"):
        write_bank({"rows": FreshRows(10**10, (1024,), std=1.0)}, tmp_path / "bank")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("moment", [1, 3])
def test_an_interrupt_leaves_nothing_and_what_a_kill_left_is_cleared(moment, tmp_path):
    def interrupt(done, total):
        told.append(done)
        if len(told) == moment:
            raise KeyboardInterrupt

    told = []
    with pytest.raises(KeyboardInterrupt):
        write(sources(), tmp_path / "bank", progress=interrupt)
    assert not [*tmp_path.iterdir()]
    (tmp_path / ".saving-killed").mkdir()
    (tmp_path / ".saving-killed" / SHARD).write_bytes(b"half")
    for stray in (SHARD, "bank-00001-of-00009.safetensors", "mine.txt"):
        (tmp_path / stray).write_bytes(b"half")
    with pytest.raises(CheckpointError, match="no bank to open"):
        open_bank(tmp_path)
    write(sources(), tmp_path)
    assert sum(source.rows for source in open_bank(tmp_path).values()) == 13
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        INDEX,
        "mine.txt",
        *(f"bank-0000{i}-of-00004.safetensors" for i in range(1, 5)),
    }


@pytest.mark.parametrize("name", ["", "a/b", "..", "rows[0:4]", "1st"])
def test_tables_need_plain_names(name, tmp_path):
    with pytest.raises(ConfigError, match="named like a Python variable"):
        write_bank({name: FreshRows(3, (2,))}, tmp_path)
    with pytest.raises(ConfigError, match="at least one table"):
        write_bank({}, tmp_path)
    assert not [*tmp_path.iterdir()]


def remap(part, file):
    return lambda values: values["weight_map"].update({part: file})


def rename(part, other):
    return lambda values: values["weight_map"].update({other: values["weight_map"].pop(part)})


def entry(**changes):
    return lambda values: values["tables"]["rows"].update(changes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (remap("rows[0:4]", "../secret.safetensors"), "no shard of a bank"),
        (remap("rows[0:4]", "/etc/passwd"), "no shard of a bank"),
        (remap("rows[0:4]", f"./{SHARD}"), "no shard of a bank"),
        (remap("rows[0:4]", 3), "no shard of a bank"),
        (remap("rows[0:4]", SHARD), r"holds rows\[4:8\]"),
        (remap("rows[0:4]", "bank-00009-of-00009.safetensors"), "cannot be read: No such file"),
        (rename("rows[4:8]", "rows[3:8]"), "each once"),
        (rename("rows[4:8]", "rows[4:9]"), "each once"),
        (rename("rows[8:10]", "rows[8:9]"), "each once"),
        (rename("rows[8:10]", f"rows[8:{10**17}]"), "each once"),
        (rename("rows[8:10]", f"rows[8:{10**30}]"), "no part of a table"),
        (rename("rows[4:8]", "rows"), "no part of a table"),
        (rename("rows[4:8]", "other[4:8]"), "no part of a table"),
        (entry(rows=11), "each once"),
        (entry(rows=True), "no legal rows"),
        (entry(rows=-1), "no legal rows|each once"),
        (entry(shape=[16]), "promises F32"),
        (entry(shape=[-2, -8]), "no legal rows"),
        (entry(shape=[10**12, 10**12]), "no legal rows"),
        (entry(dtype="F64"), "promises F64"),
        (entry(dtype="pickle"), "promises pickle"),
        (entry(identity="sha256:0"), "of another bank"),
        (lambda values: values["tables"].update(rows=[]), "no legal rows"),
        (lambda values: values["tables"].update(more={"rows": 0, "shape": [2]}), "no legal rows"),
        (lambda values: values["metadata"].update(format="memretrofit.bank.9"), "this release"),
        (lambda values: values.pop("weight_map"), "no metadata, tables and weight_map"),
    ],
)
def test_a_damaged_index_is_named(change, match, bank):
    edit_index(bank, change)
    with pytest.raises(CheckpointError, match=match):
        open_bank(bank)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00"])
def test_an_index_that_is_no_json_object_is_named(text, bank):
    (bank / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"bank\.safetensors\.index\.json is damaged"):
        open_bank(bank)


def part_entry(**changes):
    return lambda header: header["rows[4:8]"].update(changes)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (part_entry(shape=[10**9, 2, 8]), "does not fit 256 bytes"),
        (part_entry(data_offsets=[0, 10**15]), "does not fit"),
        (part_entry(data_offsets=[-256, 0]), "no legal dtype"),
        (part_entry(data_offsets=[64, 320]), "need"),
        (part_entry(dtype="F32 "), "no legal dtype"),
        (part_entry(dtype="I32"), "promises F32"),
        (part_entry(shape=[8, 8]), "promises F32"),
        (lambda header: header.update(more=header["rows[4:8]"]), "need"),
        (lambda header: header.update(__metadata__=3), "of another bank"),
        (lambda header: header["__metadata__"].update(row_start="0"), "of another bank"),
    ],
)
def test_a_damaged_shard_is_named(change, match, bank):
    edit_header(bank / SHARD, change)
    with pytest.raises(CheckpointError, match=f"{SHARD}.*{match}"):
        open_bank(bank)


@pytest.mark.parametrize("length", [0, 7, 8, 4096, 4100, -1, -255])
def test_a_truncated_shard_is_named(length, bank):
    size = (bank / SHARD).stat().st_size
    os.truncate(bank / SHARD, length if length >= 0 else size + length)
    with pytest.raises(CheckpointError, match=f"{SHARD} is damaged or truncated"):
        open_bank(bank)


@pytest.mark.parametrize("claim", [1 << 63, (1 << 64) - 1, 1 << 30, 5000])
def test_an_absurd_header_is_not_allocated(claim, bank):
    data = (bank / SHARD).read_bytes()
    (bank / SHARD).write_bytes(struct.pack("<Q", claim) + data[8:])
    with pytest.raises(CheckpointError, match=f"{SHARD} is damaged.* its header claims"):
        open_bank(bank)


def test_shards_of_two_banks_do_not_mix(bank, tmp_path):
    write(sources(), tmp_path / "other")  # of the same sizes, with other values
    os.replace(tmp_path / "other" / SHARD, bank / SHARD)
    with pytest.raises(CheckpointError, match=f"{SHARD} is a shard of another bank"):
        open_bank(bank)


def test_an_open_bank_outlives_its_folder(bank):
    """Whoever replaces or deletes the folder does not disturb the model that reads from it."""
    table = Table(open_bank(bank)["rows"])
    before = table(torch.arange(10))
    for path in bank.iterdir():
        path.unlink()
    table.open(torch.tensor([3]))
    nn.init.zeros_(table.delta)
    assert torch.equal(table(torch.tensor([2, 4])), before[[2, 4]])
