"""What a cache remembers of the tokens themselves, for memories that look tokens up.

A bank reads its rows by what was said so far: n-grams reach over the border of two calls, and a
route is that of the whole prefix. So the tokens of each row live in the cache beside their keys,
and move with them: beams, crops, copies. Any kind of cache will do; its own class stays a base
class of what it becomes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from memretrofit.errors import StateError
from memretrofit.modules.bank import PAD, Reach, first_tokens
from memretrofit.modules.rolling import RollingBuffer
from memretrofit.patching.ledger import refuse_other_owner
from memretrofit.patching.masks import padding_alone


class History:
    """The tokens of each row, and what layers keep of each."""

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self._ids = RollingBuffer()
        self._opening: Tensor | None = None
        """[B, count] the first tokens of each row, once they were asked for."""
        self._kept: dict[str, RollingBuffer] = {}
        self.routes: Tensor | None = None
        """[B, depth] what the rows were pinned to when they began; None: nothing was pinned."""

    def __len__(self) -> int:
        view = self._ids.view
        return 0 if view is None else view.shape[-2]

    def reached(self, reach: Reach) -> Tensor | None:
        """Of all tokens those that a look-up needs, [B, n <= length]; None before the first. It
        costs as much as these, however long the rows are.
        """
        view = self._ids.view
        if view is None:
            return None
        if reach.end == "last":
            return view[:, view.shape[1] - min(reach.length, view.shape[1]) :, 0].long()
        if self._opening is None or self._opening.shape[1] != reach.length:
            self._opening = first_tokens(view[..., 0].long(), reach.length)
        return self._opening

    def append(self, ids: Tensor) -> None:
        """Add the tokens [B, T]."""
        self._ids.append(ids[..., None].int())
        opening = self._opening
        if opening is not None and bool((opening == PAD).any()):
            self._opening = first_tokens(torch.cat([opening, ids], dim=1), opening.shape[1])

    def past(self, name: str, count: int) -> Tensor | None:
        """[B, n <= count, D] what the layer `name` kept of the last tokens."""
        view = self._kept[name].view if name in self._kept else None
        return None if view is None else view[:, -count:]

    def keep(self, name: str, columns: Tensor) -> None:
        """Add what the layer `name` keeps of the new tokens, [B, T, D]."""
        self._kept.setdefault(name, RollingBuffer()).append(columns)

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens."""
        self._opening = None
        for buffer in self._buffers():
            buffer.crop(count)

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Reorder, repeat or choose rows."""
        self._opening = None
        for buffer in self._buffers():
            buffer.apply(function)
        self.routes = None if self.routes is None else function(self.routes)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        opening = 0 if self._opening is None else self._opening.nbytes
        return opening + sum(buffer.nbytes for buffer in self._buffers())

    def _buffers(self) -> list[RollingBuffer]:
        held = [self._ids, *self._kept.values()]
        return [buffer for buffer in held if buffer.view is not None]


class _Remembering(Cache):
    """A cache that has a history; mixed into the class that it had."""

    history: History

    def reset(self) -> None:
        """Forget everything and keep the object."""
        super().reset()
        self.history = History(self.history.owner)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Move rows to where beam search wants them."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.history.apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens."""
        super().crop(tokens_to_remove)
        self.history.crop(-tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        self.history.apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.history.apply(lambda x: x[indices, ...])


@functools.cache
def remembering(kind: type[Cache]) -> type[Cache]:
    """The class of a cache of some kind that also has a history."""
    return type(f"Remembering{kind.__name__}", (_Remembering, kind), {"__module__": __name__})


def history_of(cache: Any, owner: str) -> History:
    """The history of `cache`, which gets an empty one if nothing has been read with it.

    Raises:
        StateError: the cache holds tokens that this bank has not seen, or the history of another
            patched model.
    """
    seen = cache.get_seq_length()
    if not isinstance(cache, _Remembering):
        if seen:
            raise StateError(
                f"This cache already holds {seen} tokens that were read without the bank, so it is "
                "not known which they were. Read the text again with a fresh cache."
            )
        adopt(cache, History(owner))
    history: History = cache.history
    refuse_other_owner(history.owner, owner)
    if len(history) != seen:
        raise StateError(
            f"This cache holds {seen} tokens, of which the bank has seen {len(history)}: some were "
            "read while the memory was disabled. Read the text again with a fresh cache."
        )
    return history


def adopt(cache: Any, history: History) -> None:
    """Let `cache` remember `history`."""
    if not isinstance(cache, _Remembering):
        cache.__class__ = remembering(type(cache))
    cache.history = history


def real_ids(ids: Tensor, mask: Any, begin: int) -> Tensor:
    """`ids` [B, T], from slot `begin` on, with `PAD` where the attention mask says that there is no
    token: [B, P + T], or the causal [B, 1, T, columns] that a static cache comes with, one for each
    kind of layer.

    Raises:
        StateError: the mask is more than padding, so rows may hold several texts.
    """
    new = ids.shape[1]
    if isinstance(mask, dict):
        # one that hides what is far tells nothing of padding: without another it is refused below
        mask = mask.get("full_attention", mask)
    if isinstance(mask, Tensor) and mask.dim() == 4:
        known, padding = padding_alone(mask, len(ids), new, begin)
        if known:
            real = None if padding is None else padding[:, 0, -1, begin : begin + new]
            return ids if real is None else ids.masked_fill(~real, PAD)
    if mask is None:
        return ids
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise StateError(
            "A bank needs to know which tokens are padding, and this attention mask is more than "
            "that (packed sequences, or a 4-D mask). Pass one sequence per row and a 2-D mask."
        )
    return ids.masked_fill(~mask[:, mask.shape[1] - new :].bool(), PAD)


def refuse_packing(real: Tensor, positions: Any) -> None:
    """Raise if the positions [B | 1, T] of tokens begin anew inside a row; `real` [B, T] bool says
    which are no padding.

    Raises:
        StateError: they do, so that rows hold several texts.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 2 or real.shape[1] < 2:
        return
    follows = real[:, 1:] & real[:, :-1]
    if bool(((positions.diff(dim=-1) < 1) & follows).any()):
        raise StateError(
            "position_ids begin anew inside a row (packed sequences), and a memory would mix one "
            "text with another. Pass one sequence per row."
        )


def same_routes(first: Tensor | None, second: Tensor | None) -> bool:
    """Whether two pins are the same."""
    if first is None or second is None:
        return first is second
    return torch.equal(first.cpu(), second.cpu())
