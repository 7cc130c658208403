"""Blocks on a path: against one token at a time, beside each other, merged, and counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.families import VOCABULARY, build, tokens
from contract.runs import apart, in_pieces, one_pass
from fed import ffns_of
from tolerances import REORDERED, WRONG
from torch.nn import functional as F

from memretrofit.errors import ConfigError, StateError
from memretrofit.methods.hierarchical_ffn import HIERARCHICAL_160M, HierarchicalFFNConfig
from memretrofit.modules.bank import Preparation, Tokens
from memretrofit.modules.hierarchical import GENERIC, HierarchicalBank
from memretrofit.ops.tree import nodes_of
from memretrofit.patching.controls import route_pinned
from memretrofit.patching.ledger import ledger_of
from memretrofit.retrofit import memory_parameters, patch

LENGTH = 20
SMALL = HierarchicalFFNConfig(branching=(2, 3), block_sizes=(4, 2), route_tokens=6)
EXAMPLES = list(tokens(12, LENGTH, seed=1))
GENERIC_TEXTS = list(tokens(6, LENGTH, seed=2))


def bank_of(model) -> HierarchicalBank:
    return ledger_of(model).bank


def live(config=SMALL, *, every=True, **options):
    """A model whose opened rows, all or those of the examples, are far from where they start."""
    model = patch(build("llama", **options), config)
    bank, embedding = bank_of(model), model.get_input_embeddings().weight.detach()
    bank.prepare(Preparation(examples=EXAMPLES, generic=GENERIC_TEXTS, embedding=embedding))
    bank.open_rows(EXAMPLES)
    for _, table in bank.each_table():
        if every:
            table.open(torch.arange(table.rows))
    move(model)
    return model


def move(model, scale=0.3, seed=0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for rows in memory_parameters(model).values():
            rows.add_(scale * torch.randn(rows.shape, generator=generator))


def by_hand(bank, nodes, layer, x):
    """What the path of one token adds, level by level, in float64."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for level, node in enumerate(nodes.tolist(), start=1):
        if node < 0:
            break
        rows = bank.table(f"level_{level}")(torch.tensor([node]))[0, layer].detach().double()
        for gate, up, down in zip(*rows, strict=True):
            out += F.silu(gate @ x.double()) * (up @ x.double()) * down
    return out


def routes_of(bank, row) -> torch.Tensor:
    """[T, levels] the nodes of each token, from the router, prefix by prefix."""
    first = row[: bank.route_tokens]
    found = [bank.router(first[None, : t + 1])[0, -1] for t in range(len(first))]
    return torch.stack([*found, *[found[-1]] * (len(row) - len(first))])


@torch.no_grad()
def test_each_token_reads_the_rows_of_its_own_path():
    """Against a loop over tokens, levels and rows; a path one token late is far away."""
    model, base = live(layers=1), build("llama", layers=1)
    bank, rows = bank_of(model), torch.stack(EXAMPLES[:3])
    (x, found), (_, plain) = ffns_of(model, rows)[0], ffns_of(base, rows)[0]
    late = 0.0
    for b, row in enumerate(rows):
        nodes = routes_of(bank, row)
        assert (nodes[bank.route_tokens - 1 :] == nodes[-1]).all()
        for t in range(LENGTH):
            added = by_hand(bank, nodes[t], 0, x[b, t])
            assert float((found[b, t] - plain[b, t] - added).abs().max()) < REORDERED
            if nodes[t, 0] < 0:
                assert torch.equal(found[b, t], plain[b, t])
            shifted = by_hand(bank, nodes[max(t - 1, 0)], 0, x[b, t])
            late = max(late, float((shifted - added).abs().max()))
    assert late > WRONG


def test_only_blocks_on_the_path_have_a_gradient():
    model = live()
    bank, text = bank_of(model), EXAMPLES[0]
    model(text[None], labels=text[None]).loss.backward()
    read = bank.addresses(Tokens.of(text))
    assert set(read) == {"level_1", "level_2"}
    for name, table in bank.each_table():
        moved = table.delta.grad.to_dense().flatten(1).abs().sum(1) > 0
        assert table.delta_index[moved].tolist() == read[name].tolist()
        assert len(read[name]) < table.rows


@torch.no_grad()
def test_a_step_of_many_rows_is_each_row_alone():
    """All at one path, each at its own, some at the same, some at none: against the rows alone.
    Witness: what the row before it reads.
    """
    model = live(layers=1)
    bank = bank_of(model)
    (read,) = [s.memory for s in ledger_of(model).seams.values() if s.layer_idx == 0]
    texts = [*EXAMPLES, *GENERIC_TEXTS[:2]]
    paths = [tuple(routes_of(bank, text)[-1].tolist()) for text in texts]
    known = list(dict.fromkeys(path for path in paths if path[0] >= 0))
    assert len(known) > 1
    by_path = {
        path: [t for t, own in zip(texts, paths, strict=True) if own == path] for path in paths
    }
    same = by_path[known[0]][:1] * 3
    apart_ones = [by_path[path][0] for path in known]
    nothing = [t for t, path in zip(texts, paths, strict=True) if path[0] < 0]
    for rows in (
        same,
        apart_ones,
        [*apart_ones, *same],
        [*same, *nothing],
        [*nothing, *apart_ones],
    ):
        ids, hidden = torch.stack(rows), torch.randn(len(rows), 1, 32)
        found = bank(Tokens(ids=ids, new=1))
        added, where, _ = read(hidden, found, None)
        late = 0.0
        for b, row in enumerate(rows):
            alone = by_hand(bank, routes_of(bank, row)[-1], 0, hidden[b, 0])
            reads = where is None or bool(where[b, 0])
            assert reads == bool(routes_of(bank, row)[-1][0] >= 0)
            assert not reads or float((added[b, 0] - alone).abs().max()) < REORDERED
            late = max(late, float((added[b - 1, 0] - alone).abs().max()))
        assert late > WRONG


def test_a_pinned_route_is_read_whatever_the_text():
    """At every token; another route says other things, and -1 is the base model, bit for bit."""
    model, base, rows = live(), build("llama"), tokens(2, LENGTH, seed=9)
    expected = one_pass(base, rows)
    with route_pinned(model, torch.tensor([-1, -1])):
        assert torch.equal(one_pass(model, rows), expected)
    with route_pinned(model, torch.tensor([1, 2])):
        found = one_pass(model, rows)
        assert apart(in_pieces(model, rows, [3, 11])[0], found) < REORDERED
        (x, out), (_, plain) = ffns_of(model, rows)[0], ffns_of(base, rows)[0]
    path = nodes_of(torch.tensor([1, 2]), SMALL.branching)
    assert path.tolist() == [1, 5]
    hand = by_hand(bank_of(model), path, 0, x[0, 0])
    assert float((out[0, 0] - plain[0, 0] - hand).abs().max()) < REORDERED
    for other in ([0, 2], [1, -1], [[1, 2], [1, 1]]):
        with route_pinned(model, torch.tensor(other)):
            assert apart(one_pass(model, rows), found) > WRONG


@pytest.mark.parametrize("route", [[0, 3], [-2, 0], [1]])
def test_a_route_that_is_none_is_refused(route):
    model = live()
    with route_pinned(model, torch.tensor(route)), pytest.raises(StateError, match="branching"):
        model(EXAMPLES[0][None])


def test_text_that_belongs_to_nothing_is_the_base_model():
    """Bit for bit; with a generic block it reads that one."""
    generic = torch.stack(GENERIC_TEXTS)
    expected = one_pass(build("llama"), generic)
    model = live()
    assert torch.equal(one_pass(model, generic), expected)
    assert apart(one_pass(model, torch.stack(EXAMPLES[:6])), expected) > WRONG
    fallback = live(replace(SMALL, generic_size=3))
    assert apart(one_pass(fallback, generic), expected) > WRONG
    assert set(bank_of(fallback).addresses(Tokens.of(GENERIC_TEXTS[0]))) == {GENERIC}


