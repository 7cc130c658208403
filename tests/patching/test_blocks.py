"""Long prompts are read in blocks; blocks in which nothing can be read skip the memory."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memretrofit import AHNConfig, LoLCATsConfig, patch
from memretrofit.errors import StateError
from memretrofit.patching.controls import intercepted, window_override
from memretrofit.patching.windowed import MIN_BLOCK
from memretrofit.retrofit import memory_parameters

WINDOW, SINKS, TOKENS = 150, 4, 300
TOLERANCE = 2e-5


@pytest.fixture(
    params=[
        AHNConfig(sliding_window=WINDOW, num_sink_tokens=SINKS),
        LoLCATsConfig(sliding_window=WINDOW, num_sink_tokens=SINKS),
    ],
    ids=lambda config: config.method,
)
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
    )
    patched = patch(LlamaForCausalLM(config).eval(), request.param)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in memory_parameters(patched).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=noise))
    return patched


IDS = torch.randint(0, 101, (2, TOKENS), generator=torch.Generator().manual_seed(2))


def test_skipped_blocks_change_nothing(model):
    assert MIN_BLOCK <= WINDOW + SINKS < TOKENS - MIN_BLOCK  # one block is skipped, one is not
    with torch.no_grad():
        skipping = model(IDS, use_cache=False).logits
    for parameter in memory_parameters(model).values():
        parameter.requires_grad_(True)
    everything = model(IDS, use_cache=False).logits  # training runs the memory in every block
    torch.testing.assert_close(skipping, everything.detach(), atol=TOLERANCE, rtol=0)
    with torch.no_grad(), window_override(model, sliding_window=WINDOW - 1, num_sink_tokens=SINKS):
        wrong = model(IDS, use_cache=False).logits
    assert (wrong - skipping).abs().max() > TOLERANCE


@torch.no_grad()
def test_blocks_of_one_pass_equal_calls_of_any_length(model):
    whole = model(IDS, use_cache=False).logits
    cache, parts = None, []
    for part in IDS.split([130, 1, 40, 1, 1, 127], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_interception_refuses_a_cache(model):
    with intercepted(model, lambda call: (call.near(), None)):
        assert model(IDS, use_cache=False).logits.isfinite().all()
        with pytest.raises(StateError, match="use_cache=False"):
            model(IDS)
