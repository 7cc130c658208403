"""How evenly rows are read: figures by hand, and a bank of which every read is known."""

from __future__ import annotations

import math

import pytest
import torch
from contract.families import build, tokens

from memretrofit.errors import ConfigError, StateError
from memretrofit.evaluation.probes import SlotShares, bank_access
from memretrofit.methods.product_key import ProductKeyConfig
from memretrofit.patching.controls import memory_silenced
from memretrofit.patching.row_counts import row_counts
from memretrofit.retrofit import patch

CONFIG = ProductKeyConfig(num_slots=25, num_heads=2, key_dim=6, top_k=3)
ROWS = tokens(3, 7)


def test_figures_by_hand():
    found = SlotShares(torch.tensor([[0.0, 0.75, 0, 0.25], [0.25] * 4, [0, 0, 1, 0], [0] * 4]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = {
        "gini": [(3 * 0.75 + 1 * 0.25) / 4, 0, 3 / 4, math.nan],
        "kl_to_uniform": [math.log(4) - entropy, 0, math.log(4), math.nan],
        "used": [0.5, 1, 0.25, 0],
    }
    for name, values in expected.items():
        figures = getattr(found, name)()
        torch.testing.assert_close(figures, torch.tensor(values), equal_nan=True, msg=name)


def test_reads_of_all_texts_heads_and_layers_are_counted_together():
    model = patch(build("llama", layers=2), CONFIG)
    (found,) = bank_access(model, ROWS).values()
    (counts,) = row_counts(model, {"input_ids": ROWS}).values()
    assert counts.sum() == ROWS.numel() * 2 * 3
    torch.testing.assert_close(found.shares[0], counts / counts.sum())
    assert found.shares.shape == (1, 25)


def test_what_cannot_be_measured_is_refused():
    model = patch(build("llama", layers=2), CONFIG)
    with memory_silenced(model), pytest.raises(StateError, match="No row was read"):
        bank_access(model, ROWS)
    with pytest.raises(ConfigError, match=r"\[R, T\]"):
        bank_access(model, ROWS[0])
    with pytest.raises(StateError, match="is not patched"):
        bank_access(build("llama"), ROWS)
