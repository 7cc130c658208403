"""The cache layer of a patched attention module: sinks, window, and the state of what left.

It takes the place of a `DynamicLayer` inside the model's own cache object. It reports the full
sequence length, so that positions and masks stay those of the base model, and keeps
`num_sink_tokens + sliding_window` tokens.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from memretrofit.errors import StateError, UnsupportedModelError
from memretrofit.modules.memory import AttentionMemory, State, with_rows
from memretrofit.modules.rolling import RollingBuffer

NOTES = ("token", "surprise", "surprising", "cut", "origin", "place")
"""Of these, what is known of a token where a text is cut into events (`patching.surprises`); all
but `place` in one layer for all.
"""
STREAMS = ("key", "value", "features", "unrotated", *NOTES)
"""What a layer may keep of each token in its window."""
NUMBERS = ("seen", "folded", "first", "pinned", "confirmed", "record_past", "carried")
"""What a layer counts and notes beside its tensors."""
LOGITS = re.compile(r"logits\.(\d{1,12})")
"""Name of what was predicted after a slot, among the tensors of `MemoryLayer.saved`."""


class MemoryLayer(DynamicLayer):
    """One conversation's state in one layer.

    Slots number the tokens of a row from 0, padding included. Columns are what is kept: `pinned`
    sinks, then the slots from `first` to `seen - 1`. Slots below `folded` are in the state (or
    are sinks or padding).
    """

    def __init__(self, owner: str, sliding_window: int, num_sink_tokens: int) -> None:
        super().__init__()
        self.owner = owner
        self.sliding_window = sliding_window
        self.num_sink_tokens = num_sink_tokens
        self.record_past = False
        self.attending = False
        """Whether the module that calls `update` is the patched one, with its memory on."""
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.streams = {name: RollingBuffer() for name in STREAMS}
        self.state: State = ()
        self.unmet: Tensor | None = None
        """[B, H, n, K] the last n queries, which a state that observes queries has yet to meet:
        those of the tokens that a crop may still take back.
        """
        self.logits: dict[int, Tensor] = {}
        """[B, vocabulary] what was predicted after each slot that the next token may follow; where
        a text is read in pieces, in one layer for all.
        """
        self.carried = False
        self.seen = 0
        self.folded = 0
        self.first = 0
        self.pinned = 0
        self.confirmed = 0

    # What the model and `generate` call

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens and return all kept ones; trimming waits until attention has
        folded what leaves.
        """
        if not self.attending:
            raise StateError(
                "This cache holds a memory, and base attention cannot read it (the memory is "
                "disabled or the model is no longer patched). Start with a fresh cache: "
                "past_key_values=None."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys is not None and len(self.keys) != len(key_states):
            raise StateError(
                f"This cache holds {len(self.keys)} rows, and {len(key_states)} were passed. To go "
                "on from one conversation in several ways (beams, a batch of questions), call "
                "cache.batch_repeat_interleave(n) first, or load_memory(..., repeats=n)."
            )
        self.seen += key_states.shape[-2]
        self.keys = self.streams["key"].append(key_states)
        self.values = self.streams["value"].append(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens seen, not tokens kept: positions stay absolute."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The full length, so that one mask serves patched and unpatched layers."""
        return self.seen + query_length, 0

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` leaves no trace: nothing that would have to come back has been folded."""
        return self.record_past or self.folded == 0

    def activate_past_recording(self) -> None:
        """Fold nothing that a later `crop` could take back (assisted decoding)."""
        self.record_past = True
        self.confirmed = self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            StateError: a token that must come back into the window was already folded into the
            state.
        """
        self.check_crop(tokens_to_remove)
        count = -tokens_to_remove
        if count and self.is_initialized:
            for stream in self.streams.values():
                if stream.view is not None:
                    stream.crop(count)
            self.keys, self.values = self.streams["key"].view, self.streams["value"].view
            if self.unmet is not None:
                self.unmet = self.unmet[:, :, : self.unmet.shape[2] - count]
        self.seen = self.confirmed = self.seen - count
        self.logits = {slot: x for slot, x in self.logits.items() if slot < self.seen}

    @property
    def window(self) -> tuple[int, int]:
        """Tokens kept: sliding window and sinks."""
        return self.sliding_window, self.num_sink_tokens

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise the `StateError` that `crop` would raise, and change nothing."""
        count = -tokens_to_remove
        if not 0 <= count <= self.seen:
            raise StateError(
                f"crop({tokens_to_remove}) on a cache of {self.seen} tokens: pass minus the number "
                "of tokens to remove."
            )
        if count and self.folded > max(0, self.seen - count - self.sliding_window):
            raise StateError(
                f"crop({tokens_to_remove}) on a cache of {self.seen} tokens: {self.folded} tokens "
                "have left the window, and folding cannot be undone. Call "
                "cache.activate_past_recording() before the forward that may be cropped."
            )

    def reset(self) -> None:
        """Forget everything and keep the object."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move every row's window and state to where beam search wants them."""
        self._apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._apply(lambda x: x[indices, ...])

    def _apply(self, function: Any) -> None:
        for stream in self.streams.values():
            stream.apply(function)
        self.state = with_rows(self.state, function)
        self.unmet = None if self.unmet is None else function(self.unmet)
        self.logits = {slot: function(x) for slot, x in self.logits.items()}
        self.keys, self.values = self.streams["key"].view, self.streams["value"].view

    def nbytes(self) -> int:
        """Bytes held for this layer: kept tokens (spare columns included) and state."""
        unmet = 0 if self.unmet is None else self.unmet.nbytes
        kept = sum(s.nbytes for s in self.streams.values())
        kept += sum(x.nbytes for x in self.logits.values())
        return kept + unmet + sum(x.nbytes for x in self.state)

    # What a file keeps

    def saved(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """All but the state, as numbers and tensors by name: what `restore` takes."""
        tensors = {name: stream.view for name, stream in self.streams.items()}
        tensors |= {f"logits.{slot}": x for slot, x in self.logits.items()} | {"unmet": self.unmet}
        numbers = {name: int(getattr(self, name)) for name in NUMBERS}
        return numbers, {name: x for name, x in tensors.items() if x is not None}

    def faults(self, numbers: Mapping[str, int]) -> list[str]:
        """Why these are not the numbers of such a layer; empty where they may be."""
        if missing := [name for name in NUMBERS if name not in numbers]:
            return [f"no number {', '.join(missing)}"]
        seen, folded, first, pinned, confirmed, *_ = (numbers[name] for name in NUMBERS)
        ordered = first <= folded <= seen and confirmed <= seen
        if ordered and pinned == (self.num_sink_tokens if first else 0):
            return []
        told = ", ".join(f"{name} {numbers[name]}" for name in NUMBERS)
        return [f"the counters do not belong together: {told}"]

    def restore(
        self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor], state: State
    ) -> None:
        """Fill a fresh layer with what `saved` gave, and a state; numbers without `faults`."""
        for name in self.streams.keys() & tensors.keys():
            self.streams[name].append(tensors[name])
        key, value = self.streams["key"].view, self.streams["value"].view
        if key is not None and value is not None:
            self.lazy_initialization(key, value)
            self.keys, self.values = key, value
        for name in NUMBERS:
            setattr(self, name, type(getattr(self, name))(numbers[name]))
        self.unmet, self.state = tensors.get("unmet"), state
        matches = ((LOGITS.fullmatch(name), x) for name, x in tensors.items())
        self.logits = {int(match[1]): x for match, x in matches if match}

    # What the attention seam calls

    def begin_with(self, other: object) -> None:
        """Take a copy of the state that another cache's layer holds.

        Raises:
            StateError: that layer holds no memory of the same patched module.
        """
        if not isinstance(other, MemoryLayer) or other.owner != self.owner:
            raise StateError(
                f"state_carried: the cache's layer is a {type(other).__name__} that holds no state "
                "of this patched model. Pass a cache that this model filled."
            )
        self.state, self.carried = (
            tuple(
                x.clone() if isinstance(x, Tensor) else x.clone().earlier(other.seen)
                for x in other.state
            ),
            True,
        )

    def commit(self, state: State, folded: int, ranks: Tensor | None) -> None:
        """Store the state in which all slots below `folded` are, and drop their columns except
        the sinks.
        """
        self.state, self.folded = state, folded
        if self.unmet is not None:
            met = self.seen - self.unmet.shape[2]
            met = max(met, folded + self.sliding_window) if folded else met
            self.unmet = self.unmet[:, :, self.unmet.shape[2] - (self.seen - met) :].clone()
        sinks = self.num_sink_tokens
        if folded <= max(sinks, self.first):
            return
        count = self.pinned + folded - self.first
        index = None if ranks is None else self._sink_columns(ranks, count)
        for stream in self.streams.values():
            columns = stream.view
            if columns is not None:
                # without padding the sinks are the first columns: no gather per step
                held = (
                    columns.narrow(-2, 0, sinks)
                    if index is None
                    else gather_columns(columns.narrow(-2, 0, count), index)
                )
                stream.drop(count, held)
        self.first, self.pinned = folded, sinks
        self.keys, self.values = self.streams["key"].view, self.streams["value"].view

    def _sink_columns(self, ranks: Tensor, count: int) -> Tensor:
        """[B, N] columns, among the first `count`, that hold the sinks (0 where a row has none
        there yet).
        """
        wanted = torch.arange(self.num_sink_tokens, device=ranks.device)
        kept = self.column_ranks(ranks)[:, None, :count]
        return (kept == wanted[None, :, None]).int().argmax(-1)

    def column_ranks(self, ranks: Tensor) -> Tensor:
        """[B, columns] rank of each kept column; -1 for padding and for pinned columns that are
        still empty.
        """
        window = ranks[:, self.first : self.seen]
        if not self.pinned:
            return window
        pinned = torch.arange(self.pinned, device=ranks.device)
        last = (
            ranks[:, : self.first].max(-1, keepdim=True).values
        )  # a row's rank so far; -1 when all was padding
        return torch.cat([torch.where(pinned <= last, pinned, -1), window], dim=-1)


def gather_columns(columns: Tensor, index: Tensor) -> Tensor:
    """Columns [B, ..., L, D] at each row's own index [B, N]."""
    lead = columns.shape[1:-2]
    index = index.reshape(index.shape[0], *(1,) * len(lead), index.shape[1], 1)
    return columns.gather(-2, index.expand(-1, *lead, -1, columns.shape[-1]))


def upgrade(
    cache: Cache,
    layer_idx: int,
    memory: AttentionMemory,
    owner: str,
    window: tuple[int, int] | None = None,
) -> MemoryLayer:
    """The memory layer at `layer_idx` of `cache`, put in the place of an empty `DynamicLayer`;
    with the memory's own sliding window and sinks unless another `window` is given.

    Raises:
        UnsupportedModelError: the cache is static, quantised, offloaded or of another kind that
        cannot hold a state. StateError: the cache was filled without this memory.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise UnsupportedModelError(
            f"A patched model needs a DynamicCache; found {type(cache).__name__}. Pass "
            "past_key_values=DynamicCache()."
        )
    if cache.offloading:
        raise UnsupportedModelError(
            "An offloaded cache cannot hold a memory: its layers move between devices while "
            "attention reads them. "
            "Use the default cache (cache_implementation=None): after patching, its size no "
            "longer grows."
        )
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, MemoryLayer):
        if layer.owner != owner:
            raise StateError(
                f"Layer {layer_idx} of this cache holds the state of another patched model (or of "
                "an earlier patch). "
                "Start with a fresh cache: past_key_values=None."
            )
        return layer
    if type(layer) is not DynamicLayer:
        raise UnsupportedModelError(
            f"Layer {layer_idx} of the cache is a {type(layer).__name__}; a memory can take the "
            "place of a DynamicLayer only. "
            "Use the default cache: cache_implementation=None, past_key_values=None or "
            "DynamicCache(config=model.config)."
        )
    if layer.get_seq_length():
        raise StateError(
            f"Layer {layer_idx} of this cache already holds {layer.get_seq_length()} tokens that "
            "were read without memory. "
            "Read the text again with a fresh cache, or keep using this one inside "
            "memretrofit.memory_disabled(model)."
        )
    fresh = MemoryLayer(owner, *(window or (memory.sliding_window, memory.num_sink_tokens)))
    cache.layers[layer_idx] = fresh
    cache.crop = _Crop(cache)  # type: ignore[method-assign]
    return fresh


class _Crop:
    """`Cache.crop`, all layers or none.

    It knows its cache weakly: a cycle would keep a dropped cache in memory until Python looks for
    garbage, which a few large tensors do not make it do.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = weakref.ref(cache)

    def __reduce__(self) -> tuple[type[_Crop], tuple[Cache | None]]:
        """A copy of the cache crops itself."""
        return _Crop, (self._cache(),)

    def __call__(self, tokens_to_remove: int) -> None:
        cache = self._cache()
        assert cache is not None, "an attribute of the cache"
        for layer in cache.layers:
            if isinstance(layer, MemoryLayer):
                layer.check_crop(tokens_to_remove)
        type(cache).crop(cache, tokens_to_remove)
