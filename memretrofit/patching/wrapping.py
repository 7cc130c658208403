"""The model that is meant inside a PEFT wrapper, its mode, and what it is called with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def unwrapped(model: Any) -> Any:
    """The Transformers model inside a PEFT model; any other model as it is."""
    inside: Any = getattr(model, "get_base_model", None)
    return model if inside is None else inside()


def positions_of(model: Any) -> int | None:
    """Positions that the model can read; None where its config states no limit."""
    config = unwrapped(model).config.get_text_config(decoder=True)
    # MPT alone has no other name for it
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, every module's own mode again after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def named_arguments(
    forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name."""
    if not args:
        return dict(kwargs)
    signature = inspect.signature(forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given
