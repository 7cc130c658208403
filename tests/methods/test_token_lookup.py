"""Token lookup against its two definitions, and what its rows leave alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from contract.families import VOCABULARY, build, tokens
from contract.runs import apart, left_padded, one_pass
from tolerances import ONE_LAYER, REORDERED, WRONG
from torch.nn import functional as F

from memretrofit.methods.token_lookup import GEMMA3N, TokenLookupConfig
from memretrofit.modules.bank import Tokens
from memretrofit.modules.table import HeldRows
from memretrofit.modules.token_rows import GatedRow, ProjectedTokenBank, TokenBank, TokenParts
from memretrofit.patching.ledger import ledger_of
from memretrofit.retrofit import memory_parameters, patch

LENGTH, LAYERS, HIDDEN = 12, 2, 32
SMALL = replace(GEMMA3N, value_dim=5)


def patched(config: TokenLookupConfig):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return patch(build("llama", layers=LAYERS), config)


def bank_of(model) -> TokenBank:
    return ledger_of(model).bank


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(rows: torch.Tensor):
    """A model whose table holds `rows` [vocabulary, layers, hidden]."""
    model = patched(TokenLookupConfig())
    bank_of(model).table("rows").attach(HeldRows(rows))
    return model


def test_the_table_stands_in_for_ffns_of_the_embedding():
    """MemoryLLM's use: what a function of the token computes is kept as rows. Held rows give the
    logits of the function itself, run beside each FFN.
    """
    base = build("llama", layers=LAYERS)
    layers = base.model.layers
    with torch.no_grad():
        embedding = base.get_input_embeddings().weight
        rows = torch.stack([layer.mlp(layer.input_layernorm(embedding)) for layer in layers], 1)
    ids = tokens(2, LENGTH)

    def logits_with(function) -> torch.Tensor:
        handles = [
            layer.mlp.register_forward_hook(lambda *call, n=n: call[2] + function(n))
            for n, layer in enumerate(layers)
        ]
        found = one_pass(base, ids)
        for handle in handles:
            handle.remove()
        return found

    expected = logits_with(lambda n: rows[ids, n])
    assert apart(one_pass(written(rows), ids), expected) < REORDERED
    other_layer = logits_with(lambda n: rows[ids, 1 - n])
    assert apart(one_pass(written(rows), ids), other_layer) > WRONG


def test_only_tokens_with_a_row_change_anything():
    """Token 7 alone has one: before its first place the bits are the base model's."""
    rows = torch.zeros(VOCABULARY, LAYERS, HIDDEN)
    rows[7] = draw(LAYERS, HIDDEN)
    model, base = written(rows), build("llama", layers=LAYERS)
    ids = tokens(1, LENGTH)
    ids[ids == 7] = 8
    assert torch.equal(one_pass(model, ids), one_pass(base, ids))
    ids[0, 5] = 7
    changed = (one_pass(model, ids) != one_pass(base, ids)).any(-1)[0]
    assert changed.tolist() == [False] * 5 + [True] * (LENGTH - 5)


def test_padding_reads_no_row():
    """The ids under the padding have rows of their own, and are not asked for."""
    model = written(draw(VOCABULARY, LAYERS, HIDDEN))
    row = torch.tensor([5, 5, 9])
    ids, mask = left_padded([row, tokens(1, 6)[0]])  # the padding holds 7
    table = bank_of(model).table("rows")
    one_pass(model, ids[:1], attention_mask=mask[:1])
    found = bank_of(model).addresses(Tokens(ids=ids[:1].masked_fill(mask[:1] == 0, -1), new=6))
    assert found["rows"].tolist() == [5, 9]
    assert table.misses == 2  # one read for all layers, and for every place of a token
    padded = bank_of(model)(Tokens(ids=torch.tensor([[-1, 5, 9]]), new=3))
    assert padded.live.tolist() == [[False, True, True]]
    nothing = bank_of(model)(Tokens(ids=torch.full((1, 3), -1), new=3))
    assert not nothing.live.any()


