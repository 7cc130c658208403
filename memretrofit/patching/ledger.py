"""What a patch added to a model, and what was there before: so that it can be taken off again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.errors import StateError
from memretrofit.patching.controls import ATTRIBUTE, Controls
from memretrofit.patching.sites import set_config
from memretrofit.patching.wrapping import unwrapped

ABSENT = "absent"
"""In a ledger: nothing stood there."""


@dataclass(eq=False)
class Ledger:
    """The part that every family of memories has."""

    heeds: ClassVar[frozenset[str]]
    """The switches of `Controls` that mean something to the family."""
    config: MethodConfig
    controls: Controls = field(default_factory=Controls)
    seams: dict[str, Any] = field(default_factory=dict)
    """By the name of the module that carries a memory: an object with that `memory`."""
    configs: dict[nn.Module, Any] = field(default_factory=dict)
    handles: list[RemovableHandle] = field(default_factory=list)
    methods: dict[str, Any] = field(default_factory=dict)
    """What stood in the model's own `__dict__` where a method of it was replaced; `ABSENT` if
    nothing did.
    """

    def closed(self) -> list[nn.Parameter]:
        """Parameters of the memory that must not train as it stands."""
        return []

    def replace_method(self, model: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Let `function` answer for the method `name` of `model` until it is unpatched."""
        self.methods.setdefault(name, vars(model).get(name, ABSENT))
        setattr(model, name, function)


def refuse_patched(model: PreTrainedModel) -> None:
    """One model carries one memory.

    Raises:
        StateError: the model is patched already.
    """
    ledger = getattr(model, ATTRIBUTE, None)
    if ledger is not None:
        raise StateError(
            f"This {type(model).__name__} is patched already ({ledger.config}). "
            "Call memretrofit.unpatch(model) first; one model carries one memory."
        )


def refuse_other_owner(found: str, owner: str) -> None:
    """A cache goes on with the patch that began it.

    Raises:
        StateError: `found` began it, and `owner` would go on.
    """
    if found != owner:
        raise StateError(
            "This cache belongs to a conversation of another patched model (or of an earlier "
            "patch). Start with a fresh cache: past_key_values=None."
        )


def ledger_of(model: nn.Module) -> Ledger:
    """What was added to a patched model.

    Raises:
        StateError: the model is not patched.
    """
    ledger = getattr(model, ATTRIBUTE, None)
    if ledger is None:
        raise StateError(
            f"This {type(model).__name__} is not patched. Call memretrofit.patch(model, config) "
            "first."
        )
    return ledger


def detach(model: PreTrainedModel) -> None:
    """Undo a patch: the model holds the very objects that it held before.

    Raises:
        StateError: the model is not patched.
    """
    model = unwrapped(model)
    ledger = ledger_of(model)
    for handle in ledger.handles:
        handle.remove()
    for name in ledger.seams:
        del model.get_submodule(name).memory
    for module, held in ledger.configs.items():
        set_config(module, held)
    for name, held in ledger.methods.items():
        model.__dict__.pop(name, None)
        if held is not ABSENT:
            setattr(model, name, held)
    delattr(model, ATTRIBUTE)
