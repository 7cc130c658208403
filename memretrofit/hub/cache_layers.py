"""What a layer of a cache keeps, as tensors and numbers of a file, and back into a fresh layer.

Names of tensors: `key`, `value`, `features` and `unrotated` are the columns of a memory layer, or
of a layer that the model has anyway; `state.0` is a tensor of the state, and `state.0.keys` belongs
to a store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memretrofit.errors import CheckpointError, StateError, UnsupportedModelError
from memretrofit.hub.mapped import FETCHED, Written, map_tensors
from memretrofit.hub.record import TensorSpec
from memretrofit.hub.tensors import DTYPES, FLOATING, Header, spec_of
from memretrofit.modules.memory import AttentionMemory, State
from memretrofit.modules.slab import Placement, Slab
from memretrofit.modules.store import Store
from memretrofit.patching.cache import LOGITS, NOTES, MemoryLayer
from memretrofit.patching.session import Session
from memretrofit.patching.sites import AttentionSite

MEMORY, SESSION, FULL, SLIDING, EMPTY = "memory", "session", "full", "sliding", "empty"
_OURS = {MemoryLayer: MEMORY, Session: SESSION}
_KINDS = {"DynamicLayer": FULL, "DynamicSlidingWindowLayer": SLIDING, "DummyLayer": EMPTY}

Size = tuple[int, int]
"""Heads and width of a layer's keys, or values."""


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
        legal = kind in (*_OURS.values(), *_KINDS.values())
        legal = legal and all(type(x) is int and x >= 0 for x in found.values())
        return cls(kind, found) if legal else None


def kind_of(layer: Any, place: int) -> str:
    """What a layer is, in the word that its file uses.

    Raises:
        UnsupportedModelError: a layer of another class, which a file would not bring back whole.
    """
    name = type(layer).__name__
    kind = _OURS.get(type(layer)) or _KINDS.get(name)
    if kind is None:
        raise UnsupportedModelError(
            f"Layer {place} of the cache is a {name}, and only layers of a memory and "
            f"{', '.join(_KINDS)} can be saved and loaded. Keep this cache in memory, or read the "
            "text again."
        )
    return kind


def content_of(
    layer: Any, place: int, memory: AttentionMemory | None = None
) -> tuple[Content, dict[str, Written]]:
    """What has to be written of a layer, which `memory` fills where it holds one.

    Raises:
        UnsupportedModelError: its class, or its state, has no form on disk.
    """
    kind = kind_of(layer, place)
    if kind == MEMORY:
        assert memory is not None
        return _memory_content(layer, place, memory)
    if kind == SESSION:
        numbers, parts = layer.saved()
        return Content(kind, numbers), {name: Written.whole(x) for name, x in parts.items()}
    numbers = {}
    if kind == SLIDING:
        numbers = {"seen": layer.cumulative_length, "recording": int(layer.record_past)}
    held = kind != EMPTY and layer.is_initialized
    parts = {"key": layer.keys, "value": layer.values} if held else {}
    return Content(kind, numbers), {name: Written.whole(x) for name, x in parts.items()}


