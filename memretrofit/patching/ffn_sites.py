"""Find where a decoder's layers and their FFNs can be entered, by asking the model: one forward of
two tokens, recorded.

The FFN is the child of a decoder layer that is called by one of a few names; the whole block of a
mixture of experts, not an expert. It is a site if the forward called it once, with the hidden
states of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from memretrofit.errors import UnsupportedModelError
from memretrofit.patching.wrapping import evaluating

FFN_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe")
"""What architectures call the child of a decoder layer that is its FFN."""

Kind = Literal["ffn", "layer"]
_LOOKED_FOR = {
    "ffn": "has an FFN that can be entered: looked in the {} layers of {} for a child named "
    + ", ".join(FFN_NAMES),
    "layer": "can be entered: looked in the {} layers of {} for one",
}


@dataclass(frozen=True, kw_only=True)
class BankSite:
    """A module whose output, or input, a memory adds to."""

    name: str
    module: nn.Module
    layer_idx: int


def decoder_of(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The module of `model` that is given token ids and holds the layers, and its name.

    Raises:
        UnsupportedModelError: there is none, or it is the model itself.
    """
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    names = {module: name for name, module in model.named_modules()}
    if decoder is None or decoder is model:  # not every model says which one it is
        decoder = next((m for m in names if m is not model and _lists(model, m)), None)
    name = names.get(decoder, "") if decoder is not None else ""
    if not name:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder of its own below its head, beside which a "
            "memory could stand. Pass a causal language model (AutoModelForCausalLM)."
        )
    assert decoder is not None
    return name, decoder


def find_bank_sites(model: PreTrainedModel, kind: Kind) -> list[BankSite]:
    """The FFNs of a decoder, or its layers, in layer order.

    Raises:
        UnsupportedModelError: there are none, or the model cannot run on two token ids; the message
            says what was looked for and found.
    """
    name, decoder = decoder_of(model)
    layers = _layers(model, decoder)
    paths = {module: path for path, module in model.named_modules()}
    found = [_entered(layer, kind) for layer in layers]
    shapes = _run_two_tokens(model, decoder, [module for module in found if module is not None])
    sites = [
        BankSite(name=paths[module], module=module, layer_idx=index)
        for index, module in enumerate(found)
        if module is not None and shapes.get(module) == [(1, 2)]
    ]
    if not sites:
        children = sorted({child for layer in layers for child, _ in layer.named_children()})
        raise UnsupportedModelError(
            f"No layer of {type(model).__name__} {_LOOKED_FOR[kind].format(len(layers), name)} "
            f"that is called once with hidden states [B, T, E]; found {', '.join(children)}."
        )
    return sites


def _layers(model: PreTrainedModel, decoder: nn.Module) -> list[nn.Module]:
    fitting = _lists(model, decoder)
    if len(fitting) != 1:
        raise UnsupportedModelError(
            f"The layers of {type(model).__name__} could not be located: its config states "
            f"{_layer_count(model)}, and its decoder has {len(fitting)} lists of so many modules."
        )
    return list(fitting[0])


def _layer_count(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)


def _lists(model: PreTrainedModel, decoder: nn.Module) -> list[nn.ModuleList]:
    """The children of `decoder` that may be its layers."""
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    return [found for found in lists if len(found) == _layer_count(model)]


def _entered(layer: nn.Module, kind: Kind) -> nn.Module | None:
    if kind == "layer":
        return layer
    children = dict(layer.named_children())
    return next((children[name] for name in FFN_NAMES if name in children), None)


def _run_two_tokens(
    model: PreTrainedModel, decoder: nn.Module, modules: list[nn.Module]
) -> dict[nn.Module, list[tuple[int, ...]]]:
    """[B, T] of each call of each module."""
    calls: dict[nn.Module, list[tuple[int, ...]]] = {}
    given: list[Any] = []
    cache = None

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = hidden_of(args, kwargs)
        shape = tuple(hidden.shape[:-1]) if isinstance(hidden, Tensor) else ()
        calls.setdefault(module, []).append(shape)

    def note_ids(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given.append(kwargs.get("input_ids", args[0] if args else None))

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in set(modules)]
    handles.append(decoder.register_forward_pre_hook(note_ids, with_kwargs=True))
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            cache = model(input_ids=ids, use_cache=True).get("past_key_values")
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on two token ids, so its layers could not be "
            f"located: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not given or not isinstance(given[0], Tensor) or given[0].is_floating_point():
        raise UnsupportedModelError(
            f"{type(model).__name__} embeds its tokens before its decoder, so a memory there does "
            "not learn which tokens it reads. Patch a text-only causal language model."
        )
    if not isinstance(cache, Cache):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps its conversation in {type(cache).__name__} and not in a "
            "Transformers Cache, so a memory could not know what was said before."
        )
    return calls


def hidden_of(args: tuple, kwargs: dict[str, Any]) -> Any:
    """The hidden states that a layer or an FFN was called with."""
    if args:
        return args[0]
    return kwargs.get("hidden_states", next(iter(kwargs.values()), None))
