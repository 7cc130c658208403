"""The FFN seam: rows that are looked up from the tokens are added at a decoder's FFNs, or before
its layers.

Per forward of the decoder: a pre-hook finds the conversation's history in the cache, joins the new
tokens to it and lets the bank look them up; a hook on each patched FFN adds what that layer's read
makes of it (or a pre-hook on the layer, before attention); the last hook stores the history in the
cache. Where a read adds nothing, the original output goes on as it is.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from memretrofit.config import MethodConfig
from memretrofit.errors import NoTargetError, StateError, UnsupportedModelError
from memretrofit.modules.bank import (
    PAD,
    BankRead,
    MemoryBank,
    Read,
    Tokens,
    is_real,
)
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.patching.controls import ATTRIBUTE
from memretrofit.patching.ffn_sites import BankSite, decoder_of, find_bank_sites, hidden_of
from memretrofit.patching.generating import refuse_continuous_batching, uncompiled
from memretrofit.patching.history import (
    History,
    adopt,
    history_of,
    real_ids,
    refuse_packing,
    same_routes,
)
from memretrofit.patching.ledger import Ledger, ledger_of, refuse_patched
from memretrofit.patching.seats import Seat, model_spec, placed
from memretrofit.patching.wrapping import named_arguments

Place = Literal["ffn", "layer"]
ChooseLayers = Callable[[int], tuple[int, ...]]
"""From the number of layers to the indices of those that get a read."""


@dataclass(eq=False)
class BankLedger(Ledger):
    """What a bank added to a model."""

    heeds = frozenset({"disabled", "silenced", "shuffled", "routes"})

    bank: MemoryBank = field(kw_only=True)
    sites: list[BankSite] = field(kw_only=True)
    seams: dict[str, Seat] = field(default_factory=dict)
    owner: str = field(default_factory=lambda: uuid.uuid4().hex)


def bank_of(model: PreTrainedModel) -> MemoryBank:
    """The bank of a patched model.

    Raises:
        StateError: the model is not patched, or with a memory of another family.
    """
    ledger = ledger_of(model)
    if not isinstance(ledger, BankLedger):
        raise StateError(
            f"This {type(model).__name__} is patched with {ledger.config}, and what was asked is "
            "about banks, such as hierarchical_ffn or engram."
        )
    return ledger.bank


@dataclass(eq=False)
class _Visit:
    """One forward of a decoder."""

    ledger: BankLedger
    found: Any
    real: Tensor
    """[B, T] bool."""
    history: History
    ids: Tensor
    kept: dict[str, Tensor] = field(default_factory=dict)


_current: ContextVar[_Visit | None] = ContextVar("memretrofit_bank_visit", default=None)


def patch_banks(
    model: PreTrainedModel,
    config: MethodConfig,
    make_bank: Callable[[ModelSpec], MemoryBank],
    make_read: Callable[[ModelSpec, int, int], BankRead],
    *,
    place: Place,
    choose: ChooseLayers,
) -> None:
    """Stand a bank beside the model and give each chosen layer a read. All or nothing.

    Args:
        make_read: called with the layer's index and its number among the chosen ones.
        place: `ffn` adds to the output of the layer's FFN, `layer` to the input of the layer.
        choose: layers, unless `config.layers_to_transform` names them.

    Raises:
        StateError: the model is patched already.
        UnsupportedModelError: no layer can be entered, or one that was asked for cannot.
        NoTargetError: `layers_to_transform` names a layer that does not exist.
    """
    refuse_patched(model)
    name, decoder = decoder_of(model)
    sites = find_bank_sites(model, place)
    count = 1 + max(site.layer_idx for site in sites)
    wanted = getattr(config, "layers_to_transform", None)
    chosen = _chosen(model, sites, choose(count) if wanted is None else wanted)
    spec = model_spec(model, count, tuple(site.layer_idx for site in chosen))
    # whatever can fail comes first: nothing is attached yet
    bank = placed(make_bank(spec), model.get_input_embeddings())
    reads = [
        (site, placed(make_read(spec, site.layer_idx, number), site.module))
        for number, site in enumerate(chosen)
    ]
    ledger = BankLedger(config, bank=bank, sites=sites)
    ledger.seams = {name: Seat(bank, None, decoder)}
    ledger.seams |= {site.name: Seat(read, site.layer_idx, site.module) for site, read in reads}
    decoder.memory = bank
    ledger.handles += [
        decoder.register_forward_pre_hook(_Look(ledger), with_kwargs=True),
        decoder.register_forward_hook(_leave, with_kwargs=True, always_call=True),
    ]
    for site, read in reads:
        site.module.memory = read
        hook = _Add(site.name, read)
        ledger.handles.append(
            site.module.register_forward_hook(hook.to_output, with_kwargs=True)
            if place == "ffn"
            else site.module.register_forward_pre_hook(hook.to_input, with_kwargs=True)
        )
    refuse_continuous_batching(model, ledger)
    setattr(model, ATTRIBUTE, ledger)


@dataclass(eq=False)
class _Look:
    """The decoder's pre-hook: look the new tokens up."""

    ledger: BankLedger

    @uncompiled()
    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        _current.set(None)
        switches = self.ledger.controls
        if switches.disabled:
            return
        kwargs = named_arguments(decoder.forward, args, kwargs)
        ids = kwargs.get("input_ids")
        if ids is None:
            raise UnsupportedModelError(
                "A bank is looked up by token ids, and this forward was given inputs_embeds. Pass "
                "input_ids, or run inside memretrofit.memory_disabled(model)."
            )
        if torch.is_grad_enabled() and getattr(decoder, "gradient_checkpointing", False):
            raise UnsupportedModelError(
                "Gradient checkpointing runs a layer again when what its tokens looked up is gone. "
                "Turn it off: of a frozen model only the layers above the first read keep "
                "activations."
            )
        cache = next((x for x in kwargs.values() if isinstance(x, Cache)), None)
        history = History(self.ledger.owner)
        if cache is not None:
            history = history_of(cache, self.ledger.owner)
        if switches.routes is not None and not self.ledger.bank.has_routes:
            raise StateError(
                f"route_pinned: the bank of {self.ledger.config} has no routes. Leave it out."
            )
        _pin(history, switches.routes, len(ids))
        new = real_ids(ids, kwargs.get("attention_mask"), len(history))
        refuse_packing(new != PAD, kwargs.get("position_ids"))
        before = history.reached(self.ledger.bank.reach)
        joined = new if before is None else torch.cat([before, new], dim=1)
        looked = joined.roll(-1, dims=0) if switches.shuffled else joined
        tokens = Tokens(ids=looked, new=new.shape[1], routes=history.routes)
        found = None if switches.silenced else self.ledger.bank(tokens)
        _current.set(_Visit(self.ledger, found, is_real(tokens), history, new))


