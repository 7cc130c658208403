"""Where the blocks of a store lie: counted bytes, files that vanish, full disks, saved blocks."""

from __future__ import annotations

import copy
import gc
import os
import resource
import tempfile
from collections import OrderedDict

import pytest
import torch

from memretrofit.errors import CheckpointError, StateError
from memretrofit.modules.store import NEVER, Store

SIZE, HEADS, WIDTH = 4, 2, 8
UNIT = SIZE * WIDTH * 2 * 4
"""Bytes of the keys and values of a unit."""
TIERS = ["host", "disk"]


def filled(tokens, rows=1, **kwargs):
    store = Store.empty(SIZE, *torch.empty(2, rows, HEADS, 0, WIDTH), **kwargs)
    return grown(store, tokens)


def grown(store, tokens, start=0):
    rows = len(store.counts)
    new = torch.randn(2, rows, HEADS, tokens, WIDTH)
    slots = torch.arange(start, start + tokens)
    store = store.append(*new, slots, torch.ones(1, tokens, dtype=torch.bool))
    return store.summarise(lambda keys, slots: keys.mean(-2))


def whole(store):
    return {name: torch.cat(pieces) for name, pieces in store.saved().items()}


def one_head(*blocks):
    """Indices that fetch `blocks` in head 0 and block 9 in head 1."""
    return torch.tensor([[blocks, (9,) * len(blocks)]])


def same(one, other):
    """Whether two stores hold the same tokens at the same places."""
    index = torch.arange(one.block_count()).expand(len(one.counts), HEADS, -1)
    (*one, slots), (*other, others) = one.fetch(index), other.fetch(index)
    empty = (slots == NEVER)[..., None]
    return torch.equal(slots, others) and all(
        torch.equal(x.masked_fill(empty, 0), y.masked_fill(empty, 0))
        for x, y in zip(one, other, strict=True)
    )


