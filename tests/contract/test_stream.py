"""A stream far longer than anything trained on costs what the window costs."""

from __future__ import annotations

import torch
from families import build

from memretrofit import AHNConfig, patch
from memretrofit.description import cache_bytes_at

CHUNK = 1000


@torch.no_grad()
def test_two_hundred_thousand_tokens_in_constant_memory():
    model = patch(build("llama"), AHNConfig(sliding_window=60, num_sink_tokens=4))
    random = torch.Generator().manual_seed(0)
    cache, held = None, set()
    for _ in range(200):
        ids = torch.randint(0, 101, (1, CHUNK), generator=random)
        output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        held.add(sum(layer.nbytes() for layer in cache.layers))
        assert output.logits.isfinite().all()
    assert cache.get_seq_length() == 200 * CHUNK
    assert held == {cache_bytes_at(model, 200 * CHUNK)[1]}
