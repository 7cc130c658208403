"""A bank is saved as what it learned, and loaded as it was: dense parameters, constants, rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).parents[1]))  # tests/contract, as the contract tests see it

from contract.bank_arms import EXAMPLES, bank_of, banked, every_arm
from contract.families import build
from contract.runs import one_pass

from memretrofit import WindowSinksConfig, patch
from memretrofit.errors import CheckpointError, StateError
from memretrofit.hub import attach_bank, from_pretrained, merge_delta, save_pretrained, write_bank
from memretrofit.hub.record import DELTA, MEMORY
from memretrofit.modules.fresh_rows import FreshRows
from memretrofit.modules.row_sources import HeldRows

ROWS = torch.stack(EXAMPLES[:2])


@every_arm
def test_a_saved_bank_gives_the_same_logits(arm, tmp_path):
    """In a fresh model, bit for bit; the rows lie in a file of their own."""
    model = banked("llama", arm)
    expected = one_pass(model, ROWS)
    save_pretrained(model, tmp_path / "bank")
    assert (tmp_path / "bank" / DELTA).is_file()
    assert not any("delta" in name for name in load_file(tmp_path / "bank" / MEMORY))
    found = from_pretrained(tmp_path / "bank", base=build("llama"))
    assert torch.equal(one_pass(found, ROWS), expected)


@every_arm
def test_rows_on_disk_are_the_rows_that_the_method_makes(arm, tmp_path):
    """`write_bank`, then the same bank by memory map, with the same delta over it."""
    model = banked("llama", arm)
    expected = one_pass(model, ROWS)
    tables = {name: table.source for name, table in bank_of(model).each_table()}
    write_bank(tables, tmp_path / "rows")
    save_pretrained(model, tmp_path / "bank")
    found = from_pretrained(tmp_path / "bank", base=build("llama"), bank=tmp_path / "rows")
    assert {table.tier for _, table in bank_of(found).each_table()} == {"disk"}
    assert torch.equal(one_pass(found, ROWS), expected)


@every_arm
def test_dropping_the_delta_undoes_it(arm, tmp_path):
    """Rows are those of the source again; merging the file back gives the bank that was saved."""
    model = banked("llama", arm)
    expected = one_pass(model, ROWS)
    save_pretrained(model, tmp_path / "bank")
    for _, table in bank_of(model).each_table():
        table.drop()
    assert not torch.equal(one_pass(model, ROWS), expected)
    merge_delta(model, tmp_path / "bank" / DELTA)
    assert torch.equal(one_pass(model, ROWS), expected)


def test_a_delta_of_another_bank_is_refused(tmp_path):
    """Other rows, a damaged file, a missing one: nothing is merged and the base is as it was."""
    model = banked("llama", "engram")
    save_pretrained(model, tmp_path / "bank")
    other = banked("llama", "token_lookup")
    before = one_pass(other, ROWS)
    with pytest.raises(CheckpointError, match="this bank has"):
        merge_delta(other, tmp_path / "bank" / DELTA)
    with pytest.raises(CheckpointError):
        attach_bank(other, tmp_path / "bank")
    assert torch.equal(one_pass(other, ROWS), before)
    path = tmp_path / "bank" / DELTA
    whole = path.read_bytes()
    for content in (whole[:-5], whole[:40], b""):
        path.write_bytes(content)
        base = build("llama")
        with pytest.raises(CheckpointError):
            from_pretrained(tmp_path / "bank", base=base)
        assert torch.equal(one_pass(base, ROWS), one_pass(build("llama"), ROWS))
    windowed = patch(build("llama"), WindowSinksConfig(sliding_window=8))
    with pytest.raises(StateError, match="about banks"):
        attach_bank(windowed, tmp_path)


def test_rows_of_ones_own_are_not_lost_silently(tmp_path):
    """A bank over rows that its method does not make needs them again, and says so."""
    model = banked("llama", "token_lookup", opened=False, live=False)
    (name, table), *_ = bank_of(model).each_table()
    rows = torch.randn(table.rows, *table.shape, generator=torch.Generator().manual_seed(0))
    table.attach(HeldRows(rows))
    expected = one_pass(model, ROWS)
    save_pretrained(model, tmp_path / "bank")
    write_bank({name: table.source}, tmp_path / "rows")
    base = build("llama")
    with pytest.raises(CheckpointError, match="Pass bank="):
        from_pretrained(tmp_path / "bank", base=base)
    assert torch.equal(one_pass(base, ROWS), one_pass(build("llama"), ROWS))
    found = from_pretrained(tmp_path / "bank", base=base, bank=tmp_path / "rows")
    assert torch.equal(one_pass(found, ROWS), expected)
    bank_of(found).table(name).open(torch.tensor([3]))
    with pytest.raises(StateError, match="drop"):
        bank_of(found).table(name).attach(HeldRows(rows + 1))


def test_a_delta_of_another_tree_is_refused(tmp_path):
    """Rows of the same numbers belong to other texts there; of one prepared bank they merge."""
    model = banked("llama", "hierarchical_ffn")
    save_pretrained(model, tmp_path / "bank")
    merge_delta(banked("llama", "hierarchical_ffn", opened=False), tmp_path / "bank" / DELTA)
    other = banked("llama", "hierarchical_ffn", opened=False)
    bank_of(other).router.threshold.mul_(2)
    with pytest.raises(CheckpointError, match="another tree"):
        merge_delta(other, tmp_path / "bank" / DELTA)
    assert not any(table.opened for _, table in bank_of(other).each_table())


def test_a_bank_that_does_not_fit_is_not_attached_in_part(tmp_path):
    """The first table fits, the second does not."""
    model = banked("llama", "hierarchical_ffn", opened=False)
    (first, table), (second, _) = bank_of(model).each_table()
    rows = {first: table.source, second: FreshRows(4, (2, 3, 7, 32))}
    write_bank(rows, tmp_path / "rows")
    with pytest.raises(StateError, match="cannot read from a source"):
        attach_bank(model, tmp_path / "rows")
    assert {table.tier for _, table in bank_of(model).each_table()} == {"fresh"}
