"""Sparse memory finetuning: counts and scores by hand, and that nothing else moves."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from contract.bank_arms import bank_of
from contract.families import build, tokens
from contract.runs import one_pass

from memretrofit.errors import ConfigError, StateError, UnsupportedModelError
from memretrofit.methods.memory_plus import MemoryPlusConfig
from memretrofit.methods.token_lookup import TokenLookupConfig
from memretrofit.modules.product_key import SHARED
from memretrofit.patching.controls import memory_disabled
from memretrofit.patching.ledger import ledger_of
from memretrofit.patching.row_counts import row_counts
from memretrofit.retrofit import patch
from memretrofit.training.sparse_rows import (
    choose_rows,
    count_background,
    only_these_rows,
    open_rows,
    table_deltas,
    tf_idf,
    top_rows,
)

SLOTS = 400
CONFIG = MemoryPlusConfig(
    num_slots=SLOTS,
    num_heads=2,
    key_dim=6,
    value_dim=8,
    top_k=3,
    starts_at_zero="rows",
    layers_to_transform=(0, 1),
)


def batch(*seeds: int, length: int = 6) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.cat([tokens(1, length, seed=seed) for seed in seeds])}


GENERIC = [batch(seed, seed + 1) for seed in (20, 30, 40)]
FIRST, SECOND = batch(1, 2), batch(5, 6)


def model_with(config=CONFIG, *, counted: bool = True):
    model = patch(build("llama", layers=2), config)
    if counted:
        count_background(model, GENERIC)
    return model


def write(
    model, rows, ids, *, steps: int = 1, guarded: bool = True, lr: float = 1.0
) -> list[float]:
    open_rows(model, rows)
    optimizer, losses = torch.optim.SGD(table_deltas(model), lr=lr), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**ids, labels=ids["input_ids"]).loss
        with only_these_rows(model, rows) if guarded else nullcontext():
            loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def values(model) -> torch.Tensor:
    return bank_of(model).table(SHARED)(torch.arange(SLOTS)).detach().clone()


def moved(before: torch.Tensor, after: torch.Tensor) -> set[int]:
    return set((before != after).any(-1).nonzero().flatten().tolist())


def test_tf_idf_by_hand():
    """Eight reads; the first slot is in all three batches of the background, the last in none."""
    found = tf_idf(torch.tensor([4, 2, 1, 0, 1]), torch.tensor([3, 1, 0, 0, 0]), 3)
    expected = [0.0, 2 / 8 * math.log(4 / 2), 1 / 8 * math.log(4), 0.0, 1 / 8 * math.log(4)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert not tf_idf(torch.zeros(3).long(), torch.zeros(3).long(), 3).any()


def test_the_best_rows_are_those_above_zero_and_ties_go_to_the_lower():
    scores = torch.tensor([0.0, 0.2, 0.5, 0.2, -1.0, 0.2])
    assert top_rows(scores, 1).tolist() == [2]
    assert top_rows(scores, 3).tolist() == [1, 2, 3]
    assert top_rows(scores, 99).tolist() == [1, 2, 3, 5]


def test_a_slot_counts_for_each_head_layer_and_token_but_not_for_padding():
    model = model_with(counted=False)
    chosen = []
    for seam in ledger_of(model).seams.values():
        if seam.layer_idx is not None:
            keys = seam.memory.keys
            keys.register_forward_hook(lambda keys, args, choice: chosen.append(choice.slots))
    ids = tokens(1, 6, seed=1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(9) >= 3)[None].long()
    found = row_counts(model, {"input_ids": padded, "attention_mask": mask})[SHARED]
    real = torch.stack([slots[0, 3:] for slots in chosen])  # [layers, T, heads, k]
    assert found.sum() == real.numel() == 2 * 6 * 2 * 3
    assert torch.equal(found, torch.bincount(real.flatten(), minlength=SLOTS))


def test_rows_that_are_named_by_the_text_are_counted_as_they_are_asked_for():
    model = patch(build("llama", layers=2), TokenLookupConfig())
    (found,) = row_counts(model, {"input_ids": torch.tensor([[7, 3, 7]])}).values()
    assert found.nonzero().flatten().tolist() == [3, 7]


def test_the_background_counts_batches_and_is_saved_with_the_bank():
    model = model_with()
    reads = torch.stack([row_counts(model, one)[SHARED] for one in GENERIC])
    bank = bank_of(model)
    assert torch.equal(bank.background(SHARED), (reads > 0).sum(0))
    assert bank.background(SHARED).max() == 3  # a hub
    assert int(bank.background_batches) == 3
    other = model_with(counted=False)
    other.load_state_dict(model.state_dict())
    assert choose_rows(other, FIRST, top_t=9)[SHARED].tolist() == (
        choose_rows(model, FIRST, top_t=9)[SHARED].tolist()
    )
    assert count_background(model, GENERIC[:1]) == 1
    assert bank.background(SHARED).max() == 1  # in place of the earlier count


def test_chosen_rows_are_read_by_the_text_and_not_by_all_of_the_background():
    model = model_with()
    reads, background = row_counts(model, FIRST)[SHARED], bank_of(model).background(SHARED)
    hubs = (reads > 0) & (background == 3)
    assert hubs.any()
    found = choose_rows(model, FIRST, top_t=SLOTS)[SHARED]
    expected = ((reads > 0) & (background < 3)).nonzero().flatten()
    assert torch.equal(found, expected)
    few = choose_rows(model, FIRST, top_t=10)[SHARED]
    assert len(few) == 10
    scores = tf_idf(reads, background, 3)
    assert scores[few].min() >= scores[found].sort(descending=True).values[9]


def test_writing_moves_the_chosen_rows_and_not_one_bit_else():
    model = model_with()
    before, rest = values(model), {n: p.clone() for n, p in model.named_parameters()}
    rows = choose_rows(model, FIRST, top_t=30)
    losses = write(model, rows, FIRST, steps=20, lr=100.0)
    assert losses[-1] < 0.9 * losses[0]
    changed = moved(before, values(model))
    assert changed <= set(rows[SHARED].tolist())
    assert len(changed) > 20  # what the last token alone reads in the last layer has no loss
    assert all(torch.equal(p, rest[n]) for n, p in model.named_parameters() if n in rest)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_second_text_leaves_what_the_first_one_wrote(guarded):
    """Unguarded (the witness), rows of the first text that the second reads too would move."""
    model = model_with()
    first = choose_rows(model, FIRST, top_t=60)
    write(model, first, FIRST)
    before = values(model)
    second = choose_rows(model, SECOND, top_t=10)
    write(model, second, SECOND, guarded=guarded)
    allowed = set(second[SHARED].tolist())
    assert bank_of(model).table(SHARED).opened == len(allowed | set(first[SHARED].tolist()))
    assert (moved(before, values(model)) <= allowed) is guarded


def test_text_that_reads_no_written_row_stays_as_it_was_bit_for_bit():
    """The rows are one text's own: what shares none of them is the base model's."""
    model = model_with()
    rows = choose_rows(model, FIRST, top_t=3)
    write(model, rows, FIRST, lr=5.0)
    base, untouched = build("llama", layers=2), 0
    for seed in range(50, 80):
        ids = batch(seed, length=2)
        if not row_counts(model, ids)[SHARED][rows[SHARED]].any():
            untouched += 1
            assert torch.equal(one_pass(model, ids["input_ids"]), one_pass(base, ids["input_ids"]))
    assert 0 < untouched < 30
    assert not torch.equal(one_pass(model, FIRST["input_ids"]), one_pass(base, FIRST["input_ids"]))


def test_the_guard_serves_dense_gradients_and_ends_with_its_block():
    model = model_with()
    rows = {SHARED: torch.tensor([4, 9])}
    open_rows(model, {SHARED: torch.tensor([2, 4, 9])})
    (delta,) = table_deltas(model)
    with only_these_rows(model, rows):
        (delta * 2).sum().backward()
    assert delta.grad.sum(-1).tolist() == [0, 16, 16]
    (delta * 2).sum().backward()
    assert delta.grad.sum(-1).tolist() == [16, 32, 32]


def test_what_cannot_be_written_is_refused():
    model = model_with(counted=False)
    with pytest.raises(StateError, match="count_background"):
        choose_rows(model, FIRST, top_t=5)
    with pytest.raises(StateError, match="at least one"):
        count_background(model, [])
    with memory_disabled(model), pytest.raises(StateError, match="No row was read"):
        count_background(model, GENERIC)
    count_background(model, [FIRST])
    with pytest.raises(StateError, match="all 1 batches"):
        choose_rows(model, FIRST, top_t=5)
    with pytest.raises(ConfigError, match="top_t=0"):
        choose_rows(model, FIRST, top_t=0)
    with pytest.raises(StateError, match="2 of 2 rows of slots are not open"):
        only_these_rows(model, {SHARED: torch.tensor([1, 2])}).__enter__()
    with pytest.raises(StateError, match="is not patched"):
        count_background(build("llama"), GENERIC)
    with pytest.raises(UnsupportedModelError, match="has no slots"):
        count_background(patch(build("llama", layers=2), TokenLookupConfig()), GENERIC)
