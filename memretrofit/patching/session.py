"""The cache layer of a model that reads in segments: the open span's keys and values, and the state
of what was closed.

It is the only layer of the model's own cache object: positions start again in each segment, so the
decoder reads and fills a cache inside it, while the one outside counts the tokens of the text.
Columns are what the inner cache holds of each row, openings included; a column that belongs to a
closed span, or to another row's opening, is not valid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from memretrofit.errors import StateError, UnsupportedModelError
from memretrofit.modules.segment_memory import Part, State
from memretrofit.patching.ledger import refuse_other_owner

Rows = Callable[[Tensor], Tensor]
NUMBERS = ("seen", "open", "record_past")
"""What a session counts and notes beside its tensors."""
TENSORS = ("counts", "valid", "embeds")
"""What it holds beside the state and the open span. The first two are on the CPU: they decide what
a forward reads, and a device that is asked for that has to be waited for.
"""


class Session(DynamicLayer):
    """One batch of conversations, each a text that is read in segments."""

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.seen = 0
        self.inner = DynamicCache()
        self.state: State = {}
        self.counts: Tensor | None = None
        """[B] tokens of each row that are no padding."""
        self.valid: Tensor | None = None
        """[B, columns] bool; None: every column of every row."""
        self.pieces: tuple[Tensor, ...] = ()
        """`embeds`, cut into what was read at once: a token is added without copying the others."""
        self.written = False
        """Whether any row may have written something."""
        self.open = 0
        """Slots since a row last opened or closed a span: what can be cropped."""
        self.earlier: list[Session] = []
        """As it was at each event that a crop may still take back, oldest first."""

    @property
    def embeds(self) -> Tensor | None:
        """[B, n, E] tokens of each row, its last in the last column: what may be read again, and
        those of the open span.
        """
        if len(self.pieces) > 1:
            self.pieces = (torch.cat(self.pieces, dim=1),)
        return self.pieces[0] if self.pieces else None

    @embeds.setter
    def embeds(self, tokens: Tensor | None) -> None:
        """In one piece."""
        self.pieces = () if tokens is None else (tokens,)

    # What the model and `generate` call

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Base attention does not read this cache.

        Raises:
            StateError: always.
        """
        raise StateError(
            "This cache holds a text that was read in segments, and base attention cannot read it "
            "(the memory is disabled or the model is no longer patched). Start with a fresh cache: "
            "past_key_values=None."
        )

    def get_seq_length(self) -> int:
        """Slots seen: tokens of a row from its first, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length of the text."""
        return self.seen + query_length, 0

    def activate_past_recording(self) -> None:
        """Keep what a later `crop` needs (assisted decoding)."""
        self.record_past, self.earlier = True, []

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether `crop` leaves no trace as far back as a text may be taken back."""
        return self.record_past or self.open == self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            StateError: a segment was closed since, and what it wrote cannot be taken back.
        """
        count = -tokens_to_remove
        if not 0 <= count <= self.seen:
            raise StateError(
                f"crop({tokens_to_remove}) on a cache of {self.seen} tokens: pass minus the number "
                "of tokens to remove."
            )
        target = self.seen - count
        before = next((x for x in reversed(self.earlier) if x.seen - x.open <= target), None)
        if count > self.open and before is None:
            raise StateError(
                f"crop({tokens_to_remove}) on a cache of {self.seen} tokens: a segment was opened "
                f"or closed {self.open} tokens ago, and writing cannot be undone. Call "
                "cache.activate_past_recording() before the forward that may be cropped."
            )
        if count > self.open:
            assert before is not None
            vars(self).update(vars(before.twin()))
        self._crop_open(self.seen - target)
        self.earlier = []  # what was kept this time stays

    def _crop_open(self, count: int) -> None:
        if not count:
            return
        assert self.counts is not None
        self.inner.crop(-count)
        gone = torch.full_like(self.counts, count)
        if self.valid is not None:
            gone = self.valid[:, -count:].sum(-1)
            self.valid = self.valid[:, :-count]
        self.counts = self.counts - gone
        self.seen, self.open = self.seen - count, self.open - count
        if self.embeds is not None:
            self.embeds = roll_right(self.embeds, gone.to(self.embeds.device))

    def reset(self) -> None:
        """Forget everything and keep the object."""
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move every row, its state and its open span to where beam search wants them."""
        self.apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.apply(lambda x: x[indices.to(x.device), ...])

    def apply(self, function: Rows) -> None:
        """Reorder, repeat or choose rows of all that is held."""
        for each in (self, *self.earlier):
            for name in TENSORS:
                held = getattr(each, name)
                setattr(each, name, None if held is None else function(held))
            each.state = {k: function(x) for k, x in each.state.items()}
            each.map_columns(function)

    # What a file keeps

    def saved(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """All but what is kept for a crop across a border, as numbers and tensors by name: what
        `restore` takes.
        """
        tensors = {name: getattr(self, name) for name in TENSORS}
        tensors |= {f"state.{name}": x for name, x in self.state.items()}
        if self.columns:
            for index, layer in enumerate(self.layers):
                tensors |= {f"key.{index}": layer.keys, f"value.{index}": layer.values}
        numbers = {name: int(getattr(self, name)) for name in NUMBERS}
        return numbers, {name: x for name, x in tensors.items() if x is not None}

    def faults(self, numbers: Mapping[str, int]) -> list[str]:
        """Why these are not the numbers of a session; empty where they may be."""
        if missing := [name for name in NUMBERS if name not in numbers]:
            return [f"no number {', '.join(missing)}"]
        if 0 < numbers["seen"] >= numbers["open"]:
            return []
        told = ", ".join(f"{name} {numbers[name]}" for name in NUMBERS)
        return [f"the counters do not belong together: {told}"]

    def restore(self, numbers: Mapping[str, int], tensors: Mapping[str, Tensor]) -> None:
        """Fill a fresh session with what `saved` gave; numbers without `faults`."""
        for name in NUMBERS:
            setattr(self, name, type(getattr(self, name))(numbers[name]))
        for name in TENSORS:
            setattr(self, name, tensors.get(name))
        self.counts, self.valid = (x if x is None else x.cpu() for x in (self.counts, self.valid))
        self.written = True
        prefix = "state."
        named = (x for x in tensors.items() if x[0].startswith(prefix))
        self.state = {name.removeprefix(prefix): x for name, x in named}
        while (key := tensors.get(f"key.{len(self.layers)}")) is not None:
            layer, value = DynamicLayer(), tensors[f"value.{len(self.layers)}"]
            layer.lazy_initialization(key, value)
            layer.keys, layer.values = key, value
            self.inner.layers.append(layer)

    def detach(self) -> None:
        """Cut all that is held off its graph: gradients end here, and what made it can be freed."""
        self.apply(Tensor.detach)

    # What the seam calls

    @property
    def layers(self) -> list[DynamicLayer]:
        """The layers of the inner cache."""
        return cast("list[DynamicLayer]", self.inner.layers)

    def map_columns(self, function: Rows) -> None:
        """Replace the keys and values [B, G, columns, K] of the open span."""
        for layer in self.layers:
            if layer.keys is not None and layer.values is not None and layer.get_seq_length():
                layer.keys, layer.values = function(layer.keys), function(layer.values)

    def twin(self) -> Session:
        """The same content in another object; nothing here is ever written in place."""
        other = copy.copy(self)
        other.inner = DynamicCache()
        other.inner.layers[:] = [copy.copy(layer) for layer in self.layers]
        other.earlier = []
        return other

    def remember(self) -> None:
        """Note where the text is, before an event that a crop may have to take back."""
        if self.record_past:
            self.earlier.append(self.twin())

    def extend(self, real: Tensor | None, kept: int, dropped: int) -> None:
        """The open span was read on: the first `kept` columns, `real` [B, C], stay, the `dropped`
        last ones go.
        """
        if dropped:
            self.inner.crop(-dropped)
        if not kept:
            return
        assert self.counts is not None
        if self.valid is None and real is None:
            return
        size = len(self.counts), self.columns - kept
        before, new = self.valid, real
        if before is None:
            before = torch.ones(size, dtype=torch.bool)
        if new is None:
            new = torch.ones(size[0], kept, dtype=torch.bool)
        self.valid = torch.cat([before, new[:, :kept]], dim=1)

    def mask_with(self, real: Tensor | None, size: torch.Size) -> Tensor | None:
        """[B, columns + C] int64 on the CPU: which columns a forward over C more, `real`, may see;
        None: all. `size` is (B, C).
        """
        if self.valid is None and real is None:
            return None
        assert self.counts is not None
        before = torch.ones(size[0], self.columns, dtype=torch.bool)
        new = torch.ones(size, dtype=torch.bool) if real is None else real
        return torch.cat([before if self.valid is None else self.valid, new], dim=1).long()

    @property
    def columns(self) -> int:
        """Columns of the inner cache."""
        return self.inner.get_seq_length()

    def close(self, rows: Tensor) -> None:
        """Let the chosen rows [B] bool begin with no columns, and drop those that nobody needs."""
        if bool(rows.all()):
            self.inner, self.valid = DynamicCache(), None
            return
        valid = self.valid
        if valid is None:
            valid = torch.ones(len(rows), self.columns, dtype=torch.bool)
        self.valid = valid & ~rows[:, None]
        if 2 * int(self.valid.sum(-1).max()) <= self.columns:  # half of what is held is of no row
            self.align()

    def ragged(self, openings: list[Part]) -> bool:
        """Whether rows have different columns, or will have with these openings."""
        return self.valid is not None or any(not bool(part.rows.all()) for part in openings)

    def align(self) -> None:
        """Put each row's columns side by side, at the right end."""
        if self.valid is None:
            return
        needed = int(self.valid.sum(-1).max())
        if not needed:
            self.inner, self.valid = DynamicCache(), None
            return
        order = self.valid.int().argsort(dim=-1, stable=True)[:, -needed:]
        self.map_columns(lambda x: take(x, order.to(x.device)))
        valid = self.valid.gather(1, order)
        self.valid = None if bool(valid.all()) else valid

    def nbytes(self) -> int:
        """Bytes held: the open span, the state, and the tokens that may be read again."""
        held = [self.counts, self.valid, self.embeds, *self.state.values()]
        for layer in self.layers:
            held += [layer.keys, layer.values]
        return sum(x.nbytes for x in held if x is not None) + sum(x.nbytes() for x in self.earlier)