def test_a_step_moves_the_rows_of_its_tokens_alone():
    """Rows that are open for another text stay as they were, bit for bit."""
    model = patched(TokenLookupConfig())
    bank = bank_of(model)
    assert bank.open_rows([torch.tensor([3, 4, 5]), torch.tensor([4, 6])]) == 4
    assert memory_parameters(model).keys() == {"model.memory.tables.rows.delta"}
    table = bank.table("rows")
    text = torch.tensor([[3, 50, 4, 3]])
    optimizer = torch.optim.SparseAdam([table.delta], lr=0.1)
    model(text).logits.square().mean().backward()
    optimizer.step()
    moved = (table.delta != 0).flatten(1).any(-1)
    assert table.delta_index[moved].tolist() == [3, 4]
    unseen = torch.tensor([[50, 51, 52]])
    assert torch.equal(one_pass(model, unseen), one_pass(build("llama"), unseen))


def gated_parts() -> tuple[ProjectedTokenBank, GatedRow, torch.Tensor]:
    """A bank of 9 tokens and two layers of width 5 with the read of the second, all away from
    their start, and the embedding."""
    torch.manual_seed(0)
    embedding = torch.randn(9, 6)
    sizes = {"vocab_size": 9, "layers": 2, "value_dim": 5, "hot_bytes": 0}
    bank = ProjectedTokenBank(embedding=lambda: embedding, **sizes)
    bank.table("rows").attach(HeldRows(torch.randn(9, 2, 5)))
    read = GatedRow(number=1, hidden_size=6, value_dim=5, activation=F.silu)
    with torch.no_grad():
        for parameter in (*bank.parameters(), *read.parameters()):
            parameter.add_(torch.randn(parameter.shape))
    return bank, read, embedding


@torch.no_grad()
def test_the_gated_form_is_its_definition():
    """Token by token, in float64."""
    bank, read, embedding = gated_parts()
    ids, hidden = torch.tensor([[4, 8, 4, 0]]), draw(1, 4, 6)
    found = read(hidden, bank(Tokens(ids=ids, new=4)), None)
    weights = {n: x.double() for n, x in (*bank.named_parameters(), *read.named_parameters())}
    rows = bank.table("rows")(torch.arange(9)).double()

    def norm(x):
        return x / (x.square().mean() + 1e-6).sqrt()

    def by_hand(layer: int, scale: float) -> torch.Tensor:
        out = []
        for token, h in zip(ids[0].tolist(), hidden[0].double(), strict=True):
            a = weights["project.weight"][layer * 5 : layer * 5 + 5] @ embedding[token].double()
            p = (norm(a) * weights["project_scale"] + rows[token, layer]) * scale
            gate = F.silu(weights["gate_map.weight"] @ h)
            out.append(norm(weights["out_map.weight"] @ (gate * p)) * weights["out_scale"])
        return torch.stack(out)

    assert found.where.all()
    assert apart(found.added[0].double(), by_hand(1, 1 / math.sqrt(2))) < ONE_LAYER
    assert apart(found.added[0].double(), by_hand(0, 1 / math.sqrt(2))) > WRONG


def test_the_gated_form_starts_silent_and_can_learn():
    """Only the last scale has a gradient at first; then everything has, open rows too."""
    model, base = patched(SMALL), build("llama", layers=LAYERS)
    ids = tokens(2, LENGTH)
    bank_of(model).open_rows([ids.flatten()])
    assert torch.equal(one_pass(model, ids), one_pass(base, ids))
    optimizer = torch.optim.SGD(memory_parameters(model).values(), lr=1.0)
    learning = []
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients = {n: p.grad.to_dense() for n, p in memory_parameters(model).items()}
        learning.append({n.rpartition(".memory.")[2] for n, g in gradients.items() if g.any()})
        optimizer.step()
    everything = {n.rpartition(".memory.")[2] for n in memory_parameters(model)}
    assert learning == [{"out_scale"}, everything]
    unseen = (ids + 1) % VOCABULARY
    assert apart(one_pass(model, unseen), one_pass(base, unseen)) > WRONG


@pytest.mark.parametrize("config", [TokenLookupConfig(), SMALL], ids=["additive", "gated"])
def test_a_row_has_a_part_for_each_layer(config):
    model = patched(config)
    width = HIDDEN if config.form == "additive" else 5
    table = bank_of(model).table("rows")
    assert (table.rows, table.shape) == (VOCABULARY, (LAYERS, width))
    found = bank_of(model)(Tokens(ids=torch.tensor([[3, 9, 3]]), new=3))
    assert isinstance(found, TokenParts)
    assert [part.shape for part in found.parts] == [(2, width)] * LAYERS
    assert found.which.tolist() == [[0, 1, 0]]