def _memory_content(
    layer: MemoryLayer, place: int, memory: AttentionMemory
) -> tuple[Content, dict[str, Written]]:
    numbers, parts = layer.saved()
    tensors = {name: Written.whole(x) for name, x in parts.items()}
    packed = memory.packed(layer.state) if layer.state else ()
    for index, entry in enumerate(packed):
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
    return Content(MEMORY, {**numbers, "state": len(packed)}), tensors


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
    cached: Callable[[], tuple[Size, Size]]
    """What the model's own cache keeps here: asks the model, which takes a forward of a token."""

    def faults(self, content: Content, found: Mapping[str, TensorSpec]) -> list[str]:
        """What does not fit in numbers that a file states; empty where all is well."""
        kind, n = kind_of(self.layer, 0), content.numbers
        if content.kind != kind:
            return [f"expected a {kind} layer, found a {content.kind} layer"]
        names = {SLIDING: ("seen", "recording"), MEMORY: ("state",)}.get(kind, ())
        rows = found["key"].shape[:1] if "key" in found else (self.rows,)
        if rows != (self.rows,):
            return [f"expected {self.rows} rows, found {rows}"]
        if missing := [name for name in names if name not in n]:
            return [f"no number {', '.join(missing)}"]
        if kind != MEMORY:
            return []
        if faults := self.layer.faults(n):
            return faults
        entries = len(self._fresh("F32"))
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

        key, value = self._sizes(found)
        if content.kind != MEMORY:
            stated = found.get("key")
            columns = stated.shape[-2] if stated and len(stated.shape) == 4 else 0
            if content.kind == SLIDING and not n["recording"]:
                columns = min(n["seen"], self.layer.sliding_window - 1)
            yield floating("key", self.rows, key[0], columns, key[1])
            yield floating("value", self.rows, value[0], columns, value[1])
            return
        memory = self.memory
        assert memory is not None
        columns = n["pinned"] + n["seen"] - n["first"]
        yield floating("key", self.rows, key[0], columns, key[1])
        yield floating("value", self.rows, value[0], columns, value[1])
        if memory.key_space == "pre_rope":
            yield floating("unrotated", self.rows, key[0], columns, key[1])
        if memory.write_features is not None:
            size = self._feature_size(memory.write_features)
            yield floating("features", self.rows, columns, size)
        for name in NOTES:
            if name in found:
                yield name, TensorSpec((self.rows, columns, 1), found[name].dtype)
        for name in found:
            if LOGITS.fullmatch(name):
                yield floating(name, self.rows, None)
        if "unmet" in found and site is not None:
            yield floating("unmet", self.rows, site.num_heads, None, site.key_dim)
        if n["state"]:
            yield from self._expected_state(memory, found, floating)

    def _sizes(
        self, found: Mapping[str, TensorSpec]
    ) -> tuple[tuple[int | None, int | None], tuple[int | None, int | None]]:
        """Of cached keys and values: what attention sees, or latents (MLA)."""
        site = self.site
        if site is None:
            return (None, None), (None, None)
        heads = site.num_key_value_heads
        stated = [found[name].shape[1::2] for name in ("key", "value") if name in found]
        seen = (heads, site.key_dim), (heads, site.value_dim)
        return seen if stated == [*seen] else self.cached()

    def _expected_state(
        self,
        memory: AttentionMemory,
        found: Mapping[str, TensorSpec],
        floating: Callable[..., tuple[str, TensorSpec]],
    ) -> Iterator[tuple[str, TensorSpec]]:
        for index, entry in enumerate(memory.packed(self._fresh(found["key"].dtype))):
            name = f"state.{index}"
            if isinstance(entry, Tensor):
                spec, grows = spec_of(entry), memory.growing.get(index)
                shape = (None if axis == grows else n for axis, n in enumerate(spec.shape))
                yield floating(name, *shape) if spec.dtype in FLOATING else (name, spec)
                continue
            known = found.get(f"{name}.keys"), found.get(f"{name}.summaries")
            blocks, full = (x.shape[0] if x and x.shape else 0 for x in known)
            counts = {"lengths": self.rows, "summaries": min(full, blocks)}
            for part, written in _store_parts(entry).items():
                spec = written.spec
                shape = (counts.get(part, blocks), *spec.shape[1:])
                yield f"{name}.{part}", TensorSpec(shape, spec.dtype)

    def restore(self, content: Content, path: Path, header: Header) -> None:
        """Fill the layer from a file that holds the expected tensors.

        Raises:
            CheckpointError: numbers in a state or a store do not fit its sizes.
        """
        layer, n = self.layer, content.numbers
        tensors = map_tensors(path, header)
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
        memory, state = self.memory, ()
        assert memory is not None
        if n["state"]:
            state = tuple(
                small[f"state.{index}"]
                if isinstance(entry, Tensor)
                else self._store(f"state.{index}", entry, tensors, small)
                for index, entry in enumerate(self._fresh("F32"))
            )
            try:
                state = memory.unpacked(state)
            except StateError as error:
                raise CheckpointError(f"{path} is damaged: {error}. Save the text again.") from None
        layer.restore(n, small, state)

    def _store(
        self, name: str, fresh: Store, mapped: Mapping[str, Tensor], small: Mapping[str, Tensor]
    ) -> Store:
        return Store.opened(
            *(mapped[f"{name}.{part}"] for part in ("keys", "values")),
            *(small[f"{name}.{part}"] for part in ("slots", "summaries", "lengths")),
            placement=self._placement(fresh.values),
            key_placement=self._placement(fresh.keys),
            hot_bytes=0 if fresh.hot is None else fresh.hot.limit,
        )

    def _placement(self, slab: Slab) -> Placement:
        """On the CPU, `host` is the same memory; but mapped blocks are read only when fetched."""
        on_host = slab.placement == "device" and self.device.type == "cpu"
        return "host" if on_host else slab.placement

    @torch.no_grad()
    def _feature_size(self, write_features: nn.Module) -> int:
        assert self.site is not None
        weight = next(self.site.module.parameters())
        hidden = weight.new_zeros(1, 1, self.site.hidden_size)
        return write_features(hidden).shape[-1]

    def _fresh(self, dtype: str) -> State:
        """What the memory begins with."""
        assert self.memory is not None
        assert self.site is not None
        shape = (self.rows, self.site.num_heads, 0, self.site.key_dim)
        like = torch.empty(shape, dtype=DTYPES[dtype], device=self.device)
        return self.memory.initial_state(self.rows, like)
