"""Where a memory stands that is not in attention: the modules that carry it, what it is told of the
model, and how it is placed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from memretrofit.modules.model_spec import InputEmbedding, ModelSpec


@dataclass(eq=False)
class Seat:
    """One module that carries a part of a memory."""

    memory: nn.Module
    layer_idx: int | None
    """None for the part that stands beside all layers."""
    module: nn.Module
    """The module that carries it."""

    @property
    def device(self) -> torch.device:
        """Where it stands."""
        return next(self.module.parameters()).device


def model_spec(model: PreTrainedModel, count: int, layers: tuple[int, ...]) -> ModelSpec:
    """What a memory with parts in `layers`, of `count`, is told."""
    config = model.config.get_text_config(decoder=True)
    embedding: Any = model.get_input_embeddings()
    name = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return ModelSpec(
        hidden_size=config.hidden_size,
        vocab_size=embedding.weight.shape[0],
        num_layers=count,
        layers=layers,
        windows=_windows(config, count),
        activation=ACT2FN[name] if isinstance(name, str) else nn.SiLU(),
        embedding=InputEmbedding(embedding),
        dtype=embedding.weight.dtype,
        sink_token_id=_sink_token(config),
    )


def _windows(config: Any, count: int) -> tuple[int | None, ...]:
    reach = {
        "sliding_attention": getattr(config, "sliding_window", None),
        "chunked_attention": getattr(config, "attention_chunk_size", None),
    }
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * count
    return tuple(reach.get(kind) for kind in kinds)


def _sink_token(config: Any) -> int:
    for name in ("bos_token_id", "eos_token_id"):
        found = getattr(config, name, None)
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return found
    return 0


def placed(memory: Any, module: nn.Module) -> Any:
    """The memory on the device and in the mode of its module; float64 only where that is."""
    weight = next(module.parameters())
    memory = memory.to(weight.device).train(module.training)
    return memory.double() if weight.dtype is torch.float64 else memory
