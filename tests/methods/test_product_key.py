"""Product-key memory against the equations at the head of its file, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from contract.bank_arms import activate, bank_of
from contract.families import build, tokens
from contract.runs import apart, one_pass
from methods.fed import ffns_of
from tolerances import ONE_LAYER, WRONG

from memretrofit.errors import ConfigError
from memretrofit.methods.product_key import ProductKeyConfig
from memretrofit.patching.ledger import ledger_of
from memretrofit.retrofit import memory_parameters, patch

SIZES = {"num_slots": 25, "num_heads": 2, "key_dim": 6, "value_dim": 5, "top_k": 3}
IDS = tokens(2, 12)


def model_with(layers: int = 1, *, live: bool = True, opened: bool = True, **fields):
    model = patch(build("llama", layers=layers), ProductKeyConfig(**SIZES | fields))
    if opened:
        bank_of(model).open_rows([])
    return activate(model) if live else model


def read_of(model, layer: int = 0):
    (read,) = [s.memory for s in ledger_of(model).seams.values() if s.layer_idx == layer]
    return read


def ffn_and_memory(model):
    """Input of the one FFN [N, E], its own output, and what the memory made of that."""
    ((x, out),) = ffns_of(model, IDS)
    with torch.no_grad():
        own = model.model.layers[0].mlp.forward(x)
    return x.flatten(0, 1), own.flatten(0, 1), out.flatten(0, 1)


@torch.no_grad()
def by_hand(model, x, *, count=3, normed=True, slack=0.0):
    """O y of one token x [E]; `count`, `normed` and `slack` (of a softmax sink) are witnesses."""
    read, values = read_of(model), bank_of(model).table("slots_0").delta
    keys, side, y = read.keys, 5, torch.zeros(5)
    for head in range(2):
        part = slice(6 * head, 6 * head + 6)
        q = keys.query.weight[part] @ x + keys.query.bias[part]
        if normed:
            q = (q - q.mean()) / (q.var(unbiased=False) + 1e-5).sqrt()
            q = q * keys.norm.weight + keys.norm.bias
        a, b = (half[head] @ q[3 * i : 3 * i + 3] for i, half in enumerate(keys.keys))
        scores = {side * i + j: float(a[i] + b[j]) for i in range(side) for j in range(side)}
        best = sorted(scores, key=lambda slot: -scores[slot])[:count]
        total = slack
        if keys.null is not None:
            null = float(keys.null[head])
            best, total = [s for s in best if scores[s] >= null], total + math.exp(null)
        total += sum(math.exp(scores[slot]) for slot in best)
        for slot in best:
            y += math.exp(scores[slot]) / total * values[slot]
    return read.out.weight @ y


def test_a_token_reads_the_slots_that_its_keys_choose():
    model = model_with()
    x, own, out = ffn_and_memory(model)
    expected = own + torch.stack([by_hand(model, token) for token in x])
    assert apart(out, expected) < ONE_LAYER
    for change in ({"count": 2}, {"normed": False}, {"slack": 1.0}):
        wrong = own + torch.stack([by_hand(model, token, **change) for token in x])
        assert apart(out, wrong) > WRONG, change


def test_a_null_slot_takes_its_share_and_shuts_out_what_scores_below_it():
    model = model_with(null_slot=True)
    with torch.no_grad():
        read_of(model).keys.null.copy_(torch.tensor([3.0, 2.5]))
    x, own, out = ffn_and_memory(model)
    expected = own + torch.stack([by_hand(model, token) for token in x])
    assert apart(out, expected) < ONE_LAYER
    silent = (expected == own).all(-1)
    assert 0 < silent.sum() < len(silent)  # some tokens read nothing, and keep their bits
    assert torch.equal(out[silent], own[silent])
    with torch.no_grad():
        read_of(model).keys.null.fill_(-100.0)
    everything = ffn_and_memory(model)[2]
    assert apart(everything, own + torch.stack([by_hand(model, t) for t in x])) < ONE_LAYER
    with torch.no_grad():
        read_of(model).keys.null.fill_(100.0)
    assert torch.equal(one_pass(model, IDS), one_pass(build("llama", layers=1), IDS))


def test_slots_that_nobody_wrote_leave_the_bits_of_their_tokens():
    """Rows at zero, the projection not: what reads no open slot is the base model's."""
    model = model_with(opened=False, starts_at_zero="rows")
    x, own, out = ffn_and_memory(model)
    assert torch.equal(out, own)
    slots = read_of(model).keys(x[None]).slots[0].flatten(1)
    mine = slots[0].unique()
    table = bank_of(model).table("slots_0")
    table.open(mine)
    with torch.no_grad():
        table.delta.normal_()
    found = ffn_and_memory(model)[2]
    reads = torch.isin(slots, mine).any(-1)
    assert reads.any()
    assert not reads.all()
    assert torch.equal(found[~reads], own[~reads])
    assert (found[reads] != own[reads]).any(-1).all()


