"""The vocabulary seam: tokens behind a model's vocabulary, without resizing anything.

A vocabulary of V tokens is followed by n open rows, the ids V to V + n - 1. A hook on the input
embedding gives such an id its row, in the scale that the module gives its own rows; a hook on the
head puts n classes behind its logits. With no row open both let everything pass: not classes of
-inf, but none, because a draw or a sum over more numbers than the base model's is another one, and
because some models bend their logits after the head.

`config.vocab_size` and all weights stay the base model's. What Transformers computes from that
number is told the number of classes: the loss, `generate` and `compute_transition_scores`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.errors import StateError, UnsupportedModelError
from memretrofit.modules.vocabulary_rows import VocabularyRows
from memretrofit.patching.controls import ATTRIBUTE
from memretrofit.patching.ledger import Ledger, ledger_of, refuse_patched
from memretrofit.patching.seats import Seat, placed
from memretrofit.patching.sites import set_config
from memretrofit.patching.wrapping import evaluating, named_arguments, unwrapped

MEASURED = 64
"""Rows from which the scale of an embedding is measured."""
MakeRows = Callable[[Tensor, Tensor], VocabularyRows]
"""From the weights of the input embedding [V, E] and of the head [V, E]."""


@dataclass(eq=False)
class VocabularyLedger(Ledger):
    """What rows behind the vocabulary added to a model."""

    heeds = frozenset({"disabled", "silenced"})
    """Silenced, no new class is there; the new ids are still embedded."""

    memory: VocabularyRows = field(kw_only=True)
    vocab_size: int = field(kw_only=True)
    scale: float = field(kw_only=True)
    """What the input embedding multiplies its rows by."""

    @property
    def classes(self) -> int:
        """Classes behind the vocabulary, as the switches are now."""
        off = self.controls.disabled or self.controls.silenced
        return 0 if off else self.memory.count

    def closed(self) -> list[nn.Parameter]:
        """Rows that wait, and those of procedures that were learned earlier."""
        return self.memory.closed


def open_procedures(model: nn.Module, count: int | None = None) -> Tensor:
    """Let the model emit its first `count` procedures, None for all, and return the ids of the new
    ones [n]. The rows of these train, and no other row does.

    Raises:
        ConfigError: fewer than are open, or more than there are. StateError: the model is not
        patched, or with another memory.
    """
    ledger = vocabulary_ledger_of(model)
    before = ledger.memory.count
    ledger.memory.open(len(ledger.memory.rows) if count is None else count)
    return procedure_ids(model)[before:]


def procedure_ids(model: nn.Module) -> Tensor:
    """The token ids [n] of the open procedures, in order, on the CPU. No tokenizer knows them: put
    them between tokens yourself, and drop ids from the first of them on before you decode.

    Raises:
        StateError: the model is not patched, or with another memory.
    """
    ledger = vocabulary_ledger_of(model)
    return torch.arange(ledger.vocab_size, ledger.vocab_size + ledger.memory.count)


def renormalise_procedures(model: nn.Module) -> None:
    """Bring the rows that train to the mean length of the other open ones, after a step of an
    optimizer. See `modules.vocabulary_rows.renormalised`.

    Raises:
        StateError: the model is not patched, or with another memory.
    """
    vocabulary_ledger_of(model).memory.renormalise()


def vocabulary_ledger_of(model: Any) -> VocabularyLedger:
    """What rows behind the vocabulary added to a patched model, or to the one in a PEFT wrapper.

    Raises:
        StateError: the model is not patched, or with a memory of another family.
    """
    ledger = ledger_of(unwrapped(model))
    if not isinstance(ledger, VocabularyLedger):
        raise StateError(
            f"This {type(model).__name__} is patched with {ledger.config}, and what was asked is "
            "about tokens behind the vocabulary, such as those of tokmem."
        )
    return ledger


def patch_vocabulary(model: PreTrainedModel, config: MethodConfig, make: MakeRows) -> None:
    """Put the rows that `make` builds behind the vocabulary, none of them open. All or nothing.

    Raises:
        StateError: the model is patched already.
        UnsupportedModelError: the model has no table of input embeddings, or no head of as many
            classes, or does more with them than scale.
    """
    refuse_patched(model)
    name, embedding, head = _tables_of(model)
    scale = _scale_of(model, embedding)
    _check_passes(model, head)
    memory = placed(make(embedding.weight, head.weight), embedding)
    ledger = VocabularyLedger(
        config, memory=memory, vocab_size=embedding.weight.shape[0], scale=scale
    )
    ledger.seams = {name: Seat(memory, None, embedding)}
    embedding.memory = memory
    embed = _Embed(ledger)
    ledger.handles += [
        embedding.register_forward_pre_hook(embed.before, with_kwargs=True),
        embedding.register_forward_hook(embed.after),
        head.register_forward_hook(_Classify(ledger)),
    ]
    loss = functools.partial(_loss, model.loss_function)
    ledger.replace_method(model, "_loss_function", loss)
    ledger.replace_method(
        model, "resize_token_embeddings", functools.partial(_refuse_to_resize, model)
    )
    for method in ("generate", "compute_transition_scores"):
        if hasattr(model, method):
            counting = functools.partial(_counting, model, getattr(model, method))
            functools.update_wrapper(counting, getattr(model, method))
            ledger.replace_method(model, method, counting)
    setattr(model, ATTRIBUTE, ledger)


_given: ContextVar[Tensor | None] = ContextVar("memretrofit_new_ids", default=None)


@dataclass(eq=False)
class _Embed:
    """The hooks of the input embedding."""

    ledger: VocabularyLedger

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Let the module embed known ids alone."""
        _given.set(None)
        ids = args[0] if args else next(iter(kwargs.values()))
        size = self.ledger.vocab_size
        if not bool((ids >= size).any()):
            return None
        opened = 0 if self.ledger.controls.disabled else self.ledger.memory.count
        if bool((ids >= size + opened).any()):
            raise StateError(
                f"Token id {int(ids.max())} was given, and the ids of this model end at "
                f"{size + opened - 1}: a vocabulary of {size}, and {opened} open procedures. "
                "Open more with open_procedures; inside memory_disabled there are none."
            )
        _given.set(ids)
        known = ids.clamp(max=size - 1)
        if args:
            return (known, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): known}

    def after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Give the new ids their rows."""
        ids = _given.get()
        _given.set(None)
        if ids is None:
            return None
        size = self.ledger.vocab_size
        rows = self.ledger.memory()[0] * self.ledger.scale
        found = rows[(ids - size).clamp(min=0)].to(output.dtype)
        return torch.where((ids >= size)[..., None], found, output)


@dataclass(eq=False)
class _Classify:
    """The hook of the head."""

    ledger: VocabularyLedger

    def __call__(self, head: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not self.ledger.classes:
            return None
        (hidden,) = args
        rows = self.ledger.memory()[1].to(hidden)
        return torch.cat([output, F.linear(hidden, rows).to(output.dtype)], dim=-1)


def _loss(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own loss over the classes that the logits have."""
    call = named_arguments(original, args, kwargs)
    return original(**{**call, "vocab_size": call["logits"].shape[-1]})


