"""Use of slots, where every key and query is one slot, or all of them alike."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from contract.arms import EXACT as KEPT
from contract.arms import METHODS_WITH_MEMORY, patched
from contract.families import tokens
from probe_models import HEADS, OFFSET, UNIFORM, VOCABULARY, WIDTH, built, largest_tensor, looks_for

from memretrofit import AHNConfig, LoLCATsConfig, WindowSinksConfig, memory_disabled, patch
from memretrofit.errors import ConfigError, StateError, UnsupportedModelError
from memretrofit.evaluation.probes import SlotShares, slot_access
from memretrofit.modules.memory import AttentionMemory
from memretrofit.patching.controls import writes_disabled
from memretrofit.patching.ledger import ledger_of
from memretrofit.patching.surgery import patch_attention

WINDOW, SINKS = 6, 2
SIZES = {"sliding_window": WINDOW, "num_sink_tokens": SINKS}
ROWS = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(5))
SUCCESSOR = looks_for({x: (x + 1) % VOCABULARY for x in range(VOCABULARY)})
EXACT = 1e-6
"""Rounding; an access more or less changes a share by 1 / 64."""


@torch.no_grad()
def one_slot_a_token(**fields):
    """Keys are the token's slot, queries its successor's; every write has strength 1/2."""
    config = AHNConfig(**SIZES, rule="delta", **fields)
    model = patch(built([SUCCESSOR, UNIFORM, UNIFORM, UNIFORM]), config)
    model.model.layers[0].self_attn.memory.write_features.weight.zero_()
    return model


def shares(tokens: list[int]) -> torch.Tensor:
    """[D] share of each slot when every one of `tokens` goes to its own."""
    counted = Counter(tokens)
    found = torch.zeros(WIDTH)
    for token, count in counted.items():
        found[OFFSET + token] = count / len(tokens)
    return found


@pytest.mark.parametrize(("state_heads", "states"), [("query", 4), ("key_value", 2)])
def test_writes_are_what_left_and_reads_what_came_after(state_heads, states) -> None:
    found = slot_access(one_slot_a_token(state_heads=state_heads), ROWS)
    assert found.layers == (0,)
    rows = ROWS.tolist()
    left = [token for row in rows for token in row[SINKS : len(row) - WINDOW]]
    asked = [(token + 1) % VOCABULARY for row in rows for token in row[SINKS + WINDOW :]]
    written = found.writes[0].shares
    assert written.shape == (states, WIDTH)
    for head in range(states):
        torch.testing.assert_close(written[head], shares(left), atol=EXACT, rtol=0)
    read = found.reads[0].shares
    assert read.shape == (HEADS, WIDTH)
    torch.testing.assert_close(read[0], shares(asked), atol=EXACT, rtol=0)
    for wrong in (left[1:], [*left, rows[1][-WINDOW]], asked):
        assert (written[0] - shares(wrong)).abs().max() > 100 * EXACT


def test_stronger_writes_count_for_more() -> None:
    """Token 3 opens its gate (strength near 1), all others keep 1/2."""
    model = one_slot_a_token()
    gate = model.model.layers[0].self_attn.memory.write_features.weight
    gate.data[:, 3] = 100.0
    row = torch.tensor([[0, 0, 3, 4, *[5] * WINDOW]])
    found = slot_access(model, row).writes[0].shares
    assert found[0, OFFSET + 3].item() == pytest.approx(2 / 3, abs=EXACT)
    assert found[0, OFFSET + 4].item() == pytest.approx(1 / 3, abs=EXACT)


def test_a_feature_map_has_two_slots_for_each_dimension() -> None:
    """Sharp maps: the first softmax is the token's slot, the second 1/63 in each of the others."""
    model = patch(built([SUCCESSOR, UNIFORM, UNIFORM, UNIFORM]), LoLCATsConfig(**SIZES))
    memory = model.model.layers[0].self_attn.memory
    memory.key_map.map.data *= 1000
    found = slot_access(model, torch.full((1, 30), 7)).writes[0]
    assert found.shares.shape == (HEADS, 2 * WIDTH)
    expected = torch.full((2 * WIDTH,), 1 / 64 / 63)
    expected[:WIDTH], expected[WIDTH + OFFSET + 7] = 0, 0
    expected[OFFSET + 7] = 63 / 64
    torch.testing.assert_close(found.shares[0], expected, atol=EXACT, rtol=0)
    assert found.busiest(0.01)[0].item() == pytest.approx(63 / 64 + 1 / 64 / 63, abs=EXACT)


