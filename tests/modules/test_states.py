"""What a token that does not write does to a state: nothing, not even fade it."""

from __future__ import annotations

import pytest
import torch
from modules.folding import folding

from memretrofit.modules.feature_map import FeatureMapMemory
from memretrofit.modules.recurrent import RecurrentMemory

SHAPE = {"num_heads": 2, "num_state_heads": 2, "key_dim": 4, "value_dim": 3}
WINDOW = {"sliding_window": 4, "num_sink_tokens": 1, "key_space": "post_rope"}


def recurrent(rule):
    return RecurrentMemory(rule=rule, hidden_size=5, center_keys=False, **SHAPE, **WINDOW)


MEMORIES = {
    "gated_delta": lambda: recurrent("gated_delta"),
    "delta": lambda: recurrent("delta"),
    "ssd": lambda: recurrent("ssd"),
    "lolcats": lambda: FeatureMapMemory(**SHAPE, **WINDOW),
}


def folded(memory, state, count, writes):
    """The state after `count` random tokens of which those in `writes` are real."""
    generator = torch.Generator().manual_seed(1)
    features = None
    if memory.write_features is not None:
        features = memory.write_features(torch.randn(1, count, 5, generator=generator))
    block = folding(
        torch.randn(1, 2, count, 4, generator=generator),
        torch.randn(1, 2, count, 3, generator=generator),
        features,
        torch.tensor([[n in writes for n in range(count)]]),
    )
    with torch.no_grad():
        return memory(block, state)[1]


@pytest.mark.parametrize("count", [1, 6], ids=["recurrent", "chunk"])
@pytest.mark.parametrize("name", list(MEMORIES))
def test_a_token_that_does_not_write_leaves_the_state(name, count):
    """Pads between two turns meet a state that is not empty: it must neither grow nor fade."""
    torch.manual_seed(0)
    memory = MEMORIES[name]()
    empty = memory.initial_state(1, torch.zeros(1))
    (filled,) = folded(memory, empty, 3, {0, 1, 2})
    (after,) = folded(memory, (filled,), count, set())
    assert filled.abs().max() > 0
    assert torch.allclose(after, filled, rtol=1e-6, atol=0)
    (written,) = folded(memory, (filled,), count, {0})
    assert not torch.allclose(written, filled, rtol=1e-3, atol=0)
