"""Find where a decoder can be entered, by asking the model: one forward of two tokens, recorded.

Names and classes of attention modules differ between architectures. What they share is the call
into Transformers' attention interface, so the modules that make that call in a forward are the
sites, with the shapes that they really pass.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from memretrofit.errors import UnsupportedModelError
from memretrofit.patching.config_view import (
    IMPLEMENTATIONS,
    base_implementation,
    config_view,
    is_view,
)
from memretrofit.patching.registration import register
from memretrofit.patching.rotary import can_unrotate


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention module, with the shapes of what it hands to the attention function."""

    name: str
    module: nn.Module
    layer_idx: int
    hidden_size: int
    num_heads: int
    num_key_value_heads: int
    key_dim: int
    value_dim: int
    rotates: bool
    extras: tuple[str, ...]
    """Names of learned sinks that its softmax is given beside query and key."""
    patchable: bool
    reason: str


@dataclass
class _Probe:
    hidden: dict[nn.Module, Tensor]
    positions: dict[nn.Module, Any]
    calls: list[tuple[nn.Module, Tensor, Tensor, Tensor, dict[str, Any]]]


probe: ContextVar[_Probe | None] = ContextVar("memretrofit_probe", default=None)


def config_holders(model: PreTrainedModel) -> dict[nn.Module, Any]:
    """The modules that read an attention implementation from a config, the outermost model
    excepted.
    """
    holders = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            holders[module] = config
    if any(isinstance(m, PreTrainedModel) for m in holders if m is not model):
        holders.pop(model, None)
    return holders


def set_config(module: nn.Module, config: Any) -> None:
    """Let one module read its settings from `config`."""
    module.config = config


@contextmanager
def viewed_configs(model: PreTrainedModel):
    """Let all of `model` dispatch to the memretrofit attention function while inside."""
    holders = config_holders(model)
    for module, config in holders.items():
        if not is_view(config):
            set_config(module, config_view(config))
    try:
        yield
    finally:
        for module, config in holders.items():
            set_config(module, config)


def find_attention_sites(model: PreTrainedModel) -> list[AttentionSite]:
    """The attention modules of a decoder in layer order, patchable or not, each with the reason
    when it is not.

    Raises:
        UnsupportedModelError: the model runs another attention implementation than sdpa or eager,
        cannot run on two token
            ids, or never calls the attention interface.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"memretrofit patches Transformers models; found {name}. Pass the model that "
            "from_pretrained returned "
            "(for a PEFT model: patch first, or pass peft_model.base_model.model)."
        )
    implementations = {base_implementation(c) for c in config_holders(model).values()} - {"eager"}
    if not implementations <= set(IMPLEMENTATIONS):
        raise UnsupportedModelError(
            f"{name} runs attention implementation {', '.join(sorted(implementations))}; "
            "memretrofit serves "
            f"{' and '.join(IMPLEMENTATIONS)}. Call model.set_attn_implementation('sdpa') before "
            "patching."
        )
    register()
    record = _Probe({}, {}, [])
    cache = _run_two_tokens(model, record)
    if not record.calls:
        raise UnsupportedModelError(
            f"{name} never calls Transformers' attention interface, which is where a memory "
            "enters attention."
        )
    names = {module: path for path, module in model.named_modules()}
    counts = [module for module, *_ in record.calls]
    return [_site(names, record, cache, call, counts.count(call[0])) for call in record.calls]


def _run_two_tokens(model: PreTrainedModel, record: _Probe) -> Cache | None:
    def remember(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(hidden, Tensor):
            record.hidden[module] = hidden
            record.positions[module] = kwargs.get("position_embeddings")

    handles = [
        m.register_forward_pre_hook(remember, with_kwargs=True)
        for m in model.modules()
        if hasattr(m, "layer_idx")
    ]
    modes = {module: module.training for module in model.modules()}
    token = probe.set(record)
    try:
        ids = torch.zeros(1, 2, dtype=torch.long, device=_device(model))
        with viewed_configs(model), torch.no_grad():
            return model.eval()(input_ids=ids, use_cache=True).get("past_key_values")
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on two token ids, so its attention could not be "
            f"located: {error}"
        ) from error
    finally:
        probe.reset(token)
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()


def _device(model: PreTrainedModel) -> Any:
    return next(model.get_input_embeddings().parameters()).device


def _site(
    names: dict, record: _Probe, cache: Cache | None, call: tuple, times: int
) -> AttentionSite:
    module, query, key, value, kwargs = call
    index = getattr(module, "layer_idx", None)
    hidden = record.hidden.get(module)
    layer = (
        cache.layers[index]
        if isinstance(cache, Cache) and index is not None and index < len(cache.layers)
        else None
    )
    return AttentionSite(
        name=names[module],
        module=module,
        layer_idx=-1 if index is None else index,
        hidden_size=0 if hidden is None else hidden.shape[-1],
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        key_dim=key.shape[-1],
        value_dim=value.shape[-1],
        extras=tuple(name for name in ("s_aux", "sinks") if kwargs.get(name) is not None),
        rotates=can_unrotate(module, query, record.positions.get(module)),
        reason=(reason := _why_not(hidden, layer, times, kwargs)),
        patchable=not reason,
    )


def _why_not(hidden: Tensor | None, layer: Any, times: int, kwargs: dict[str, Any]) -> str:
    """The reason for which a site is left alone, or an empty string."""
    if times > 1:
        return f"calls attention {times} times per forward"
    if hidden is None:
        return "no hidden states or layer index to read"
    if type(layer) is not DynamicLayer:
        kind = "no cache layer" if layer is None else type(layer).__name__
        return (
            "native sliding window"
            if getattr(layer, "is_sliding", False)
            else f"cache layer is {kind}"
        )
    for argument in ("position_bias", "indices"):
        if kwargs.get(argument) is not None:
            return f"attention takes {argument}"
    return ""
