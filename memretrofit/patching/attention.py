"""The attention seam: one function that Transformers calls in the place of `sdpa` or `eager`.

Per patched module and forward: a pre-hook finds the cache and notes the hidden states; the module
projects, rotates and updates the cache as always and calls `memory_attention`; queries are
processed in blocks against sinks + window + block; what leaves the window is folded into the
state; the state is stored. Nothing here is T x T. While nothing has left the window, the base
model's own function runs with its own arguments.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from contextvars import Token
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from memretrofit.errors import StateError, UnsupportedModelError
from memretrofit.modules.memory import AttentionMemory
from memretrofit.patching.cache import MemoryLayer, upgrade
from memretrofit.patching.config_view import base_implementation
from memretrofit.patching.controls import Controls
from memretrofit.patching.generating import Current, uncompiled
from memretrofit.patching.masks import padding_alone, rebuild_base_mask
from memretrofit.patching.rotary import Rotary
from memretrofit.patching.sites import probe


class Owner:
    """Whose state a cache holds. A copy of a model is another owner; a copy of a cache is not."""

    def __init__(self) -> None:
        self.key = uuid.uuid4().hex

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        memo[id(self)] = copy = Owner()
        return copy


@dataclass(eq=False)
class Seam:
    """One patched attention module: its memory, its model's switches, and the hooks around its
    forward.
    """

    memory: AttentionMemory
    controls: Controls
    owner: Owner
    layer_idx: int
    rotary: Rotary | None

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Pre-hook: find the conversation's state and note what the attention function will not
        be given.
        """
        if self.controls.disabled:
            return
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        one = hidden.shape[1] == 1
        if torch.compiler.is_compiling() and not (one and self.memory.traceable):
            self._enter_uncompiled(hidden, args, kwargs)
        else:
            self._enter(hidden, args, kwargs)

    def _enter(self, hidden: Tensor, args: tuple, kwargs: dict[str, Any]) -> None:
        cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
        layer = (
            None if cache is None else upgrade(cache, self.layer_idx, self.memory, self.owner.key)
        )
        if layer is not None:
            layer.attending = True
            if self.controls.carried is not None and not layer.seen:
                layer.begin_with(self.controls.carried.layers[self.layer_idx])
        visit = _Visit(self, hidden, layer, kwargs.get("position_embeddings"))
        visit.token = _current.enter(visit)

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook, called also when the module's forward raised."""
        if torch.compiler.is_compiling() and _current.traced is None:
            self._leave_uncompiled()
        else:
            self._leave()

    def _leave(self) -> None:
        visit = _current.get()
        if visit is not None and visit.seam is self:
            _current.leave(visit.token)
            if visit.layer is not None:
                visit.layer.attending = False

    _enter_uncompiled, _leave_uncompiled = uncompiled()(_enter), uncompiled()(_leave)


@dataclass(eq=False)
class _Visit:
    """What the pre-hook of one forward of a patched module saw."""

    seam: Seam
    hidden: Tensor
    layer: MemoryLayer | None
    position_embeddings: Any
    token: Token[_Visit | None] | _Visit | None = None


_current: Current[_Visit] = Current("memretrofit_visit")


@dataclass(eq=False, frozen=True, kw_only=True)
class AttentionCall:
    """One call of a patched module's attention: what the hook saw, and what attention was given."""

    seam: Seam
    hidden: Tensor
    """[B, q, E] input of the attention module."""
    layer: MemoryLayer | None
    """The conversation's state; None without a cache."""
    position_embeddings: Any
    module: nn.Module
    query: Tensor
    key: Tensor
    """[B, G, kept + q, K]."""
    value: Tensor
    mask: Tensor | None
    kwargs: dict[str, Any]

    def full(self) -> tuple[Tensor, Tensor | None]:
        """The base model's own attention over everything that `key` and `value` hold."""
        return base_attention(self.module, self.query, self.key, self.value, self.mask, self.kwargs)

    def remember(self) -> tuple[Tensor, Tensor | None]:
        """Attention with memory: exact over sinks and window, the memory's for the rest."""
        from memretrofit.patching.windowed import windowed_attention

        return windowed_attention(self)

    def near(self) -> Tensor:
        """The base model's own attention over sinks and window alone: [B, q, H, V]."""
        from memretrofit.patching.windowed import near_attention

        return near_attention(self)

    def calibrate(self) -> None:
        """Let the memory start from this call's queries and keys."""
        from memretrofit.patching.windowed import state_inputs

        query, key = state_inputs(self)
        self.seam.memory.calibrate(query, key, self.kwargs.get("scaling") or key.shape[-1] ** -0.5)


def memory_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function: query `[B, H, q, K]`, key and value `[B, G, kv, *]`;
    returns `[B, q, H, V]`.
    """
    if torch.compiler.is_compiling() and _current.traced is None:
        return _uncompiled_attention(module, query, key, value, attention_mask, **kwargs)
    return _attention(module, query, key, value, attention_mask, **kwargs)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    recording = None if torch.compiler.is_compiling() else probe.get()
    if recording is not None:
        recording.calls.append((module, query, key, value, kwargs))
    visit = _current.get()
    if visit is None or getattr(module, "memory", None) is not visit.seam.memory:
        return base_attention(module, query, key, value, attention_mask, kwargs)
    new = query.shape[2]
    begin = 0 if attention_mask is None else attention_mask.shape[-1] - new
    known, attention_mask = padding_alone(attention_mask, len(query), new, begin)
    if not known:
        raise StateError(
            "The attention mask is more than causal with padding (packed sequences, a 4-D mask, "
            "or bidirectional spans), and a "
            "memory cannot tell which tokens belong together. Pass one sequence per row and a 2-D "
            "attention mask."
        )
    call = AttentionCall(
        seam=visit.seam,
        hidden=visit.hidden,
        layer=visit.layer,
        position_embeddings=visit.position_embeddings,
        module=module,
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        kwargs=kwargs,
    )
    intercept = call.seam.controls.intercept
    if intercept is not None and call.layer is not None:
        raise StateError(
            "intercepted() changes forwards without a cache: it would leave this cache's state "
            "behind its tokens. Pass use_cache=False."
        )
    return call.remember() if intercept is None else intercept(call)


_uncompiled_attention = uncompiled()(_attention)


def base_function(module: nn.Module) -> tuple[Callable[..., tuple[Tensor, Tensor | None]], str]:
    """The attention function that the module would have called, and its implementation's name."""
    implementation = base_implementation(module.config)  # type: ignore[arg-type]
    if implementation == "eager":
        # each modeling file has its own eager function: soft caps and sinks live there
        return sys.modules[type(module).__module__].eager_attention_forward, implementation
    function = AttentionInterface().get(implementation)
    if function is None:
        raise UnsupportedModelError(
            f"attention implementation {implementation!r} is not known to Transformers"
        )
    return function, implementation


def base_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Base attention, with the mask that the base mask function would have made from the same
    padding.
    """
    function, implementation = base_function(module)
    if mask is None or (
        mask.dtype is torch.bool
        and (implementation == "eager" or (query.shape[2] > 1 and mask.stride(-2) == 0))
    ):
        mask = rebuild_base_mask(mask, query, key, module.config)
    return function(module, query, key, value, attention_mask=mask, **kwargs)
