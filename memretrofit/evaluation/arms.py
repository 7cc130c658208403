"""The arms of an honest report: one patched model, made into each thing it is compared with.

Every arm is a function that returns a context manager, as `compare_arms` takes it. No arm is a
second copy of the weights.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memretrofit.evaluation.arm_table import ARMS
from memretrofit.evaluation.likelihood import Arm
from memretrofit.hub.adapter import is_peft
from memretrofit.patching.controls import (
    intercepted,
    memory_disabled,
    memory_silenced,
    state_shuffled,
    writes_disabled,
)
from memretrofit.patching.ledger import detach, ledger_of
from memretrofit.patching.segment_visit import SegmentLedger
from memretrofit.patching.surgery import attention_ledger_of
from memretrofit.patching.wrapping import unwrapped
from memretrofit.retrofit import memory_parameters, patch


def arms_of(model: PreTrainedModel, untrained: Mapping[str, Tensor]) -> dict[str, Arm]:
    """The arms of `memretrofit.evaluation.ARMS` that a patched and trained model has.

    `full` is the base model; `window` its own attention over sinks and window, without any of the
    memory's code; `untrained` the memory with the values of a fresh patch; `trained` the model as
    it stands; `zeroed` the same where each segment is read alone; `no_write` where nothing is
    folded; `shuffled` where every row reads the state of the next row. A model has `window` if its
    memory has one, and else `zeroed`.
    """
    silent: dict[str, Arm] = (
        {"window": partial(intercepted, model, lambda call: (call.near(), None))}
        if has_window(model)
        else {"zeroed": partial(memory_silenced, model)}
    )
    arms: dict[str, Arm] = {
        "full": partial(_base, model),
        "untrained": partial(memory_values, model, untrained),
        "trained": nullcontext,
        "no_write": partial(writes_disabled, model),
        "shuffled": partial(state_shuffled, model),
    } | silent
    return {name: arms[name] for name in ARMS if name in arms}


def has_window(model: Any) -> bool:
    """Whether what the memory stands beside is attention over a sliding window."""
    return "window" in ledger_of(model).heeds


def holds_state(model: Any) -> bool:
    """Whether the memory of a patched model carries anything.

    Raises:
        StateError: it is of a family that no task is asked of.
    """
    ledger = ledger_of(model)
    if isinstance(ledger, SegmentLedger):
        return bool(ledger.begin(0))
    seams = attention_ledger_of(model).seams.values()
    return any(seam.memory.state_nbytes(1) for seam in seams)


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
    inner: Any = unwrapped(model)
    shared = {id(x): x for x in itertools.chain(inner.parameters(), inner.buffers())}
    twin = copy.deepcopy(inner, shared)  # the very weights, and modules of its own
    config = ledger_of(twin).config
    detach(twin)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {name: p.data for name, p in memory_parameters(patch(twin, config)).items()}
