"""Which rows are read: by hand for a table of tokens, a routed bank, and slots."""

from __future__ import annotations

import pytest
import torch
from contract.bank_arms import EXAMPLES, bank_of, banked
from contract.families import build, tokens

from memretrofit.evaluation.bank_reads import measure_reads, reads_table
from memretrofit.methods.token_lookup import TokenLookupConfig
from memretrofit.modules.bank import Tokens
from memretrofit.patching.controls import memory_silenced
from memretrofit.patching.row_counts import row_counts
from memretrofit.retrofit import patch


def test_figures_by_hand():
    """101 rows, of which 2 are the busiest hundredth; a text counts a token once."""
    model = patch(build("llama"), TokenLookupConfig())
    bank_of(model).table("rows").open(torch.tensor([3, 9]))
    texts = [torch.tensor(ids) for ids in ([3, 5, 3], [3, 7], [3, 5])]
    (found,) = measure_reads(model, texts).values()
    assert found["reads"] == 6
    assert found["used"] == pytest.approx(3 / 101)
    assert found["busiest"] == pytest.approx((3 + 2) / 6)
    assert found["trained"] == pytest.approx(3 / 6)


def test_a_routed_bank_counts_every_text_although_it_keeps_the_blocks():
    model = banked("llama", "hierarchical_ffn")
    bank = bank_of(model)
    text = next(text for text in EXAMPLES if bank.addresses(Tokens.of(text)))
    once, twice = measure_reads(model, [text]), measure_reads(model, [text, text])
    for name, entry in once.items():
        assert entry["reads"] == len(bank.addresses(Tokens.of(text)).get(name, ()))
        assert twice[name]["reads"] == 2 * entry["reads"]
        assert twice[name]["busiest"] == entry["busiest"]
    assert any(entry["trained"] == 1 for entry in once.values())


def test_slots_count_for_each_head_and_token():
    model = banked("llama", "product_key", opened=False)
    found = measure_reads(model, tokens(3, 7))
    counts = [row_counts(model, {"input_ids": row[None]}) for row in tokens(3, 7)]
    for name, entry in found.items():
        total = sum(count[name] for count in counts)
        assert entry["reads"] == total.sum() == 3 * 7 * 2 * 3
        assert entry["busiest"] == pytest.approx(float(total.max() / total.sum()))
        assert entry["trained"] == 0


def test_nothing_read_has_no_shares_and_the_table_says_so():
    model = banked("llama", "engram")
    with memory_silenced(model):
        (found,) = measure_reads(model, EXAMPLES[:2]).values()
    assert found == {"reads": 0, "used": 0, "busiest": None, "trained": None}
    (row,) = reads_table({"prose": {"rows": found}})["rows"]
    assert row == ["prose", "rows", 0, "0.00 %", "n/a", "n/a"]
