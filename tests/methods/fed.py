"""What the FFNs of a tiny model were given, and what came out of them, memory included."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def ffns_of(model, ids) -> list[tuple[Tensor, Tensor]]:
    """Input and output [B, T, E] of each FFN of a Llama, in order."""
    seen: list[tuple[Tensor, Tensor]] = []
    handles = [
        layer.mlp.register_forward_hook(lambda mlp, args, out: seen.append((args[0], out)))
        for layer in model.model.layers
    ]
    try:
        model(ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen
