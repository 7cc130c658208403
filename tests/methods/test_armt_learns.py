"""A tiny model learns to recall by key what earlier segments said, through the memory alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from memretrofit.methods.armt import ARMTConfig
from memretrofit.patching.controls import memory_silenced, state_shuffled
from memretrofit.retrofit import patch

KEYS = VALUES = 8
PAIR = 2
"""Tokens of a segment: a key and its value."""
STEPS, BATCH, RATE = 400, 128, 1e-2
CHANCE = 0.25
"""Twice what a guess gets: five standard deviations of 256 guesses above it."""


def texts(rows: int, pairs: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """[k v | k v | ... | k]: a pair in each segment, then the question; and the answers, 0 to 7."""
    keys = torch.rand(rows, KEYS, generator=draw).argsort(-1)[:, :pairs]
    values = torch.randint(VALUES, (rows, pairs), generator=draw)
    told = torch.stack([1 + keys, 1 + KEYS + values], dim=-1).flatten(1)
    asked = torch.randint(pairs, (rows, 1), generator=draw)
    ids = torch.cat([told, 1 + keys.gather(1, asked)], dim=1)
    return ids, values.gather(1, asked)[:, 0]


def answers(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    return model(ids, use_cache=False, logits_to_keep=1).logits[:, -1, 1 + KEYS :]


@pytest.fixture(scope="module")
def trained() -> LlamaForCausalLM:
    """A model of one layer, trained with its memory from scratch on one or two pairs."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1 + KEYS + VALUES,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.2,
        bos_token_id=0,
    )
    method = ARMTConfig(segment_length=PAIR, num_memory_tokens=2)
    model = patch(LlamaForCausalLM(config), method)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        ids, right = texts(BATCH, 1 + step % 2, draw)
        F.cross_entropy(answers(model, ids), right).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = RATE * min(1, 2 * (1 - step / STEPS))
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def recall(model: LlamaForCausalLM, pairs: int) -> float:
    """Share of right answers."""
    ids, right = texts(256, pairs, torch.Generator().manual_seed(1))
    return float((answers(model, ids).argmax(-1) == right).float().mean())


@pytest.mark.parametrize("pairs", [1, 2, 7])
def test_what_earlier_segments_said_is_recalled(trained, pairs):
    """Two segments, three, and eight, which is five more than it was trained on. Witnesses: a
    memory that says nothing, and another row's."""
    assert recall(trained, pairs) >= 0.9
    for switch in (memory_silenced, state_shuffled):
        with switch(trained):
            assert recall(trained, pairs) <= CHANCE
