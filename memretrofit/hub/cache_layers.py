"""What a layer of a cache keeps, as tensors and numbers of a file, and back into a fresh layer.

Names of tensors: `key`, `value`, `features` and `unrotated` are the columns of a memory layer, or
of a layer that the model has anyway; `state.0` is a tensor of the state, and `state.0.keys` belongs
to a store.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memretrofit.errors import UnsupportedModelError
from memretrofit.hub.mapped import FETCHED, Written, map_tensors
from memretrofit.hub.record import TensorSpec
from memretrofit.hub.tensors import DTYPES, FLOATING, spec_of
from memretrofit.modules.memory import AttentionMemory, State
from memretrofit.modules.store import Store
from memretrofit.patching.cache import MemoryLayer
from memretrofit.patching.sites import AttentionSite

MEMORY, FULL, SLIDING, EMPTY = "memory", "full", "sliding", "empty"
_KINDS = {"DynamicLayer": FULL, "DynamicSlidingWindowLayer": SLIDING, "DummyLayer": EMPTY}
_COUNTERS = ("seen", "folded", "first", "pinned", "confirmed")
_NOTES = {"token": "I64", "surprise": None, "place": "I64"}
"""Streams [B, columns, 1] that a layer has where a text is read in pieces."""
_LOGITS = re.compile(r"logits\.(\d{1,12})")


@dataclass(frozen=True)
class Content:
    """A layer without its tensors' shapes: these are in the header of its file."""

    kind: str
    numbers: dict[str, int]

    def to_metadata(self) -> dict[str, str]:
        """What the header of a layer's file says beside its tensors."""
        return {"layer": json.dumps({"kind": self.kind, **self.numbers})}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Content | None:
        """The reverse; None where a header says nothing of the sort."""
        try:
            found = json.loads(metadata["layer"])
            kind = found.pop("kind")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
            return None
        legal = kind in (MEMORY, *_KINDS.values())
        legal = legal and all(type(x) is int and x >= 0 for x in found.values())
        return cls(kind, found) if legal else None


def kind_of(layer: Any, place: int) -> str:
    """What a layer is, in the word that its file uses.

    Raises:
        UnsupportedModelError: a layer of another class, which a file would not bring back whole.
    """
    name = type(layer).__name__
    kind = MEMORY if isinstance(layer, MemoryLayer) else _KINDS.get(name)
    if kind is None:
        raise UnsupportedModelError(
            f"Layer {place} of the cache is a {name}, and only layers of a memory and "
            f"{', '.join(_KINDS)} can be saved and loaded. Keep this cache in memory, or read the "
            "text again."
        )
    return kind


def refuse_latents(layer: Any, site: AttentionSite) -> None:
    """A cache of latents (MLA) does not hold what attention sees, and `load` could not check it.

    Raises:
        UnsupportedModelError: the layer keeps other shapes than the site's keys.
    """
    keys = getattr(layer, "keys", None)
    if isinstance(keys, Tensor) and keys.shape[1::2] != (site.num_key_value_heads, site.key_dim):
        raise UnsupportedModelError(
            f"Layer {site.layer_idx} of the cache keeps {list(keys.shape)} where attention sees "
            f"{site.num_key_value_heads} heads of {site.key_dim}: latents (MLA), which have no "
            "form on disk yet. Keep the conversation in this process."
        )


def content_of(layer: Any, place: int) -> tuple[Content, dict[str, Written]]:
    """What has to be written of a layer.

    Raises:
        UnsupportedModelError: its class, or its state, has no form on disk.
    """
    kind = kind_of(layer, place)
    if kind == MEMORY:
        return _memory_content(layer, place)
    numbers = {}
    if kind == SLIDING:
        numbers = {"seen": layer.cumulative_length, "recording": int(layer.record_past)}
    held = kind != EMPTY and layer.is_initialized
    parts = {"key": layer.keys, "value": layer.values} if held else {}
    return Content(kind, numbers), {name: Written.whole(x) for name, x in parts.items()}


