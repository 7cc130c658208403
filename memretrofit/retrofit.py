"""The verbs: patch a model with a method, take it off again, and say what was done."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.errors import ConfigError
from memretrofit.patching.controls import ATTRIBUTE, memory_disabled
from memretrofit.patching.ffn import BankLedger
from memretrofit.patching.ledger import detach, ledger_of
from memretrofit.patching.vocabulary import VocabularyLedger
from memretrofit.patching.wrapping import unwrapped

__all__ = ["describe", "memory_disabled", "memory_parameters", "patch", "patched_config", "unpatch"]

Model = TypeVar("Model", bound=PreTrainedModel)


def patch(model: Model, config: MethodConfig) -> Model:
    """Give `model` the memory that `config` names, in place, and return it.

    Base weights are neither copied nor changed; new parameters are named `*.memory.*`. The state
    of a conversation lives in its cache, so one patched model serves many.

    Raises:
        ConfigError: `config` is not a method config, or does not fit the model. StateError: the
        model is patched already. UnsupportedModelError: the model cannot be entered; the message
        says what was looked for and found.
    """
    if not isinstance(config, MethodConfig):
        raise ConfigError(
            f"patch needs a method config; found {config!r}. Pass for example "
            "AHNConfig(sliding_window=1024); "
            "memretrofit.available_methods() lists all."
        )
    method = sys.modules[type(config).__module__]
    getattr(method, f"patch_{config.method}")(model, config)
    return model


def unpatch(model: Model) -> Model:
    """Take the memory off: the same modules by identity, the same state dict bit for bit.

    Raises:
        StateError: the model is not patched.
    """
    detach(model)
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `model`, or the model inside a PEFT wrapper, carries a memory."""
    return hasattr(unwrapped(model), ATTRIBUTE)


@contextmanager
def patched_for_now(model: PreTrainedModel, config: MethodConfig) -> Iterator[None]:
    """`model` patched with `config` inside, as it was afterwards. See `patch` for errors."""
    patch(model, config)
    try:
        yield
    finally:
        unpatch(model)


def patched_config(model: nn.Module) -> MethodConfig:
    """The config that `model` was patched with."""
    return ledger_of(model).config


def memory_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that the patch added, by their names in `model`."""
    ledger = ledger_of(model)
    return {
        f"{name}.memory.{inner}": parameter
        for name, seam in ledger.seams.items()
        for inner, parameter in seam.memory.named_parameters()
    }


def describe(model: nn.Module) -> str:
    """A table: per layer what was patched and added; of memories in attention and between segments
    the cache's bytes before and after at four lengths, of banks their tables and where they lie.
    """
    from memretrofit.bank_description import render_bank
    from memretrofit.description import render
    from memretrofit.patching.segment_visit import SegmentLedger
    from memretrofit.patching.surgery import attention_ledger_of
    from memretrofit.segment_description import render_segments
    from memretrofit.vocabulary_description import render_vocabulary

    ledger = ledger_of(model)
    if isinstance(ledger, BankLedger):
        return render_bank(model, ledger)
    if isinstance(ledger, VocabularyLedger):
        return render_vocabulary(model, ledger)
    if isinstance(ledger, SegmentLedger):
        return render_segments(model, ledger)
    return render(model, attention_ledger_of(model))
