"""The arms of an honest report: one patched model, made into each thing it is compared with.

Every arm is a function that returns a context manager, as `compare_arms` takes it. No arm is a
second copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memretrofit.evaluation.likelihood import Arm
from memretrofit.hub.adapter import is_peft
from memretrofit.patching.controls import (
    intercepted,
    memory_disabled,
    state_shuffled,
    writes_disabled,
)
from memretrofit.patching.surgery import attention_ledger_of
from memretrofit.retrofit import memory_parameters


def arms_of(model: PreTrainedModel, untrained: Mapping[str, Tensor]) -> dict[str, Arm]:
    """The six arms of `memretrofit.evaluation.ARMS` for a patched and trained model.

    `full` is the base model; `window` its own attention over sinks and window, without any of the
    memory's code; `untrained` the memory with the values of a fresh patch; `trained` the model as
    it stands; `no_write` the same with nothing folded; `shuffled` the same with every row reading
    the state of the next row.
    """
    return {
        "full": partial(_base, model),
        "window": partial(intercepted, model, lambda call: (call.near(), None)),
        "untrained": partial(memory_values, model, untrained),
        "trained": nullcontext,
        "no_write": partial(writes_disabled, model),
        "shuffled": partial(state_shuffled, model),
    }


@contextmanager
def _base(model: Any) -> Iterator[None]:
    with memory_disabled(model), model.disable_adapter() if is_peft(model) else nullcontext():
        yield


@contextmanager
def memory_values(model: PreTrainedModel, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the memory parameters have `values`; afterwards their own again."""
    parameters = memory_parameters(model)
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name]
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


def fresh_values(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """The memory parameters that a fresh patch of this model with this config would have.

    Nothing about the model changes, nor about the random state of torch.
    """
    ledger = attention_ledger_of(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {
            f"{site.name}.memory.{name}": parameter.data.to(ledger.device_of(site))
            for site in ledger.sites
            if site.name in ledger.seams
            for name, parameter in ledger.make_memory(site).named_parameters()
        }