def test_flat_keys_write_all_slots_and_queries_of_no_direction_read_none() -> None:
    model = one_slot_a_token()
    flat = model.model.layers[0].self_attn.k_proj.weight
    flat.data.zero_()
    flat.data[:, :VOCABULARY] = 1.0
    found = slot_access(model, ROWS)
    # the first pair of dimensions turns with the position, by energy-preserving rotations
    assert found.writes[0].effective().tolist() == pytest.approx([WIDTH] * HEADS, rel=0.01)
    assert found.reads[0].shares[1].abs().max() == 0


def test_summaries_by_hand() -> None:
    found = SlotShares(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1, 0, 0, 0], [0.5, 0.5, 0, 0]]))
    assert found.busiest().tolist() == [0.25, 1, 0.5]
    assert found.busiest(0.5).tolist() == [0.5, 1, 1]
    assert found.busiest(0.51).tolist() == [0.75, 1, 1]
    assert found.effective().tolist() == pytest.approx([4, 1, 2])
    uneven = SlotShares(torch.tensor([[0.9, 0.1]])).effective().item()
    assert uneven == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)))
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match=f"fraction={wrong}"):
            found.busiest(wrong)


def test_long_rows_come_in_several_blocks() -> None:
    """Blocks hold at least 128 queries: the counts run on over them."""
    row = torch.randint(0, VOCABULARY, (1, 600), generator=torch.Generator().manual_seed(6))
    model = one_slot_a_token()
    with largest_tensor() as seen:
        found = slot_access(model, row)
    left = row[0].tolist()[SINKS:-WINDOW]
    torch.testing.assert_close(found.writes[0].shares[0], shares(left), atol=EXACT, rtol=0)
    asked = [(x + 1) % VOCABULARY for x in row[0].tolist()[SINKS + WINDOW :]]
    torch.testing.assert_close(found.reads[0].shares[0], shares(asked), atol=EXACT, rtol=0)
    assert 0 < seen.numbers < 600 * 600


def test_what_has_no_slots_is_refused() -> None:
    with pytest.raises(StateError, match="not patched"):
        slot_access(built([UNIFORM] * 4), ROWS)
    window = patch(built([UNIFORM] * 4), WindowSinksConfig(**SIZES))
    with pytest.raises(ConfigError, match="keeps no state"):
        slot_access(window, ROWS)
    model = one_slot_a_token()
    with pytest.raises(ConfigError, match="pass at least 9 tokens"):
        slot_access(model, ROWS[:, :8])
    slot_access(model, ROWS[:, :9])
    with pytest.raises(ConfigError, match=r"token ids \[R, T\]"):
        slot_access(model, ROWS[0])


@pytest.mark.parametrize("off", [memory_disabled, writes_disabled])
def test_a_memory_that_is_off_is_told(off) -> None:
    model = one_slot_a_token()
    with off(model), pytest.raises(StateError, match="nothing was written"):
        slot_access(model, ROWS)


def says_how(arm: str) -> bool:
    """Whether the memory tells how its slots are used."""
    seams = ledger_of(patched("llama", arm, layers=1)).seams.values()
    return any(type(seam.memory).accesses is not AttentionMemory.accesses for seam in seams)


@pytest.mark.parametrize("arm", [arm for arm in sorted(METHODS_WITH_MEMORY) if says_how(arm)])
def test_every_method_with_a_state_says_how_it_is_used(arm) -> None:
    """Of every head something is written and read; a method of the folder needs no entry here."""
    found = slot_access(patched("llama", arm), tokens(2, KEPT + 20))
    assert found.writes
    for access in (*found.writes, *found.reads):
        assert (access.shares >= 0).all()
        torch.testing.assert_close(
            access.shares.sum(-1), torch.ones(len(access.shares)), atol=EXACT, rtol=0
        )


class Tally(AttentionMemory):
    """Has a state, and no slots."""

    def state_nbytes(self, tokens: int = 0) -> int:
        return 4


def test_a_memory_that_is_not_known_is_refused() -> None:
    model = built([UNIFORM] * 4)
    patch_attention(model, WindowSinksConfig(**SIZES), lambda site: Tally(**SIZES))
    with pytest.raises(UnsupportedModelError, match="Tally does not say how its slots"):
        slot_access(model, ROWS)
    assert not model.model.layers[0].self_attn.memory._forward_pre_hooks