def take(columns: Tensor, index: Tensor) -> Tensor:
    """Columns [B, G, L, K] at each row's own index [B, n]."""
    index = index[:, None, :, None]
    return columns.gather(-2, index.expand(-1, columns.shape[1], -1, columns.shape[-1]))


def roll_right(columns: Tensor, count: Tensor) -> Tensor:
    """Columns [B, n, E] moved to the right by each row's own count [B]; zeros come in."""
    length = columns.shape[1]
    index = torch.arange(length, device=columns.device) - count[:, None]
    moved = columns.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, columns.shape[-1]))
    return moved * (index >= 0)[..., None]


def session_of(cache: Cache, owner: str) -> Session:
    """The session in `cache`, put in the place of its empty layers.

    Raises:
        UnsupportedModelError: the cache is static, quantised, offloaded or of another kind.
        StateError: it was filled without this memory.
    """
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise UnsupportedModelError(
            f"A model that reads in segments needs a plain DynamicCache; found "
            f"{type(cache).__name__}{' with offloading' * bool(getattr(cache, 'offloading', 0))}. "
            "Pass past_key_values=DynamicCache(), and no cache_implementation to generate: what is "
            "kept does not grow with the text."
        )
    first = cache.layers[0] if cache.layers else None
    if isinstance(first, Session):
        refuse_other_owner(first.owner, owner)
        return first
    if seen := cache.get_seq_length():
        raise StateError(
            f"This cache already holds {seen} tokens that were not read in segments. Read the text "
            "again with a fresh cache: past_key_values=None."
        )
    session = Session(owner)
    session.record_past = any(getattr(x, "record_past", False) for x in cache.layers)
    cache.layers[:] = [session]
    return session