def descriptors(folder):
    """Sizes of the open files in a folder, named or not."""
    links = {entry.path: os.path.realpath(entry.path) for entry in os.scandir("/proc/self/fd")}
    return [os.stat(path).st_size for path, link in links.items() if link.startswith(str(folder))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("placement", TIERS)
def test_hot_blocks_by_hand(placement):
    """Forbids: first in first out for least recently used, a block counted twice, a partly filled
    block that is kept. Room for three units; head 1 always wants block 9, which is not full.
    """
    store = filled(38, placement=placement, hot_bytes=3 * UNIT + 7)
    trace = [
        ((0,), 0, 2),  # keeps 0
        ((1,), 0, 2),  # 0 1
        ((2,), 0, 2),  # 0 1 2
        ((0,), 1, 1),  # 1 2 0
        ((3,), 0, 2),  # 2 0 3
        ((0, 2), 2, 1),  # 3 0 2
        ((1, 3), 1, 2),  # 2 3 1, and 0 is gone
        ((0, 0), 0, 2),  # 3 1 0
        ((3, 1), 2, 1),
        ((2, 4, 5, 6), 0, 5),  # more than there is room for
        ((5, 6), 2, 1),
    ]
    hits = misses = 0
    for blocks, hit, miss in trace:
        store.fetch(one_head(*blocks))
        hits, misses = hits + hit, misses + miss
        assert (store.reads.hits, store.reads.misses) == (hits, misses), blocks
    assert store.reads.nbytes == misses * UNIT


def test_hot_blocks_follow_a_list_of_the_last_used():
    """Forbids: a count or a value that is off after evictions in any order."""
    plain, room = filled(64 * SIZE, rows=2), 9
    store = Store.opened(**whole(plain), placement="host", hot_bytes=room * UNIT)
    held, hits = OrderedDict(), 0
    for _ in range(150):
        index = (torch.rand(2, HEADS, 3) ** 3 * 64).long()
        for one, other in zip(plain.fetch(index), store.fetch(index), strict=True):
            assert torch.equal(one, other)
        row, head = torch.arange(2)[:, None, None], torch.arange(HEADS)[None, :, None]
        wanted = sorted(set(((index * 2 + row) * HEADS + head).flatten().tolist()))
        found = [unit for unit in wanted if unit in held]
        hits += len(found)
        free = room - len(found)
        missed = [unit for unit in wanted if unit not in held][-free:] if free else []
        while len(held) + len(missed) > room:
            del held[next(unit for unit in held if unit not in found)]
        for unit in sorted(found + missed):
            held[unit] = True
            held.move_to_end(unit)
        assert store.reads.hits == hits


@pytest.mark.parametrize("placement", ["device", *TIERS])
def test_bytes_of_each_tier(placement):
    """Forbids: a report that leaves out the room, the hot blocks or a tier."""
    store = filled(10 * SIZE, placement=placement, hot_bytes=5 * UNIT)
    blocks = 10 * HEADS * UNIT
    # one 8-byte slot per token, one float32 summary per block and head, one length
    small = 10 * SIZE * 8 + 10 * HEADS * WIDTH * 4 + 8
    hot = 0 if placement == "device" else 5 * UNIT
    expected = {"device": small + hot, "host": 0, "disk": 0}
    expected[placement] += blocks
    assert store.tier_nbytes() == expected
    assert store.nbytes == blocks + small + hot
    assert store.device_nbytes == expected["device"]


@pytest.mark.parametrize("placement", TIERS)
def test_keys_may_lie_elsewhere_than_values(placement, tmp_path):
    """Keys on the device, values not: same tokens, each where it was asked for, in a store that was
    filled, copied or opened; only values are read and kept hot."""
    key = torch.empty(1, HEADS, 0, WIDTH)
    tiers = {"placement": placement, "key_placement": "device", "hot_bytes": 3 * UNIT}
    torch.manual_seed(0)
    plain = grown(Store.empty(SIZE, key, key), 38)
    torch.manual_seed(0)
    store = grown(Store.empty(SIZE, key, key, **tiers), 38)
    opened = Store.opened(**mapped(tmp_path / "saved", plain), **tiers)
    for one in (store, store.clone(), opened):
        assert same(one, plain)
        held, values = one.tier_nbytes(), one.values.nbytes
        assert held[placement] == values
        assert held["device"] == one.nbytes - values
        before = one.reads.nbytes
        one.fetch(one_head(7))
        one.fetch(one_head(7))
        # block 7 is hot; block 9, which is not full, is read both times, and half of it is values
        assert one.reads.nbytes - before == 2 * UNIT // 2


@pytest.mark.parametrize("tokens", [38, 40])
def test_an_opened_index_is_copied_once(tokens):
    """With room for what follows: no second copy when the first new block begins."""
    saved = whole(filled(tokens))
    opened = Store.opened(**saved, placement="host")
    one = grown(opened, 1, tokens)
    slots, summaries = one.slots.data_ptr(), None
    for more in range(1, 2 * SIZE):
        one = grown(one, 1, tokens + more)
        assert one.slots.data_ptr() == slots
        if one.summarised != opened.summarised:
            summaries = summaries or one.summaries.data_ptr()
            assert one.summaries.data_ptr() == summaries
    assert saved["slots"].data_ptr() != slots


@pytest.mark.parametrize("rows", [1, 2])
def test_slices_are_the_store_in_order(rows, tmp_path):
    """Where they lie: a slice of an opened store shares its memory. Witness: rows that moved."""
    plain = filled(38, rows=rows)
    tensors = mapped(tmp_path / "saved", plain)
    for store in (plain, Store.opened(**tensors, placement="host")):
        for most in (1, 3, 99):
            keys, values, held = (
                torch.cat(parts) for parts in zip(*store.slices(most), strict=True)
            )
            assert held.sum((0, 2)).tolist() == [38] * rows
            for found, expected in zip((keys, values), store.live(), strict=True):
                found = found.movedim(0, 2).flatten(2, 3)[:, :, :38]
                assert torch.equal(found, expected)
            assert max(len(part[0]) for part in store.slices(most)) <= most
    first = next(iter(store.slices(3)))[0]
    assert first.data_ptr() == tensors["keys"].data_ptr()
    if rows == 2:
        moved = next(iter(store.apply(lambda x: x.flip(0)).slices(3)))[0]
        assert torch.equal(moved, first.flip(1))


def test_a_file_has_no_name_and_goes_with_its_store(folder):
    """Forbids: gigabytes that stay behind, whether the process ends well or is killed."""
    store = filled(50, placement="disk")
    twin = copy.deepcopy(store)
    assert descriptors(folder)
    assert not list(folder.iterdir())
    older = store
    for start in range(50, 500, 50):
        store = grown(store, 50, start)
    del store, older
    gc.collect()
    assert descriptors(folder)
    assert filled(50).lengths.equal(twin.lengths)
    del twin
    gc.collect()
    assert not descriptors(folder)


@pytest.fixture
def full_disk():
    """Files that may not grow beyond 64 KiB: to a process, much the same as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_is_an_error_and_the_store_goes_on(folder):
    """Forbids: a bus error, a store that lost tokens, space that is kept for nothing."""
    store = filled(300, placement="disk")
    plain = Store.opened(**whole(store), placement="device")
    sizes = descriptors(folder)
    with pytest.raises(StateError) as failure:
        grown(store, 9000, 300)
    for said in (str(folder), "bytes are free", "TMPDIR", "placement='host'"):
        assert said in str(failure.value)
    assert same(store, plain)
    assert descriptors(folder) == sizes
    with pytest.raises(StateError, match="more bytes"):
        store.apply(lambda x: x.repeat_interleave(9, dim=0))
    torch.manual_seed(1)
    more = grown(store, 40, 300)
    torch.manual_seed(1)
    assert same(more, grown(plain, 40, 300))


def mapped(path, store):
    """Tensors of a saved store, keys and values in a file that is mapped."""
    tensors = whole(store)
    path.write_bytes(b"".join(tensors[name].numpy().tobytes() for name in ("keys", "values")))
    numbers = torch.from_file(str(path), shared=True, size=path.stat().st_size // 4)
    keys, values = numbers.split([tensors["keys"].numel(), tensors["values"].numel()])
    shapes = tensors["keys"].shape, tensors["values"].shape
    return {**tensors, "keys": keys.view(shapes[0]), "values": values.view(shapes[1])}


@pytest.mark.parametrize("placement", TIERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_opened_blocks_are_read_and_never_written(placement, rows, tmp_path):
    """Forbids: a saved store that its readers change, rows that copy the book they share. The
    first new token finds room in a block that was saved.
    """
    plain = filled(30, rows=rows)
    ragged = torch.arange(9) < torch.tensor([3, 5, 2])[:rows, None]
    new = torch.randn(2, rows, HEADS, 9, WIDTH)
    plain = plain.append(*new, torch.arange(30, 39), ragged)
    path = tmp_path / "saved"
    tensors = mapped(path, plain)
    before, copies = path.read_bytes(), {name: x.clone() for name, x in tensors.items()}
    store = Store.opened(**tensors, placement=placement, hot_bytes=4 * UNIT)
    complete = min(plain.counts) // SIZE
    assert store.keys.room.shape[0] == plain.block_count() - complete
    assert same(store, plain)
    order = torch.tensor([rows - 1, 0, 0])
    pairs = [(store, plain), (store.clone(), plain)]
    pairs.append((store.apply(lambda x: x[order]), plain.apply(lambda x: x[order])))
    for opened, held in pairs:
        assert opened.keys.base.data_ptr() == tensors["keys"].data_ptr()
        torch.manual_seed(5)
        opened = grown(grown(opened, 1, 39), 20, 40)
        torch.manual_seed(5)
        held = grown(grown(held.clone(), 1, 39), 20, 40)
        assert same(opened, held)
        for b, full in enumerate(held.summarised):
            assert torch.equal(opened.summaries[:full, b], held.summaries[:full, b])
        assert same(Store.opened(**whole(opened), placement="device"), held)
    assert same(store, plain)
    assert path.read_bytes() == before
    assert all(torch.equal(tensors[name], copies[name]) for name in tensors)


@pytest.mark.parametrize("name", ["keys", "values", "slots", "summaries", "lengths"])
def test_sizes_that_contradict_each_other_are_refused(name):
    """Forbids: a damaged file that is read as a store."""
    saved = whole(filled(10))
    saved[name] = -saved[name] if name == "lengths" else saved[name][..., :1, :1]
    with pytest.raises(CheckpointError, match="save it again"):
        Store.opened(**saved, placement="host")
