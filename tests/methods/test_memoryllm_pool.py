"""MemoryLLM against its docstring, one segment and one layer at a time, and against the whole text
that a pool stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.arms import activate
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass
from methods.pool_by_hand import ByHand
from tolerances import REORDERED, WRONG
from transformers import DynamicCache

from memretrofit.errors import ConfigError
from memretrofit.methods.memoryllm_pool import MEMORYLLM_7B, MEMORYLLM_8B, MemoryLLMPoolConfig
from memretrofit.patching.controls import memory_silenced, state_shuffled, writes_disabled
from memretrofit.retrofit import patch

LENGTH = 8
CONFIG = MemoryLLMPoolConfig(segment_length=LENGTH, num_memory_tokens=3, num_blocks=3)
PREFIX = 12
"""Tokens in the pool that stands for a text."""


def patched(config=CONFIG, **build_options):
    return activate(patch(build("llama", **build_options), config))


@pytest.mark.parametrize("stored", ["input", "output"])
def test_logits_are_the_equations(stored):
    """Seven segments, so that what was dropped and what was kept both show. Witnesses: other
    random draws, and the states of the other side of the layer."""
    config = replace(CONFIG, stored=stored)
    model, ids = patched(config), tokens(1, 7 * LENGTH + 5)
    found = one_pass(model, ids)[0]
    assert apart(found, ByHand(build("llama"), model, config).logits(ids[0])) < REORDERED
    other = "output" if stored == "input" else "input"
    for wrong in ({"seed": 1}, {"stored": other}):
        assert apart(found, ByHand(build("llama"), model, config, **wrong).logits(ids[0])) > WRONG


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_a_pool_of_layer_inputs_is_the_text_before(family):
    """N rows that hold what the layers read of N tokens behind a sink give the logits of the whole
    text. Witnesses: the rows one place on, and what the layers gave out."""
    model, base = patch(build(family), replace(CONFIG, num_memory_tokens=4)), build(family)
    sink = torch.full((2, 1), base.config.bos_token_id)
    prefix, text = tokens(2, PREFIX, seed=1), tokens(2, LENGTH, seed=2)
    whole = one_pass(base, torch.cat([sink, prefix, text], dim=1))[:, -LENGTH:]
    states = base(torch.cat([sink, prefix], dim=1), output_hidden_states=True).hidden_states

    def read(rows):
        cache = DynamicCache()
        in_pieces(model, tokens(2, LENGTH), [], cache=cache)
        held = cache.layers[0].state
        for layer, pool in enumerate(rows):
            assert held[f"{layer}.pool"].shape == pool.shape
            held[f"{layer}.pool"] = pool
        return in_pieces(model, text, [], cache=cache)[0]

    inputs = [x[:, 1:] for x in states[:-1]]
    assert apart(read(inputs), whole) < REORDERED
    assert apart(read([x.roll(1, dims=1) for x in inputs]), whole) > WRONG
    assert apart(read([x[:, 1:] for x in states[1:]]), whole) > WRONG


def test_before_its_first_write_a_pool_is_the_base_model():
    """Bit for bit, whatever the parameters; with writes off it stays so in each segment.
    Witness: with writes, the second segment is another."""
    model, base, ids = patched(), build("llama"), tokens(2, 3 * LENGTH)
    alone = [one_pass(base, x) for x in ids.split(LENGTH, dim=1)]
    found = one_pass(model, ids).split(LENGTH, dim=1)
    assert torch.equal(found[0], alone[0])
    assert apart(found[1], alone[1]) > WRONG
    with writes_disabled(model):
        for x, y in zip(one_pass(model, ids).split(LENGTH, dim=1), alone, strict=True):
            assert torch.equal(x, y)
    with memory_silenced(model):
        for x, y in zip(one_pass(model, ids).split(LENGTH, dim=1), alone, strict=True):
            assert torch.equal(x, y)


def test_splits_rows_and_padding_change_nothing():
    """Witness: the rows differ from one another."""
    model, ids = patched(), tokens(2, 6 * LENGTH)
    whole = one_pass(model, ids)
    assert apart(in_pieces(model, ids, [1, 7, 8, 21, 40])[0], whole) < REORDERED
    short = ids[1, : 4 * LENGTH + 3]  # drops other rows than its neighbour at each of its writes
    batch, mask = left_padded([ids[0], short])
    found = in_pieces(model, batch, [5, 30], mask=mask)[0]
    assert apart(found[0], whole[0]) < REORDERED
    assert apart(found[1, -len(short) :], one_pass(model, short[None])[0]) < REORDERED
    assert apart(whole[0], whole[1]) > WRONG


def test_a_token_changes_nothing_before_it():
    """Nor does it leave anything after it unchanged, segments later."""
    model, ids = patched(), tokens(1, 4 * LENGTH)
    other = ids.clone()
    other[0, LENGTH + 6] += 1  # one of those that are written
    before, after = one_pass(model, ids)[0], one_pass(model, other)[0]
    assert apart(before[: LENGTH + 6], after[: LENGTH + 6]) == 0
    assert apart(before[2 * LENGTH : 3 * LENGTH], after[2 * LENGTH : 3 * LENGTH]) > WRONG


def test_a_shuffled_pool_is_the_next_row_s():
    """Each row reads, in its second segment, what the other row would have read."""
    model, ids = patched(), tokens(2, 2 * LENGTH)
    swapped = torch.cat([ids[:, :LENGTH].flip(0), ids[:, LENGTH:]], dim=1)
    expected = one_pass(model, swapped)[:, LENGTH:]
    assert apart(one_pass(model, ids)[:, LENGTH:], expected) > WRONG
    with state_shuffled(model):
        assert apart(one_pass(model, ids)[:, LENGTH:], expected) < REORDERED


def test_both_vectors_take_gradients_through_a_write():
    """Of the loss on a segment that reads what two others wrote."""
    model = patched()
    model(tokens(1, 3 * LENGTH)).logits[:, 2 * LENGTH :].square().mean().backward()
    for part in (layer.memory for layer in model.model.layers):
        for vector in (part.move_sink.vector, part.mark_written.vector):
            assert vector.grad is not None
            assert vector.grad.abs().max() > 0


def test_presets_have_the_published_sizes():
    """7,680 rows of a 7B and 12,800 of an 8B."""
    sizes = [x.num_memory_tokens * x.num_blocks for x in (MEMORYLLM_7B, MEMORYLLM_8B)]
    assert sizes == [7_680, 12_800]


def test_a_segment_too_short_to_write_is_refused():
    """By the config, before any model."""
    with pytest.raises(ConfigError, match="num_memory_tokens=9: more than the 8 tokens"):
        replace(CONFIG, num_memory_tokens=9)