def test_each_layer_has_values_of_its_own():
    model = model_with(layers=3, layers_to_transform=(0, 2))
    names = [name for name, _ in bank_of(model).each_table()]
    assert names == ["slots_0", "slots_2"]
    first, second = (bank_of(model).table(name) for name in names)
    assert not torch.equal(first.delta, second.delta)
    before = ffns_of(model, IDS)
    with torch.no_grad():
        second.delta.zero_()
    after = ffns_of(model, IDS)
    assert torch.equal(before[1][1], after[1][1])
    assert not torch.equal(before[2][1], after[2][1])


def test_it_stands_beside_the_middle_ffn_unless_told():
    model = model_with(layers=5)
    assert [s.layer_idx for s in ledger_of(model).seams.values()] == [None, 2]


def test_values_are_drawn_alike_wherever_the_model_is_patched():
    """Rows that nobody wrote need not be saved: the seed gives them again."""
    tables = [bank_of(model_with(opened=False, seed=seed)).table("slots_0") for seed in (1, 1, 2)]
    rows = [table(torch.arange(25)) for table in tables]
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])
    assert tables[0].source.identity == tables[1].source.identity


def test_values_take_no_memory_before_a_model_runs():
    """Whoever asks for sizes alone has no room for the pool; what is read is the same."""
    model = model_with(opened=False, live=False)
    table = bank_of(model).table("slots_0")
    rows = table(torch.arange(25))
    assert sum(table.nbytes.values()) == 0
    one_pass(model, IDS)
    assert table.nbytes["device"] == 25 * 5 * 4
    assert torch.equal(table(torch.arange(25)), rows)
    opened = model_with()
    one_pass(opened, IDS)
    assert bank_of(opened).table("slots_0").tier == "fresh"  # every row is in the delta


@pytest.mark.parametrize("optimizer", ["sparse_adam", "sgd"])
def test_a_step_moves_the_slots_that_were_read_and_no_other(optimizer):
    model = model_with()
    table = bank_of(model).table("slots_0")
    before = table.delta.detach().clone()
    kinds = {"sparse_adam": torch.optim.SparseAdam, "sgd": torch.optim.SGD}
    stepping = kinds[optimizer]([table.delta], lr=0.1)
    model(IDS[:, :4]).logits.square().mean().backward()
    stepping.step()
    x = ffns_of(model, IDS[:, :4])[0][0]
    read = torch.zeros(25, dtype=torch.bool)
    read[read_of(model).keys(x).slots.unique()] = True
    assert not read.all()
    moved = (table.delta != before).any(-1)
    assert torch.equal(moved, read)


def test_names_of_what_is_saved():
    assert {n.partition(".memory.")[2] for n in memory_parameters(model_with(null_slot=True))} == {
        "tables.slots_0.delta",
        "keys.query.weight",
        "keys.query.bias",
        "keys.norm.weight",
        "keys.norm.bias",
        "keys.keys",
        "keys.null",
        "out.weight",
    }


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_slots": 50}, "num_slots=50: must be a square, such as 49"),
        ({"key_dim": 7}, "key_dim=7: must be even"),
        ({"top_k": 6}, "top_k=6: at most 5"),
        ({"num_heads": 0}, "num_heads=0: must be at least 1"),
        ({"value_dim": 0}, "value_dim=0: must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        ProductKeyConfig(**SIZES | fields)
    assert ProductKeyConfig(**SIZES | {"top_k": 5}).top_k == 5