def _counting(model: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`original`, which believes `config.vocab_size`, with the number of classes there."""
    ledger, config = vocabulary_ledger_of(model), model.config
    set_config(model, _wider(config, ledger.vocab_size + ledger.classes))
    try:
        with ledger.memory.held():
            return original(*args, **kwargs)
    finally:
        set_config(model, config)


def _wider(config: Any, classes: int) -> Any:
    """A config that shares all attributes of `config` but the size of the vocabulary."""
    text = config.get_text_config(decoder=True)
    body: dict[str, Any] = {"__module__": type(config).__module__}
    if text is config:
        body["vocab_size"] = property(lambda _: classes)
    else:
        wider = _wider(text, classes)
        body["get_text_config"] = lambda *_, **__: wider
    view = object.__new__(type(type(config).__name__, (type(config),), body))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


def _refuse_to_resize(model: Any, *args: Any, **kwargs: Any) -> Any:
    raise StateError(
        f"The ids behind the vocabulary of this {type(model).__name__} are procedures, so it "
        "cannot be resized. Call memretrofit.unpatch(model) first."
    )


def _tables_of(model: PreTrainedModel) -> tuple[str, Any, Any]:
    """The name of the input embedding, the embedding, and the head."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"memretrofit patches Transformers models; found {type(model).__name__}. Pass the "
            "model that from_pretrained returned, and put PEFT around it afterwards."
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    shapes = [getattr(getattr(x, "weight", None), "shape", None) for x in (embedding, head)]
    if None in shapes or embedding not in names or shapes[0][0] != shapes[1][0]:  # type: ignore[index]
        found = ", ".join("none" if shape is None else str(list(shape)) for shape in shapes)
        raise UnsupportedModelError(
            f"{type(model).__name__} needs a table of input embeddings [V, E] and a head of V "
            f"classes, behind which tokens can be put; found {found}. Pass a causal language model "
            "(AutoModelForCausalLM)."
        )
    return names[embedding], embedding, head


@torch.no_grad()
def _scale_of(model: PreTrainedModel, embedding: Any) -> float:
    """What the embedding multiplies its rows by, measured."""
    weight = embedding.weight
    ids = torch.arange(min(len(weight), MEASURED), device=weight.device)
    rows, found = weight[ids], embedding(ids)
    if weight.is_meta or torch.equal(rows, found):  # without numbers there is none to measure
        return 1.0
    if found.shape == rows.shape:
        rows, found = rows.double(), found.double()
        scale = float((rows * found).sum() / rows.square().sum())
        rounding = 4 * torch.finfo(weight.dtype).eps
        if torch.allclose(found, scale * rows, rtol=rounding, atol=0.0):
            return scale
    raise UnsupportedModelError(
        f"The input embedding of {type(model).__name__} does more than look its rows up and "
        "scale them, so a new token's row cannot take the place of its output."
    )


def _check_passes(model: PreTrainedModel, head: nn.Module) -> None:
    """Whether a class behind those of the head arrives behind those of the logits."""
    calls: list[tuple] = []

    def widen(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        calls.append(args)
        return F.pad(output, (0, 1))

    handle = head.register_forward_hook(widen)
    device = next(model.parameters()).device
    try:
        with evaluating(model), torch.no_grad():
            ids = torch.zeros(1, 2, dtype=torch.long, device=device)
            found = model(input_ids=ids, use_cache=True).logits.shape[-1]
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run on two token ids: {error}"
        ) from error
    finally:
        handle.remove()
    if [len(args) for args in calls] != [1] or found != head.weight.shape[0] + 1:  # type: ignore
        raise UnsupportedModelError(
            f"{type(model).__name__} does not return what its head says: one class was put behind "
            f"{head.weight.shape[0]}, and {found} came out of {len(calls)} calls of the head."  # type: ignore
        )