def _pin(history: History, routes: Tensor | None, rows: int) -> None:
    if routes is not None and routes.ndim == 2:
        if rows % len(routes):
            raise StateError(
                f"{len(routes)} routes were pinned for a batch of {rows} rows. Pin one route "
                "[depth] for all, or one for each row [B, depth]."
            )
        # beams are rows beside each other
        routes = routes.repeat_interleave(rows // len(routes), dim=0)
    routes = routes if routes is None else routes.expand(rows, -1)
    if len(history) and not same_routes(history.routes, routes):
        raise StateError(
            "This conversation began under another route, and its keys were computed with those "
            "rows. Begin a new one: past_key_values=None."
        )
    history.routes = routes


@uncompiled()
def _leave(decoder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
    """The decoder's last hook, called also when its forward raised: remember the tokens."""
    visit = _current.get()
    _current.set(None)
    if visit is None or output is None:
        return
    cache = output.get("past_key_values") if hasattr(output, "get") else None
    if cache is None:
        cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    if cache is None:
        return
    _remember(cache, visit)


def _remember(cache: Cache, visit: _Visit) -> None:
    history = visit.history
    history.append(visit.ids)
    for name, columns in visit.kept.items():
        history.keep(name, columns)
    adopt(cache, history)  # the forward may have made it itself


@dataclass(eq=False)
class _Add:
    """The hook of one patched module."""

    name: str
    read: BankRead

    @uncompiled()
    def to_output(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        """Add to the FFN's output; a tuple's first entry is the hidden states."""
        visit = _current.get()
        if visit is None or visit.found is None:
            return None
        read = self._read(visit, hidden_of(args, kwargs))
        if read.added is None:
            return None
        if isinstance(output, tuple):
            return (_sum(output[0], read), *output[1:])
        return _sum(output, read)

    @uncompiled()
    def to_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Add to the layer's input."""
        visit = _current.get()
        if visit is None or visit.found is None:
            return None
        hidden = hidden_of(args, kwargs)
        read = self._read(visit, hidden)
        if read.added is None:
            return None
        new = _sum(hidden, read)
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    def _read(self, visit: _Visit, hidden: Tensor) -> Read:
        past = visit.history.past(self.name, self.read.history) if self.read.history else None
        read = self.read(hidden, visit.found, past)
        if read.kept is not None:
            visit.kept[self.name] = read.kept.detach() * visit.real[..., None]
        return read


def _sum(original: Tensor, read: Read) -> Tensor:
    """`original` plus what was read; elsewhere the very bits of `original`."""
    assert read.added is not None
    added = read.added.to(original.dtype).view(original.shape)
    if read.where is None:
        return original + added
    where = read.where.reshape(*original.shape[:-1], 1)
    return torch.where(where, original + added, original)


def _chosen(
    model: PreTrainedModel, sites: list[BankSite], wanted: tuple[int, ...]
) -> list[BankSite]:
    by_layer = {site.layer_idx: site for site in sites}
    missing = sorted(set(wanted) - set(by_layer))
    if missing:
        raise NoTargetError(
            f"layers_to_transform={wanted}: {type(model).__name__} cannot be entered in layers "
            f"{missing}; it can in {sorted(by_layer)}."
        )
    return [by_layer[index] for index in sorted(set(wanted))]
