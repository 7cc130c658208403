"""A store is a list of tokens per row, wherever its blocks lie."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from memretrofit.errors import StateError
from memretrofit.modules.store import NEVER, Store

SIZE, HEADS, WIDTH = 4, 2, 3
TIERS = ["device", "host", "disk"]
CACHE = 6 * SIZE * (WIDTH + 1) * 4
"""Bytes of six hot units."""


def empty(rows, placement="device", hot_bytes=CACHE, dtype=torch.float32):
    key = torch.empty(rows, HEADS, 0, WIDTH, dtype=dtype)
    return Store.empty(SIZE, key, key[..., :1], placement=placement, hot_bytes=hot_bytes)


def tokens(numbers):
    """Keys [B, G, C, K] and values [B, G, C, 1] that tell their token and their head."""
    told = torch.tensor(numbers, dtype=torch.float32)[:, None, :, None] + 1
    key = told * torch.tensor([1.0, 1.5])[:, None, None] + torch.arange(WIDTH) / 8
    return key, -key[..., :1]


def appended(store, lists, writes, start):
    """The store and the lists of (number, slot) after a block of writes [B][C] at slot `start`."""
    count = len(writes[0])
    numbers = [[100 * b + start + c for c in range(count)] for b in range(len(writes))]
    slots = torch.arange(start, start + count)
    store = store.append(*tokens(numbers), slots, torch.tensor(writes))
    lists = [
        old + [(n, s) for n, s, w in zip(row, slots.tolist(), told, strict=True) if w]
        for old, row, told in zip(lists, numbers, writes, strict=True)
    ]
    return store, lists


def check(store, lists):
    """Every place of every block against the lists."""
    longest = max(len(row) for row in lists)
    blocks = -(-longest // SIZE)
    assert store.block_count() == blocks
    assert store.lengths.tolist() == [len(row) for row in lists]
    index = torch.arange(blocks).expand(len(lists), HEADS, -1)
    keys, values, slots = store.fetch(index)
    assert keys.shape == (len(lists), HEADS, blocks, SIZE, WIDTH)
    for b, row in enumerate(lists):
        places = slots[b].flatten(1)
        assert places.tolist() == [[s for _, s in row] + [NEVER] * (blocks * SIZE - len(row))] * 2
        key, value = tokens([[n for n, _ in row]])
        assert torch.equal(keys[b].flatten(1, 2)[:, : len(row)], key[0])
        assert torch.equal(values[b].flatten(1, 2)[:, : len(row)], value[0])
    first, last = store.spans()
    for b, row in enumerate(lists):
        begun = [row[i][1] if i < len(row) else NEVER for i in range(0, blocks * SIZE, SIZE)]
        ended = [row[i][1] if i < len(row) else NEVER for i in range(3, blocks * SIZE, SIZE)]
        assert first[b].tolist() == begun
        assert last[b].tolist() == ended


def mean(keys, slots):
    return keys.mean(-2)


def check_summaries(store, lists):
    """The mean of every full block."""
    for b, row in enumerate(lists):
        for n in range(len(row) // SIZE):
            key, _ = tokens([[number for number, _ in row[n * SIZE : (n + 1) * SIZE]]])
            torch.testing.assert_close(store.summaries[n, b], key[0].mean(1))


@st.composite
def blocks_of_writes(draw):
    """Some blocks of writes [B][C], ragged, with holes, and all together or one row's alone."""
    rows = draw(st.integers(1, 3))
    row = st.lists(st.booleans(), min_size=1, max_size=11)
    found = []
    for whole in draw(st.lists(st.booleans(), min_size=1, max_size=6)):
        first = draw(row)
        others = [
            draw(st.lists(st.booleans(), min_size=len(first), max_size=len(first)))
            for _ in range(rows - 1)
        ]
        found.append([[True] * len(first)] * rows if whole else [first, *others])
    return found


@pytest.mark.parametrize("placement", TIERS)
@given(written=blocks_of_writes(), data=st.data())
def test_it_is_a_list_per_row(placement, written, data):
    """Forbids: a token in another row's or head's place, a hole that takes a place, an entry that
    the next append overwrites, stale hot blocks, summaries of blocks that are not full.
    """
    store, lists, start = empty(len(written[0]), placement), [[] for _ in written[0]], 0
    for writes in written:
        store, lists = appended(store, lists, writes, start)
        store = store.summarise(mean)
        start += len(writes[0])
        check(store, lists)
        check_summaries(store, lists)
    order = data.draw(st.lists(st.integers(0, len(lists) - 1), min_size=1, max_size=4))
    moved = store.apply(lambda x: x[torch.tensor(order)])
    moved_lists = [lists[b] for b in order]
    check(moved, moved_lists)
    check_summaries(moved, moved_lists)
    after = [[True, b % 2 == 0] * 3 for b in range(len(order))]
    check(*appended(moved, moved_lists, after, start))
    check(store, lists)


