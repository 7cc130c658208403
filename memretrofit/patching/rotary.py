"""Undo or shift a rotary embedding, with the model's own rotary module and function.

Queries and keys arrive rotated. A memory may want them before rotation, and StreamingLLM wants
sinks at a bounded distance; both are rotations by a negative angle, so the cache always stores
what the model made.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memretrofit.modules.memory import widened


def unrotate(module: nn.Module, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Undo the rotation of `x` `[B, H, T, K]` by the (cos, sin) that the module was given: R(-p)
    x.

    Some embeddings also scale (YaRN); the squared length of (cos, sin) takes that back too.
    """
    cos, sin = (widened(part) for part in position_embeddings)
    length = cos.square() + sin.square()
    return _rotated(module, widened(x), cos / length, -sin / length).to(x.dtype)


def _rotated(module: nn.Module, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    apply = sys.modules[type(module).__module__].apply_rotary_pos_emb
    return apply(x, x, cos, sin)[0]


def can_unrotate(module: nn.Module, query: Tensor, position_embeddings: Any) -> bool:
    """Whether the module rotates whole heads by a (cos, sin) pair, so that `unrotate` is its
    inverse.
    """
    if not (isinstance(position_embeddings, (tuple, list)) and len(position_embeddings) == 2):
        return False
    try:
        return unrotate(module, query, tuple(position_embeddings)).shape == query.shape  # type: ignore[arg-type]
    except (AttributeError, RuntimeError, TypeError):
        return False


@dataclass(eq=False)
class Rotary:
    """The decoder's rotary module, asked for angles at positions of our choice."""

    module: nn.Module
    layer_type: str | None = None

    def turn_back(self, attention: nn.Module, x: Tensor, steps: Tensor) -> Tensor:
        """Rotate `x` `[B, H, T, K]` back by `steps` `[1 | B, T]` positions."""
        cos, sin = self._angles(x, steps.clamp(min=0))
        scale = getattr(self.module, "attention_scaling", 1.0)  # already in x, once
        return unrotate(attention, x, (cos / scale, sin / scale))

    def rotate(self, attention: nn.Module, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate `x` `[B, H, T, K]` to `positions` `[1 | B, T]`, as the model would, in at least
        float32.
        """
        x = widened(x)
        return _rotated(attention, x, *self._angles(x, positions))

    def _angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        arguments: dict[str, Any] = (
            {} if self.layer_type is None else {"layer_type": self.layer_type}
        )
        return self.module(x, positions, **arguments)


def find_rotary(model: nn.Module, attention: nn.Module) -> Rotary | None:
    """The rotary module of the decoder that holds `attention`, or None."""
    for module in model.modules():
        if "rotary" not in type(module).__name__.lower() or not hasattr(module, "forward"):
            continue
        parameters = inspect.signature(module.forward).parameters
        if "position_ids" not in parameters:
            continue
        layer_type = None
        if "layer_type" in parameters:
            layer_type = getattr(attention, "layer_type", None)
            types = getattr(attention.config, "layer_types", None)
            if layer_type is None and types is not None:
                layer_type = types[attention.layer_idx]
        return Rotary(module, layer_type)
    return None


def slot_steps(position: Tensor, capacity: int) -> Tensor:
    """How far a query at `position` stands beyond the last slot of a cache of `capacity` tokens."""
    return torch.clamp(position - (capacity - 1), min=0)
