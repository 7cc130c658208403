"""Switches of one patched model, and the context managers that set them: what every honest report
compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

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
    silenced: bool = False
    """Whether attention is over sinks and window alone, with nothing read from a memory."""
    carried: Cache | None = None
    """Whose memory states the rows of a new cache begin with."""
    window: tuple[int, int] | None = None
    """Another (sliding_window, num_sink_tokens) for forwards without a cache."""
    routes: Tensor | None = None
    """[depth] or [B, depth]: where conversations that begin now read a bank; -1 abstains."""
    intercept: Callable[[Any], tuple[Tensor, Tensor | None]] | None = None
    """Called with the attention call instead of attention (attention transfer, probes)."""
    active: list[dict[str, Any]] = field(default_factory=list)
    """What each open context set, oldest first. A later one wins."""

    def settle(self) -> None:
        """Set every switch to its default, then to what the open contexts ask for."""
        for switch in fields(self):
            if switch.name != "active":
                setattr(self, switch.name, switch.default)
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
    ledger = getattr(model, ATTRIBUTE)
    if idle := sorted(set(values) - ledger.heeds):
        raise StateError(
            f"{', '.join(idle)}: {type(model).__name__} is patched with {ledger.config}, to which "
            f"that means nothing. It heeds {', '.join(sorted(ledger.heeds))}."
        )
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


def memory_silenced(model: PreTrainedModel):
    """Inside, nothing is remembered: attention is over sinks and window, a segment is read as if it
    were a text's first, a bank adds nothing, a vocabulary has no new class.

    What an attention memory did not write inside, its cache does not know afterwards.
    """
    return _set(model, silenced=True)


def state_carried(model: PreTrainedModel, cache: Cache):
    """Inside, every new cache begins with the memory states that the rows of `cache` hold: what
    happens when a memory is not reset between two texts. `cache` itself does not change.
    """
    return _set(model, carried=cache)


def state_shuffled(model: PreTrainedModel):
    """Inside, row b reads the state that row b + 1 of the batch wrote (the last row reads the
    first's).

    What survives this is a general correction; what is lost was memory of the row's own text. With
    left padding, row b reads what row b + 1 had written as far from the end.

    A memory between segments writes what it has read: after as many segments as there are rows, a
    row meets its own text again. Read all but the last segment outside, as tasks do.
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


def route_pinned(model: PreTrainedModel, routes: Tensor):
    """Inside, conversations that begin read the bank at `routes` [depth] or [B, depth] (the number
    of the child at each level; -1 abstains), whatever their text. A conversation that began
    elsewhere is refused.

    Raises:
        ConfigError: `routes` is no such tensor of integers.
    """
    whole = isinstance(routes, Tensor) and not routes.is_floating_point()
    if not whole or routes.ndim not in (1, 2) or not len(routes):
        raise ConfigError(
            f"route_pinned needs integers [depth] or [B, depth]; found {routes!r}. -1 abstains."
        )
    return _set(model, routes=routes)


def intercepted(model: PreTrainedModel, function: Callable[[Any], tuple[Tensor, Tensor | None]]):
    """Inside, `function(call)` runs in the place of attention in every patched module."""
    return _set(model, intercept=function)
