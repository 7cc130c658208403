"""Attach memories to the attention of a model, with a ledger of everything that was touched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from memretrofit.config import exact_tokens
from memretrofit.errors import ConfigError, NoTargetError, StateError, UnsupportedModelError
from memretrofit.modules.memory import AttentionMemory
from memretrofit.patching.attention import Owner, Seam
from memretrofit.patching.cache import upgrade
from memretrofit.patching.config_view import config_view
from memretrofit.patching.controls import ATTRIBUTE
from memretrofit.patching.generating import refuse_continuous_batching, refuse_named_cache
from memretrofit.patching.ledger import Ledger, ledger_of, refuse_patched
from memretrofit.patching.rotary import find_rotary
from memretrofit.patching.sites import (
    AttentionSite,
    config_holders,
    find_attention_sites,
    set_config,
)
from memretrofit.patching.wrapping import positions_of


@dataclass(eq=False)
class AttentionLedger(Ledger):
    """What attention memories added to a model."""

    heeds = frozenset(
        {"disabled", "writes", "shuffled", "silenced", "carried", "window", "intercept"}
    )

    make_memory: Callable[[AttentionSite], AttentionMemory] = field(kw_only=True)
    sites: list[AttentionSite] = field(kw_only=True)
    seams: dict[str, Seam] = field(default_factory=dict)

    def device_of(self, site: AttentionSite) -> torch.device:
        """Where the memory of a patched site is."""
        return next(site.module.parameters()).device


def attention_ledger_of(model: nn.Module) -> AttentionLedger:
    """What attention memories added to a patched model.

    Raises:
        StateError: the model is not patched, or with a memory of another family.
    """
    ledger = ledger_of(model)
    if not isinstance(ledger, AttentionLedger):
        raise StateError(
            f"This {type(model).__name__} is patched with {ledger.config}, and what was asked is "
            "about memories in its attention, such as ahn or infllm."
        )
    return ledger


def patch_attention(
    model: PreTrainedModel,
    config: Any,
    make_memory: Callable[[AttentionSite], AttentionMemory],
) -> None:
    """Give each selected attention module the memory that `make_memory` builds for it. All or
    nothing.

    Raises:
        StateError: the model is patched already.
        UnsupportedModelError: no layer can be served, or one that was asked for cannot.
        ConfigError: the window does not fit the model.
        NoTargetError: `layers_to_transform` names a layer that does not exist.
    """
    refuse_patched(model)
    sites = find_attention_sites(model)
    _check_window(model, config)
    chosen = _choose(model, sites, config.layers_to_transform)
    ledger = AttentionLedger(config, make_memory=make_memory, sites=sites)
    owner = Owner()
    # whatever can fail comes first: nothing is attached yet
    memories = [(site, _placed(make_memory(site), site.module)) for site in chosen]
    for site, memory in memories:
        _check_memory(model, site, memory)
        ledger.seams[site.name] = Seam(
            memory, ledger.controls, owner, site.layer_idx, find_rotary(model, site.module)
        )
    for site, memory in memories:
        seam = ledger.seams[site.name]
        site.module.memory = memory
        ledger.handles += [
            site.module.register_forward_pre_hook(seam.before, with_kwargs=True),
            site.module.register_forward_hook(seam.after, always_call=True),
        ]
    for module, held in config_holders(model).items():
        ledger.configs[module] = held
        set_config(module, config_view(held))
    if hasattr(model, "_prepare_cache_for_generation"):
        ledger.replace_method(
            model, "_prepare_cache_for_generation", functools.partial(_prepare_cache, model)
        )
    refuse_continuous_batching(model, ledger)
    setattr(model, ATTRIBUTE, ledger)


def _prepare_cache(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
) -> Any:
    """Upgrade the cache before `generate` decides what it may record or crop."""
    original: Any = type(model)
    refuse_named_cache(generation_config.cache_implementation, getattr(model, ATTRIBUTE))
    result = original._prepare_cache_for_generation(model, generation_config, model_kwargs, *args)
    ledger = getattr(model, ATTRIBUTE)
    cache = model_kwargs.get("past_key_values")
    if cache is not None and not ledger.controls.disabled:
        for seam in ledger.seams.values():
            if cache.layer_class_to_replicate is None and seam.layer_idx >= len(cache.layers):
                continue  # early exit drafts with the first layers only
            layer = upgrade(cache, seam.layer_idx, seam.memory, seam.owner.key)
            if generation_config.is_assistant:
                layer.activate_past_recording()
    return result


def _check_window(model: PreTrainedModel, config: Any) -> None:
    positions, kept = positions_of(model), exact_tokens(config)
    if positions is not None and kept is not None and kept >= positions:
        raise ConfigError(
            f"sliding_window={config.sliding_window} with {config.num_sink_tokens} sinks is not "
            f"smaller than the {positions} positions that "
            f"{type(model).__name__} was trained on, so nothing would ever leave it. Choose a "
            "smaller window."
        )


def _choose(
    model: PreTrainedModel, sites: list[AttentionSite], wanted: tuple[int, ...] | None
) -> list[AttentionSite]:
    name = type(model).__name__
    patchable = [site for site in sites if site.patchable]
    if wanted is None:
        if not patchable:
            reasons = ", ".join(sorted({site.reason for site in sites}))
            raise UnsupportedModelError(
                f"No attention layer of {name} can be given a memory; found {len(sites)} layers: "
                f"{reasons}."
            )
        return patchable
    by_layer = {site.layer_idx: site for site in sites}
    missing = sorted(set(wanted) - set(by_layer))
    if missing:
        raise NoTargetError(
            f"layers_to_transform={wanted}: {name} has no attention in layers {missing}; "
            f"it has layers {min(by_layer)} to {max(by_layer)}."
        )
    refused = {index: by_layer[index].reason for index in wanted if not by_layer[index].patchable}
    if refused:
        raise UnsupportedModelError(
            f"layers_to_transform={wanted}: {name} cannot serve these layers: {refused}."
        )
    return [by_layer[index] for index in sorted(set(wanted))]


def _placed(memory: AttentionMemory, module: nn.Module) -> AttentionMemory:
    """The memory on the device and in the mode of its module; float64 only where that is."""
    weight = next(module.parameters())
    memory = memory.to(weight.device).train(module.training)
    return memory.double() if weight.dtype is torch.float64 else memory


def _check_memory(model: PreTrainedModel, site: AttentionSite, memory: AttentionMemory) -> None:
    if memory.shares_softmax and site.extras:
        raise UnsupportedModelError(
            f"{site.name} of {type(model).__name__} gives its softmax {', '.join(site.extras)}, "
            "which a memory under the same normaliser does not know. Use a method that adds its "
            "read, such as ahn."
        )
    if memory.key_space == "pre_rope" and not site.rotates:
        raise UnsupportedModelError(
            f"key_space='pre_rope' needs heads that are rotated by a (cos, sin) pair; {site.name} "
            f"of {type(model).__name__} "
            "does not get one for whole heads. Use key_space='post_rope'."
        )
    if memory.sink_positions == "slot" and not (site.rotates and find_rotary(model, site.module)):
        raise UnsupportedModelError(
            f"Slot positions need rotary embeddings over whole heads; {site.name} of "
            f"{type(model).__name__} has none. "
            "Use window_sinks, which keeps absolute positions."
        )
