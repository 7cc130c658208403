"""Switches of one patched model, and the context managers that set them: what every honest report
compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from memretrofit.errors import ConfigError, StateError

ATTRIBUTE = "memretrofit_patch"
"""Where a patched model keeps its ledger."""


@dataclass
class Controls:
    """How the memories of one model behave right now. Every field's default is normal operation.

    They belong to the model, not to a thread: do not generate in one thread while another measures.
    """

    disabled: bool = False
    """Run the base model's full attention."""
    writes: bool = True
    """Whether anything is folded."""
    shuffled: bool = False
    """Whether each row reads the state that the next row wrote."""
    window: tuple[int, int] | None = None
    """Another (sliding_window, num_sink_tokens) for forwards without a cache."""
    intercept: Callable[[Any], tuple[Tensor, Tensor | None]] | None = None
    """Called with the attention call instead of attention (attention transfer, probes)."""
    active: list[dict[str, Any]] = field(default_factory=list)
    """What each open context set, oldest first. A later one wins."""

    def settle(self) -> None:
        """Set every switch to its default, then to what the open contexts ask for."""
        for name in ("disabled", "writes", "shuffled", "window", "intercept"):
            setattr(self, name, getattr(type(self), name))
        for values in self.active:
            for name, value in values.items():
                setattr(self, name, value)


def controls(model: PreTrainedModel) -> Controls:
    """The switches of a patched model.

    Raises:
        StateError: the model is not patched.
    """
    ledger = getattr(model, ATTRIBUTE, None)
    if ledger is None:
        raise StateError(
            f"{type(model).__name__} is not patched, so it has no memory to control. Call "
            "memretrofit.patch(model, config)."
        )
    return ledger.controls


@contextmanager
def _set(model: PreTrainedModel, **values: Any) -> Iterator[None]:
    switches = controls(model)
    switches.active.append(values)
    switches.settle()
    try:
        yield
    finally:
        # by identity: contexts that overlap without nesting must not leave each other switched on
        switches.active = [entry for entry in switches.active if entry is not values]
        switches.settle()


def memory_disabled(model: PreTrainedModel):
    """Inside, the model is the base model with full attention, bit for bit; the same weights
    serve as teacher.
    """
    return _set(model, disabled=True)


def writes_disabled(model: PreTrainedModel):
    """Inside, nothing is folded: what remains is sinks and window."""
    return _set(model, writes=False)


def state_shuffled(model: PreTrainedModel):
    """Inside, row b reads the state that row b + 1 of the batch wrote (the last row reads the
    first's).

    What survives this is a general correction; what is lost was memory of the row's own text.
    Rows must have no padding.
    """
    return _set(model, shuffled=True)


def window_override(model: PreTrainedModel, *, sliding_window: int, num_sink_tokens: int):
    """Inside, forwards without a cache use another window.

    Raises:
        ConfigError: a window below 1 or a negative number of sinks.
    """
    if sliding_window < 1 or num_sink_tokens < 0:
        raise ConfigError(
            "window_override needs sliding_window >= 1 and num_sink_tokens >= 0; found "
            f"{sliding_window} and {num_sink_tokens}."
        )
    return _set(model, window=(sliding_window, num_sink_tokens))


def intercepted(model: PreTrainedModel, function: Callable[[Any], tuple[Tensor, Tensor | None]]):
    """Inside, `function(call)` runs in the place of attention in every patched module."""
    return _set(model, intercept=function)