def test_banks_of_disjoint_subtrees_merge():
    """Two people train a subtree each: the merged bank says under each route what theirs said."""
    routes = [torch.tensor([0, 1]), torch.tensor([1, 0])]
    rows, apart_ones, merged = tokens(2, LENGTH, seed=9), [], live(every=False)
    for _, table in bank_of(merged).each_table():
        table.drop()
    for seed, route in enumerate(routes):
        model = live(every=False)
        for name, table in bank_of(model).each_table():
            table.drop()
            level = int(name[-1]) - 1
            table.open(nodes_of(route, SMALL.branching)[level : level + 1])
        move(model, seed=seed)
        with route_pinned(model, route):
            apart_ones.append(one_pass(model, rows))
        for name, table in bank_of(model).each_table():
            bank_of(merged).table(name).merge(table.delta_index, table.delta)
    for route, expected in zip(routes, apart_ones, strict=True):
        with route_pinned(merged, route):
            assert torch.equal(one_pass(merged, rows), expected)
    assert apart(*apart_ones) > WRONG


def test_rows_that_moved_are_read_anew():
    """What is kept between the tokens of a conversation is not kept across a step."""
    model, rows = live(), torch.stack(EXAMPLES[:2])
    before = one_pass(model, rows)
    assert torch.equal(one_pass(model, rows), before)
    move(model, seed=5)
    moved = one_pass(model, rows)
    assert apart(moved, before) > WRONG
    for _, table in bank_of(model).each_table():
        table.drop()
    assert torch.equal(one_pass(model, rows), one_pass(build("llama"), rows))


def test_a_wrong_route_is_another_leaf():
    """For each row one that its own text does not take, also where the text takes none."""
    bank = bank_of(live())
    ids = torch.stack([*EXAMPLES, *GENERIC_TEXTS])
    wrong = nodes_of(bank.wrong_routes(Tokens(ids=ids, new=LENGTH)), SMALL.branching)
    own = torch.stack([routes_of(bank, row)[-1] for row in ids])
    assert (wrong[:, -1] != own[:, -1]).all()
    assert torch.isin(wrong[:, -1], bank.router.levels[-1].numbers).all()


def test_sizes_of_the_published_tree_on_a_small_model():
    """SmolLM2-135M: 30 layers of width 576. 256 + 64 + 16 rows fetched, of 86,016 in the bank."""
    embedding = torch.empty(49152, 576, device="meta")
    config = HIERARCHICAL_160M
    bank = HierarchicalBank(
        embedding=lambda: embedding,
        layers=30,
        branching=config.branching,
        block_sizes=config.block_sizes,
        generic_size=0,
        route_tokens=24,
        seed=0,
        hot_bytes=0,
    )
    assert bank.fetched == 51_840 * 336 == 17_418_240
    assert bank.size == 51_840 * 86_016 == 4_459_069_440
    assert all(sum(table.nbytes.values()) == 0 for _, table in bank.each_table())
    assert not list(bank.parameters())


def test_preparing_again_would_move_rows_to_other_texts():
    bank = bank_of(live())
    embedding = torch.randn(VOCABULARY, 32)
    preparation = Preparation(examples=EXAMPLES, generic=GENERIC_TEXTS, embedding=embedding)
    with pytest.raises(StateError, match="before rows are opened"):
        bank.prepare(preparation)


@pytest.mark.parametrize(
    "wrong",
    [
        {"branching": (2, 2), "block_sizes": (4,)},
        {"branching": (), "block_sizes": ()},
        {"branching": (2,), "block_sizes": (0,)},
    ],
)
def test_impossible_trees_are_refused(wrong):
    with pytest.raises(ConfigError, match="level"):
        HierarchicalFFNConfig(**wrong)
