"""What a memory may know of the model that it is made for, without knowing the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class InputEmbedding:
    """The input embeddings [V, E] of the model that a memory stands beside. A value, not a closure:
    a copied model's memory reads the copy's, and a model with a memory can be pickled.
    """

    module: nn.Module

    def __call__(self) -> Tensor:
        """The weights as they are now, without gradient."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @torch.no_grad()
    def of(self, ids: Tensor) -> Tensor:
        """[..., E] what the model makes of token ids [...]: some scale their rows."""
        return self.module(ids.to(self().device))


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What a memory must know of the model that it stands beside."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    layers: tuple[int, ...]
    """Indices of the layers that get a read."""
    windows: tuple[int | None, ...]
    """How many columns attention reaches back in each layer, its own among them; None: all."""
    activation: Callable[[Tensor], Tensor]
    """Of the model's own FFN."""
    embedding: InputEmbedding
    """The model's own, frozen."""
    sink_token_id: int
    """The token that begins a text, or ends one where none begins it: the model lets attention
    rest on it.
    """
    dtype: torch.dtype
