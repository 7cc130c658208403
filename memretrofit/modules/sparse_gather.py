"""Rows of a parameter, with a gradient of as many rows as were asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SparseGather(torch.autograd.Function):
    """Rows of a parameter of any shape by distinct numbers; the gradient has only those."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Tensor:
        """`weight` [R, ...] at sorted distinct numbers [n]."""
        ctx.save_for_backward(index)
        ctx.shape = weight.shape
        return weight.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """A sparse gradient of `weight`."""
        (index,) = ctx.saved_tensors
        # the numbers are sorted and distinct: no invariant to check, nothing to coalesce
        grad = torch.sparse_coo_tensor(
            index[None], grads[0], ctx.shape, is_coalesced=True, check_invariants=False
        )
        return grad, None
