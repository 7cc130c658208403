"""Back from a file into the cache of a model that reads in segments: one layer, a `Session`.

Names of tensors: `counts`, `valid` and `embeds` are the session's own, `state.*` is what is
carried, and `key.3`, `value.3` are the open span's columns in the model's layer 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memretrofit.errors import CheckpointError
from memretrofit.hub.cache_layers import SESSION, Content
from memretrofit.hub.mapped import map_tensors
from memretrofit.hub.record import TensorSpec
from memretrofit.hub.tensors import FLOATING, Header, spec_of
from memretrofit.patching.controls import memory_disabled
from memretrofit.patching.segment_visit import SegmentLedger
from memretrofit.patching.session import Session
from memretrofit.patching.wrapping import evaluating


@dataclass(frozen=True)
class SessionSlot:
    """Where a session is to be restored: `hub.cache_layers.Slot` of a model with segments."""

    layer: Session
    ledger: SegmentLedger
    model: Any
    rows: int

    def faults(self, content: Content, found: Mapping[str, TensorSpec]) -> list[str]:
        """What does not fit in numbers that a file states; empty where all is well."""
        if content.kind != SESSION:
            return [f"expected a {SESSION} layer, found a {content.kind} layer"]
        rows = found["counts"].shape if "counts" in found else (self.rows,)
        if rows != (self.rows,):
            return [f"expected {self.rows} rows, found {rows}"]
        return self.layer.faults(content.numbers)

    def expected(
        self, content: Content, found: Mapping[str, TensorSpec]
    ) -> Iterator[tuple[str, TensorSpec]]:
        """The tensors of such a session. How many columns and tokens are kept is the file's to
        state.
        """
        yield "counts", TensorSpec((self.rows,), "I64")
        for name, tensor in self.ledger.begin(0).items():
            of_rows = tensor.new_empty(()).expand(self.rows, *tensor.shape[1:])
            yield f"state.{name}", spec_of(of_rows)
        embedding = self.model.get_input_embeddings()
        yield _stated("embeds", found, self.rows, None, embedding.weight.shape[1])
        first = found["key.0"].shape if "key.0" in found else ()
        columns = first[2] if len(first) == 4 else 0
        if "valid" in found:
            held = found["valid"].shape[-1] if found["valid"].shape else 0
            yield "valid", TensorSpec((self.rows, columns or held), "BOOL")
        if not columns:
            return
        for index, layer in enumerate(self._base_layers()):
            for name, x in (("key", layer.keys), ("value", layer.values)):
                heads, width = x.shape[1::2]
                yield _stated(f"{name}.{index}", found, self.rows, heads, columns, width)

    def restore(self, content: Content, path: Path, header: Header) -> None:
        """Fill the session from a file that holds the expected tensors.

        Raises:
            CheckpointError: rows with more tokens than were read.
        """
        here = self.model.get_input_embeddings().weight.device
        places = {f"state.{n}": x.device for n, x in self.ledger.begin(0).items()}
        if "key.0" in header.specs:
            for index, layer in enumerate(self._base_layers()):
                places |= {f"{name}.{index}": layer.keys.device for name in ("key", "value")}
        # all of it is read: a file that is cut short later must not end the process
        tensors: dict[str, Tensor] = {
            name: x.to(places.get(name, here), copy=True)
            for name, x in map_tensors(path, header).items()
        }
        counts = tensors["counts"]
        if int(counts.min()) < 0 or int(counts.max()) > content.numbers["seen"]:
            raise CheckpointError(
                f"{path} is damaged: rows of {counts.tolist()} tokens, of "
                f"{content.numbers['seen']} that were read. Save the text again."
            )
        self.layer.restore(content.numbers, tensors)

    @torch.no_grad()
    def _base_layers(self) -> list[Any]:
        """What the unpatched model caches of one token."""
        embedding = self.model.get_input_embeddings()
        ids = torch.zeros(1, 1, dtype=torch.long, device=embedding.weight.device)
        with evaluating(self.model), memory_disabled(self.model):
            return self.model(input_ids=ids, use_cache=True).past_key_values.layers


def _stated(
    name: str, found: Mapping[str, TensorSpec], *shape: int | None
) -> tuple[str, TensorSpec]:
    """A tensor whose type, and lengths that are None, are the file's to state."""
    stated = found.get(name, TensorSpec((), "F32"))
    known = stated.shape if len(stated.shape) == len(shape) else (0,) * len(shape)
    sizes = tuple(b if a is None else a for a, b in zip(shape, known, strict=True))
    return name, TensorSpec(sizes, stated.dtype if stated.dtype in FLOATING else "F32")
