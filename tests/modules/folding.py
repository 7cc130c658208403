"""A block that only folds: tokens leave, nothing reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memretrofit.modules.memory import Block


def _nothing_reads(*_: Any) -> Any:
    raise AssertionError("a block without queries was read")


def folding(key: Tensor, value: Tensor, features: Tensor | None, writes: Tensor) -> Block:
    """The tokens of key [B, G, C, K] and value [B, G, C, V] leave, in slots 0 to C - 1."""
    return Block(
        query=None,
        hidden=None,
        local=_nothing_reads,
        attend=_nothing_reads,
        attend_to=_nothing_reads,
        scores=_nothing_reads,
        leaving_key=key,
        rotated=lambda: (None, key),
        leaving_value=value,
        leaving_features=features,
        writes=writes,
        query_slots=torch.arange(0),
        leaving_slots=torch.arange(key.shape[2]),
        rotate=_nothing_reads,
    )
