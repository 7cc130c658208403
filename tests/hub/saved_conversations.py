"""A conversation to save, and what is asked of it."""

from __future__ import annotations

from typing import Any

import torch
from contract.arms import patched
from contract.families import tokens

FILLED, LENGTH = 37, 60
"""Tokens that are read, and those with the questions behind them."""


def filled(model: Any, rows: int = 2, length: int = FILLED, cache: Any = None) -> Any:
    with torch.no_grad():
        ids = tokens(rows, LENGTH)[:, :length]
        return model(ids, past_key_values=cache, use_cache=True).past_key_values


@torch.no_grad()
def asked(model: Any, cache: Any, ids: Any = None) -> torch.Tensor:
    ids = tokens(2, LENGTH)[:, FILLED:] if ids is None else ids
    return model(ids, past_key_values=cache, use_cache=True).logits


def reader() -> Any:
    """A model with a store, a fixed state and parameters of its own, always the same."""
    return patched("llama", "composed")
