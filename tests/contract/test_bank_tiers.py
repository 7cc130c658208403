"""Where rows lie changes no bit: every tier, with and without hot rows, in one pass, token by token
and in the gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.bank_arms import ARMS, EXAMPLES, LENGTH, activate, bank_of, every_arm
from contract.families import build, tokens
from contract.runs import apart, in_pieces, one_pass
from tolerances import WRONG

from memretrofit.hub.bank_file import open_bank, write_bank
from memretrofit.modules.bank import Preparation, Tokens
from memretrofit.modules.row_sources import row_nbytes
from memretrofit.modules.table import FreshRows, HeldRows, RowSource
from memretrofit.retrofit import memory_parameters, patch

ROWS = torch.stack(EXAMPLES[:3])
TIERS = ("fresh", "ram", "device", "disk")


def source_of(rows: FreshRows, tier: str, folder) -> RowSource:
    if tier == "fresh":
        return rows
    if tier == "disk":
        path = folder / str(rows.seed)
        if not path.exists():
            write_bank({"rows": rows}, path)
        return open_bank(path)["rows"]
    return HeldRows.copy_of(rows, tier)


def model_with(arm: str, tier: str, folder, *, hot_rows: int = 0, seed: int = 5):
    """Rows of every table at random; a text's own are open where the text has rows of its own."""
    model = build("llama")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        patch(model, replace(ARMS[arm], hot_bytes=0))
        bank = bank_of(model)
        embedding = model.get_input_embeddings().weight.detach()
        generic = [*tokens(4, LENGTH, seed=10)]
        bank.prepare(Preparation(examples=EXAMPLES, generic=generic, embedding=embedding))
    for number, (name, table) in enumerate(bank.each_table()):
        rows = FreshRows(table.rows, table.shape, torch.float32, seed + number, 0.5)
        table.attach(source_of(rows, tier, folder))
        table.hot_bytes = hot_rows * row_nbytes(table.source)
        own = bank.addresses(Tokens.of(EXAMPLES[0])).get(name, torch.arange(0, table.rows, 2))
        table.open(own[: max(1, len(own) // 2)])
    return activate(model)


def bits(model) -> list[torch.Tensor]:
    found = [one_pass(model, ROWS), in_pieces(model, ROWS, range(1, LENGTH))[0]]
    model(ROWS).logits.square().mean().backward()
    return [*found, *(p.grad.to_dense() for p in memory_parameters(model).values())]


@every_arm
def test_every_tier_gives_the_same_bits(arm, tmp_path):
    expected = bits(model_with(arm, "ram", tmp_path))
    for tier in TIERS:
        for hot_rows in (0, 3):
            found = bits(model_with(arm, tier, tmp_path, hot_rows=hot_rows))
            for mine, other in zip(found, expected, strict=True):
                assert torch.equal(mine, other), (tier, hot_rows)
    others = bits(model_with(arm, "ram", tmp_path, seed=50))
    assert apart(others[0], expected[0]) > WRONG  # the rows of the source do speak


@pytest.mark.parametrize("hot_rows", [0, 3])
@every_arm
def test_rows_that_were_read_ahead_are_the_same(arm, hot_rows, tmp_path):
    """Known before the forward where the text names them; a wrong guess costs time alone."""
    expected = one_pass(model_with(arm, "disk", tmp_path), ROWS)
    for guess in (ROWS, tokens(3, LENGTH, seed=77)):
        model = model_with(arm, "disk", tmp_path, hot_rows=hot_rows)
        bank = bank_of(model)
        if not bank.addresses(Tokens(ids=ROWS, new=LENGTH)):
            pytest.skip("hidden states name the rows")
        bank.prefetch(Tokens(ids=guess, new=LENGTH))
        waiting = [table for _, table in bank.each_table() if table._coming is not None]
        assert waiting or guess is not ROWS
        assert torch.equal(one_pass(model, ROWS), expected)
        if guess is ROWS:
            assert all(table._coming is None for table in waiting)