@given(written=blocks_of_writes(), cuts=st.sets(st.integers(1, 30)))
def test_any_split_of_the_appends_gives_the_same_store(written, cuts):
    """Forbids: a place that depends on how many tokens come at once."""
    writes = [[w for block in written for w in block[b]] for b in range(len(written[0]))]
    lists = [[] for _ in writes]
    store, _ = appended(empty(len(writes)), lists, writes, 0)
    edges = [0, *sorted(c for c in cuts if c < len(writes[0])), len(writes[0])]
    split = empty(len(writes))
    for low, high in pairwise(edges):
        split, lists = appended(split, lists, [row[low:high] for row in writes], low)
        split = split.summarise(mean)
    check(store, lists)
    check(split, lists)
    full = store.summarise(mean).summaries
    for b, row in enumerate(lists):
        n = len(row) // SIZE
        assert torch.equal(split.summaries[:n, b], full[:n, b])


@pytest.mark.parametrize("placement", TIERS)
@pytest.mark.parametrize("last", [True, False], ids=["even", "ragged"])
def test_an_older_value_does_not_see_what_was_appended_on_trial(placement, last):
    """Forbids: a rejected candidate in a fetched block, in a hot block or in a summary. The trial
    fills block 1, which is read, and is then taken back.
    """
    kept, lists = appended(empty(2, placement), [[], []], [[True] * 6, [True] * 5 + [last]], 0)
    trial, trial_lists = appended(kept, lists, [[True] * 9] * 2, 50)
    check(trial.summarise(mean), trial_lists)
    check(kept, lists)
    again, again_lists = appended(kept, lists, [[True] * 5] * 2, 6)
    again = again.summarise(mean)
    check(again, again_lists)
    check_summaries(again, again_lists)
    check(kept, lists)


@pytest.mark.parametrize("placement", TIERS)
@pytest.mark.parametrize("twin", [copy.deepcopy, Store.clone], ids=["deepcopy", "clone"])
def test_a_copy_is_independent(placement, twin):
    """Forbids: two conversations that write into one slab."""
    store, lists = appended(empty(1, placement), [[]], [[True] * 10], 0)
    other = twin(store)
    one = appended(store, lists, [[True] * 7], 20)
    two = appended(other, lists, [[True] * 7], 60)
    check(*one)
    check(*two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("placement", TIERS[1:])
def test_host_and_disk_equal_the_device_bit_by_bit(placement, dtype):
    """Forbids: a lossy detour, another dtype, a partly filled block that is not zero behind its
    end.
    """
    stores = [empty(3, "device", 0, dtype), empty(3, placement, CACHE, dtype)]
    for start in range(0, 60, 12):
        key, value = torch.randn(3, HEADS, 12, WIDTH), torch.randn(3, HEADS, 12, 1)
        writes = torch.rand(3, 12) < 0.7
        stores = [
            store.append(key.to(dtype), value.to(dtype), torch.arange(start, start + 12), writes)
            for store in stores
        ]
        for _ in range(4):
            index = torch.randint(0, stores[0].block_count(), (3, HEADS, 5))
            for one, other in zip(*(store.fetch(index) for store in stores), strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)
    for one, other in zip(*(store.live() for store in stores), strict=True):
        assert torch.equal(one, other)


def test_gradients_reach_every_token_through_any_number_of_appends():
    """Forbids: a token that is stored without its history, a gradient that meets memory written
    since.
    """
    key = torch.randn(1, HEADS, 10, WIDTH, requires_grad=True)
    value = torch.randn(1, HEADS, 10, 1, requires_grad=True)
    store = empty(1)
    for low, high in ((0, 3), (3, 8), (8, 10)):
        store = store.append(
            key[:, :, low:high],
            value[:, :, low:high],
            torch.arange(low, high),
            torch.ones(1, high - low, dtype=torch.bool),
        ).summarise(mean)
    keys, values, _ = store.fetch(torch.tensor([[[0, 2], [1, 2]]]))
    (keys.sum() + 2 * values.sum() + 3 * store.summaries[1].sum()).backward()
    # head 0 fetched tokens 0-3, 8, 9, head 1 tokens 4-9; block 1 was summarised for both
    fetched = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1, 1, 1.0]])
    summed = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0, 0]) * 3 / SIZE
    assert torch.equal(key.grad[0, :, :, 0], fetched + summed)
    assert torch.equal(value.grad[0, :, :, 0], 2 * fetched)


@pytest.mark.parametrize("placement", TIERS[1:])
def test_gradients_are_refused_where_they_would_be_lost(placement):
    """Forbids: training that silently does not reach the stored tokens."""
    store, lists = appended(empty(1, placement), [[]], [[True] * 6], 0)
    key, value = tokens([[7]])
    key.requires_grad_()
    one = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(StateError, match="placement='device'"):
        store.append(key, value, torch.tensor([6]), one)
    with torch.no_grad():
        check(store.append(key, value, torch.tensor([6]), one), [[*lists[0], (7, 6)]])


def test_slots_of_an_earlier_text_are_lower():
    """Forbids: a carried token that counts as one of the new text."""
    store, (row,) = appended(empty(1), [[]], [[True] * 6], 0)
    check(store.earlier(6), [[(number, slot - 6) for number, slot in row]])
    check(store, [row])
