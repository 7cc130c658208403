"""Ways to run a model over the same tokens that must not change its logits, and masks of the
stock model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from memretrofit.modules.store import Store
from memretrofit.patching.cache import MemoryLayer


@torch.no_grad()
def one_pass(model: PreTrainedModel, ids: Tensor, **kwargs) -> Tensor:
    """Logits [B, T, vocabulary] of one forward without a cache: the reference of everything
    else."""
    return model(ids, use_cache=False, **kwargs).logits


@torch.no_grad()
def in_pieces(
    model: PreTrainedModel,
    ids: Tensor,
    ends: Sequence[int],
    *,
    mask: Tensor | None = None,
    cache: Cache | None = None,
) -> tuple[Tensor, Cache]:
    """Logits of forwards over ids[:, :ends[0]], ids[:, ends[0]:ends[1]], … on one cache, and the
    cache."""
    logits, begin = [], 0
    positions = None if mask is None else positions_of(mask)
    for end in [*(e for e in ends if e < ids.shape[1]), ids.shape[1]]:
        if end == begin:
            continue
        padding = (
            {}
            if mask is None
            else {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        )
        output = model(ids[:, begin:end], past_key_values=cache, use_cache=True, **padding)
        cache, begin = output.past_key_values, end
        logits.append(output.logits)
    return torch.cat(logits, dim=1), cache


def positions_of(mask: Tensor) -> Tensor:
    """Position ids as `generate` makes them from a padding mask."""
    return (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)


def left_padded(rows: Sequence[Tensor], *, extra: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [T_b] as ids and mask [B, extra + longest]; the padding holds real-looking ids, so a
    leak shows."""
    length = max(len(row) for row in rows) + extra
    ids = torch.stack([torch.cat([row.new_full((length - len(row),), 7), row]) for row in rows])
    mask = torch.stack([(torch.arange(length) >= length - len(row)).long() for row in rows])
    return ids, mask


def explicit_window(model: PreTrainedModel, ids: Tensor, window: int, sinks: int) -> Tensor:
    """Logits of the stock model with a 4-D sinks + window mask in its full layers."""
    length = ids.shape[1]
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    causal = key <= query
    seen = causal & ((query - key < window) | (key < sinks))
    masks = additive(seen, ids)
    kinds = getattr(model.config, "layer_types", None) or []
    if "sliding_attention" in kinds:
        sliding = causal & (query - key < model.config.sliding_window)
        masks = {"full_attention": masks, "sliding_attention": additive(sliding, ids)}
    return one_pass(model, ids, attention_mask=masks)


def additive(seen: Tensor, ids: Tensor) -> Tensor:
    """A bool [T, T] as the float mask [B, 1, T, T] that both sdpa and eager add to their scores."""
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return mask.expand(ids.shape[0], 1, *seen.shape)


def states(cache: Cache) -> list[Tensor]:
    """What the memories of a cache hold, rows first."""
    held = [x for layer in cache.layers if isinstance(layer, MemoryLayer) for x in layer.state]
    return [y for x in held for y in (x.live() if isinstance(x, Store) else (x,))]


def apart(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference."""
    return (a - b).abs().max().item()
