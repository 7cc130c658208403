"""What the one attention layer of a tiny model was given, and what it returned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from memretrofit.patching.controls import intercepted


@dataclass
class Attention:
    """Inputs as the attention function received them, and the output before the output
    projection."""

    module: torch.nn.Module
    hidden: Tensor  # [B, T, E]
    query: Tensor  # [B, H, T, K]
    key: Tensor  # [B, G, T, K]
    value: Tensor  # [B, G, T, V]
    cos_sin: tuple[Tensor, Tensor]
    output: Tensor  # [B, T, H, V]


@torch.no_grad()
def attention_of(model, ids) -> Attention:
    """Run `ids` through a patched model of one layer."""
    seen: list[Attention] = []

    def look(call):
        output, weights = call.remember()
        inputs = call.module, call.hidden, call.query, call.key, call.value
        seen.append(Attention(*inputs, call.position_embeddings, output))
        return output, weights

    with intercepted(model, look):
        model(ids, use_cache=False)
    (found,) = seen
    return found
