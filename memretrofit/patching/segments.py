"""The tokens family's seam: a text is read in segments, and a memory is carried between them.

Here a memory is attached: hooks let the parts in layers read and write during the forwards that
`patching.segment_reader` makes, which opens and closes the spans of each row of a batch.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.errors import NoTargetError, UnsupportedModelError
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.segment_memory import LayerMemory, SegmentMemory
from memretrofit.patching.controls import ATTRIBUTE
from memretrofit.patching.ffn_sites import decoder_of, find_bank_sites
from memretrofit.patching.generating import refuse_continuous_batching, refuse_named_cache
from memretrofit.patching.ledger import refuse_patched
from memretrofit.patching.pieces import read_in_pieces
from memretrofit.patching.seats import Seat, model_spec, placed
from memretrofit.patching.segment_reader import SegmentReader
from memretrofit.patching.segment_visit import (
    EnterHook,
    LayerHook,
    SegmentLedger,
    note_hidden,
    segment_ledger_of,
)
from memretrofit.patching.session import session_of

MakeLayer = Callable[[ModelSpec, int, int], LayerMemory]
"""From the model, the layer's index and its number among the patched ones."""


def patch_segments(
    model: PreTrainedModel,
    config: MethodConfig,
    make_memory: Callable[[ModelSpec], SegmentMemory],
    make_layer: MakeLayer | None = None,
) -> None:
    """Let the model read in segments, with a memory between them. All or nothing.

    Args:
        make_layer: builds the part of each layer in `config.layers_to_transform`, None for all.

    Raises:
        StateError: the model is patched already.
        UnsupportedModelError: no layer can be entered, its layers keep no keys and values, or they
            have inputs of their own made from token ids.
        NoTargetError: `layers_to_transform` names a layer that does not exist.
    """
    refuse_patched(model)
    name, decoder = decoder_of(model)
    _check_inputs(decoder)
    sites = {site.layer_idx: site for site in find_bank_sites(model, "layer")}
    _check_layers(model)
    wanted = getattr(config, "layers_to_transform", None)
    chosen = tuple(sites) if wanted is None else tuple(sorted(wanted))
    if missing := sorted(set(chosen) - set(sites)):
        raise NoTargetError(
            f"layers_to_transform={wanted}: {type(model).__name__} has no layers {missing}; it has "
            f"{min(sites)} to {max(sites)}."
        )
    chosen = chosen if make_layer is not None else ()
    spec = model_spec(model, len(sites), chosen)
    # whatever can fail comes first: nothing is attached yet
    memory = placed(make_memory(spec), model.get_input_embeddings())
    layers: dict[int, LayerMemory] = {}
    if make_layer is not None:
        for number, index in enumerate(chosen):
            layers[index] = placed(make_layer(spec, index, number), sites[index].module)
    ledger = SegmentLedger(config, memory=memory, layers=layers)
    ledger.seams = {name: Seat(memory, None, decoder)}
    decoder.memory = memory
    ledger.handles.append(decoder.register_forward_pre_hook(EnterHook(ledger)))
    ledger.handles.append(decoder.register_forward_hook(note_hidden))
    for index, layer in layers.items():
        module = sites[index].module
        ledger.seams[sites[index].name] = Seat(layer, index, module)
        module.memory = layer
        hook = LayerHook(index, layer)
        ledger.handles += [
            module.register_forward_pre_hook(hook.read, with_kwargs=True),
            module.register_forward_hook(hook.write, with_kwargs=True),
        ]
    refuse_continuous_batching(model, ledger)
    setattr(model, ATTRIBUTE, ledger)
    read_in_pieces(model, SegmentReader)
    if hasattr(model, "_prepare_cache_for_generation"):
        ledger.replace_method(
            model, "_prepare_cache_for_generation", functools.partial(_prepare_cache, model)
        )


def _prepare_cache(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
) -> Any:
    """Put the session into the cache before `generate` decides what it may record or crop."""
    original: Any = type(model)
    ledger = segment_ledger_of(model)
    refuse_named_cache(generation_config.cache_implementation, ledger)
    result = original._prepare_cache_for_generation(model, generation_config, model_kwargs, *args)
    cache = model_kwargs.get("past_key_values")
    if cache is not None and not ledger.controls.disabled:
        session = session_of(cache, ledger.owner)
        if generation_config.is_assistant:
            session.activate_past_recording()
    return result


def _check_inputs(decoder: nn.Module) -> None:
    if "per_layer_inputs" in inspect.signature(type(decoder).forward).parameters:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} makes inputs of each layer from token ids, and what stands "
            "in front of a segment and behind it has none. Patch a model whose layers read their "
            "hidden states alone."
        )


def _check_layers(model: PreTrainedModel) -> None:
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ()
    other = sorted(set(kinds) - {"full_attention", "sliding_attention", "chunked_attention"})
    if other:
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers of {', '.join(other)}, whose state does not begin "
            "anew with a segment. Patch a model whose layers are all attention."
        )
