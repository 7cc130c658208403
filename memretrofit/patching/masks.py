"""Masks for patched models: padding only, expanded without storage, instead of a T x T tensor.

A patched layer needs to know which tokens are padding; causality and the window follow from
positions. So the registered mask function returns None (no padding) or the padding mask `[B, 1,
q, kv]` with stride 0 over the queries. Layers that run base attention rebuild the base model's
own mask from it, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    prepare_padding_mask,
)

from memretrofit.errors import UnsupportedModelError
from memretrofit.patching.config_view import PREFIX, base_implementation


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function of the patched implementations; other patterns than causal go to the base
    mask function.
    """
    if mask_function is not causal_mask_function or kv_offset:
        return _base_mask(kwargs["config"])(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is None:
        return None
    # a graph cannot look: it takes what a step of one token is given for padding
    traced = torch.compiler.is_compiling() and q_length == 1
    if not traced and bool(padding[:, :kv_length].all()):
        return None
    return padding[:, None, None, :kv_length].expand(-1, -1, q_length, -1)


def padding_alone(
    mask: Tensor | None, rows: int, length: int, begin: int
) -> tuple[bool, Tensor | None]:
    """Whether `mask`, of `length` queries from slot `begin`, says no more than what is causal and
    which tokens are padding, and if so the mask as `padding_mask` makes it.

    Only a mask that holds a row for each query is looked through, at the cost of its own size:
    Transformers makes such masks for a compiled forward without a cache and for a static cache.
    """
    if mask is None:
        return True, None
    if mask.dtype is torch.bool and (length == 1 or mask.stride(-2) == 0):
        return True, mask
    end = begin + length
    if mask.dim() != 4 or mask.shape[1:3] != (1, length) or mask.shape[-1] < end:
        return False, mask
    if mask.dtype is torch.bool:
        seen, hidden = mask, ~mask
    elif mask.is_floating_point():
        seen, hidden = mask == 0, mask <= torch.finfo(mask.dtype).min
    else:
        return False, mask
    last, columns = seen[:, :, -1:], torch.arange(mask.shape[-1], device=mask.device)
    expected = (columns <= columns[begin:end, None]) & last
    if not (torch.equal(seen, expected) and torch.equal(hidden, ~expected)):
        return False, mask
    if bool(last[..., :end].all()):
        return True, None
    return True, last.expand(rows, -1, length, -1)


def rebuild_base_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, config: Any
) -> Tensor | None:
    """The mask that the base implementation would have received for causal attention with this
    padding.
    """
    q_length, kv_length = query.shape[2], key.shape[2]
    if mask is None and q_length in (1, kv_length) and base_implementation(config) == "sdpa":
        return None  # what `sdpa_mask` answers here, asked once per layer and token
    return _base_mask(config)(
        batch_size=query.shape[0],
        q_length=q_length,
        kv_length=kv_length,
        q_offset=kv_length - q_length,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=None if mask is None else mask[:, 0, -1, :],
        allow_is_causal_skip=True,
        dtype=query.dtype,
        device=query.device,
        config=config,
    )


def token_ranks(mask: Tensor | None) -> Tensor | None:
    """[B, kv] index of each token among the real tokens of its row, -1 for padding; None when
    nothing is padding.
    """
    if mask is None:
        return None
    real = mask[:, 0, -1, :]
    return (real.cumsum(-1) - 1).masked_fill(~real, -1)


def as_base_mask(visible: Tensor, dtype: torch.dtype, implementation: str) -> Tensor:
    """A bool mask in the form that the base implementation adds to its scores."""
    if implementation == "sdpa":
        return visible
    zeros = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zeros, torch.finfo(dtype).min)


def _base_mask(config: Any) -> Any:
    name = base_implementation(config)
    if PREFIX + name not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise UnsupportedModelError(
            f"The model runs attention implementation {name!r}; memretrofit serves 'sdpa' and "
            "'eager'. "
            "Call model.set_attn_implementation('sdpa')."
        )
    return ALL_MASK_ATTENTION_FUNCTIONS[name]