def _memory_content(layer: MemoryLayer, place: int) -> tuple[Content, dict[str, Written]]:
    numbers = {name: getattr(layer, name) for name in _COUNTERS}
    numbers |= {"recording": int(layer.record_past), "carried": int(layer.carried)}
    numbers["state"] = len(layer.state)
    parts = {name: stream.view for name, stream in layer.streams.items()}
    parts |= {f"logits.{slot}": x for slot, x in layer.logits.items()} | {"unmet": layer.unmet}
    tensors = {name: Written.whole(x) for name, x in parts.items() if x is not None}
    for index, entry in enumerate(layer.state):
        name = f"state.{index}"
        if isinstance(entry, Tensor):
            tensors[name] = Written.whole(entry)
        elif isinstance(entry, Store):
            tensors |= {f"{name}.{part}": x for part, x in _store_parts(entry).items()}
        else:
            raise UnsupportedModelError(
                f"Layer {place} of the cache holds a {type(entry).__name__}, which has no form on "
                "disk. Use a method whose state is tensors or a store."
            )
    return Content(MEMORY, numbers), tensors


def _store_parts(store: Store) -> dict[str, Written]:
    return {part: Written.joined(tensors) for part, tensors in store.saved().items()}


@dataclass(frozen=True)
class Slot:
    """Where a layer is to be restored: what its model makes of it decides what may stand there."""

    layer: Any
    site: AttentionSite | None
    """The attention module that fills it, where it is known."""
    memory: AttentionMemory | None
    device: torch.device
    rows: int

    def faults(self, content: Content, found: Mapping[str, TensorSpec]) -> list[str]:
        """What does not fit in numbers that a file states; empty where all is well."""
        kind, n = kind_of(self.layer, 0), content.numbers
        if content.kind != kind:
            return [f"expected a {kind} layer, found a {content.kind} layer"]
        names = {SLIDING: ("seen", "recording"), MEMORY: (*_COUNTERS, "state")}.get(kind, ())
        rows = found["key"].shape[:1] if "key" in found else (self.rows,)
        if rows != (self.rows,):
            return [f"expected {self.rows} rows, found {rows}"]
        if missing := [name for name in names if name not in n]:
            return [f"no number {', '.join(missing)}"]
        if kind != MEMORY:
            return []
        memory = self.memory
        assert memory is not None
        pinned = memory.num_sink_tokens if n["first"] else 0
        ordered = n["first"] <= n["folded"] <= n["seen"] and n["confirmed"] <= n["seen"]
        if not ordered or n["pinned"] != pinned:
            told = ", ".join(f"{name} {n[name]}" for name in _COUNTERS)
            return [f"the counters do not belong together: {told}"]
        entries = len(self._fresh_state("F32"))
        if n["state"] not in (0, entries):
            return [f"expected a state of {entries} entries, found {n['state']}"]
        return []

    def expected(
        self, content: Content, found: Mapping[str, TensorSpec]
    ) -> Iterator[tuple[str, TensorSpec]]:
        """The tensors that a layer with these numbers has. Where a length is the file's to state,
        it is taken from `found`.
        """
        n, site = content.numbers, self.site
        if content.kind == EMPTY or not (found or n.get("seen")):
            return  # a layer that nothing was read into

        def floating(name: str, *shape: int | None) -> tuple[str, TensorSpec]:
            stated = found.get(name, TensorSpec((), "F32"))
            known = stated.shape if len(stated.shape) == len(shape) else (0,) * len(shape)
            sizes = tuple(b if a is None else a for a, b in zip(shape, known, strict=True))
            return name, TensorSpec(sizes, stated.dtype if stated.dtype in FLOATING else "F32")

        heads, keys, values = (
            (site.num_key_value_heads, site.key_dim, site.value_dim) if site else (None, None, None)
        )
        if content.kind != MEMORY:
            stated = found.get("key")
            columns = stated.shape[-2] if stated and len(stated.shape) == 4 else 0
            if content.kind == SLIDING and not n["recording"]:
                columns = min(n["seen"], self.layer.sliding_window - 1)
            yield floating("key", self.rows, heads, columns, keys)
            yield floating("value", self.rows, heads, columns, values)
            return
        memory = self.memory
        assert memory is not None
        columns = n["pinned"] + n["seen"] - n["first"]
        yield floating("key", self.rows, heads, columns, keys)
        yield floating("value", self.rows, heads, columns, values)
        if memory.key_space == "pre_rope":
            yield floating("unrotated", self.rows, heads, columns, keys)
        if memory.write_features is not None:
            size = self._feature_size(memory.write_features)
            yield floating("features", self.rows, columns, size)
        for name, dtype in _NOTES.items():
            if name in found:
                shape = (self.rows, columns, 1)
                yield (name, TensorSpec(shape, dtype)) if dtype else floating(name, *shape)
        for name in found:
            if _LOGITS.fullmatch(name):
                yield floating(name, self.rows, None)
        if "unmet" in found:
            yield floating("unmet", self.rows, site.num_heads if site else None, None, keys)
        if n["state"]:
            yield from self._expected_state(memory, found, floating)

    def _expected_state(
        self,
        memory: AttentionMemory,
        found: Mapping[str, TensorSpec],
        floating: Callable[..., tuple[str, TensorSpec]],
    ) -> Iterator[tuple[str, TensorSpec]]:
        grows = memory.state_nbytes(0) != memory.state_nbytes(1 << 20)
        for index, entry in enumerate(self._fresh_state(found["key"].dtype)):
            name = f"state.{index}"
            if isinstance(entry, Tensor):
                spec, known = spec_of(entry), found.get(name)
                shape = spec.shape
                if grows and known and len(known.shape) == len(shape):
                    pairs = zip(shape[1:], known.shape[1:], strict=True)
                    shape = (shape[0], *(max(pair) for pair in pairs))
                floats = spec.dtype in FLOATING
                yield floating(name, *shape) if floats else (name, TensorSpec(shape, spec.dtype))
                continue
            known = found.get(f"{name}.keys"), found.get(f"{name}.summaries")
            blocks, full = (x.shape[0] if x and x.shape else 0 for x in known)
            counts = {"lengths": self.rows, "summaries": min(full, blocks)}
            for part, written in _store_parts(entry).items():
                spec = written.spec
                shape = (counts.get(part, blocks), *spec.shape[1:])
                yield f"{name}.{part}", TensorSpec(shape, spec.dtype)

    def restore(self, content: Content, path: Path) -> None:
        """Fill the layer from a file that holds the expected tensors.

        Raises:
            CheckpointError: the lengths of a store do not fit its blocks.
        """
        layer, n = self.layer, content.numbers
        tensors = map_tensors(path)
        if content.kind != MEMORY:
            if tensors:
                key, value = (tensors[name].to(self.device) for name in ("key", "value"))
                layer.lazy_initialization(key, value)
                layer.keys, layer.values = key, value
            if content.kind == SLIDING:
                layer.cumulative_length, layer.record_past = n["seen"], bool(n["recording"])
            return
        # what is small is read: a file that is cut short later must not end the process
        small = {
            name: x.to(self.device, copy=True)
            for name, x in tensors.items()
            if not name.endswith(FETCHED)
        }
        for name, stream in layer.streams.items():
            if name in small:
                stream.append(small[name])
        key, value = layer.streams["key"].view, layer.streams["value"].view
        if key is not None:
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
        for name in _COUNTERS:
            setattr(layer, name, n[name])
        layer.record_past, layer.carried = bool(n.get("recording")), bool(n.get("carried"))
        layer.unmet = small.get("unmet")
        layer.logits = {
            int(match[1]): x for name, x in small.items() if (match := _LOGITS.fullmatch(name))
        }
        layer.state = tuple(
            small[f"state.{index}"]
            if isinstance(entry, Tensor)
            else self._store(f"state.{index}", entry, tensors, small)
            for index, entry in enumerate(self._fresh_state("F32") if n["state"] else ())
        )

    def _store(
        self, name: str, fresh: Store, mapped: Mapping[str, Tensor], small: Mapping[str, Tensor]
    ) -> Store:
        placement = fresh.keys.placement
        if placement == "device" and self.device.type == "cpu":
            placement = "host"  # the same memory; but mapped blocks are read only when fetched
        return Store.opened(
            *(mapped[f"{name}.{part}"] for part in ("keys", "values")),
            *(small[f"{name}.{part}"] for part in ("slots", "summaries", "lengths")),
            placement=placement,
            cache_bytes=0 if fresh.hot is None else fresh.hot.limit,
        )

    @torch.no_grad()
    def _feature_size(self, write_features: nn.Module) -> int:
        assert self.site is not None
        weight = next(self.site.module.parameters())
        hidden = weight.new_zeros(1, 1, self.site.hidden_size)
        return write_features(hidden).shape[-1]

    def _fresh_state(self, dtype: str) -> State:
        """What the memory begins with."""
        assert self.memory is not None
        assert self.site is not None
        shape = (self.rows, self.site.num_heads, 0, self.site.key_dim)
        like = torch.empty(shape, dtype=DTYPES[dtype], device=self.device)
        return self.memory.initial_state(self.rows, like)
