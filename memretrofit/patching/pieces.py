"""The sequence seam: a patched model reads a text in pieces, and a method acts around each.

`model(...)` and `generate` are called as always. One call is answered so::

    reader = make(model)                                 one for the call
    begin  = reader.enter(cache, own)                    slots that the cache has seen
    bounds = begin, cuts in (begin, end), end            `reader.cuts`: whatever the calls
    for each piece:  reader.before(piece)
                     output = forward(**piece.call)      inside reader.around(piece)
                     output = reader.after(piece, output)
    logits, hidden states and loss of all pieces together, as of one forward

Cuts are slots (tokens of a row from 0, padding included). A reader derives them from the slots
themselves, or from where each row's padding ends, never from the call: then one call is any split
of it. Rows may be cut at different slots: a piece ends where any of them is.

What lasts longer than a call belongs in the cache, where it moves with beams and is cropped and
copied with the keys. `before` may change `piece.call`: other embeddings, with memory tokens in
front or write tokens behind, another cache, positions or mask; `after` then returns an output of
the piece's own T tokens. So a recurrence over segments cuts where segments end, puts its memory in
front of the tokens in `before`, and writes in `after` where `piece.closes`.

Where a crop took something at the last token away that the reader needs, the token is read once
more (`Reader.lost`), and its row of the output is dropped.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from memretrofit.errors import StateError, UnsupportedModelError
from memretrofit.patching.generating import uncompiled
from memretrofit.patching.ledger import ledger_of
from memretrofit.patching.wrapping import named_arguments

JOINED = {"logits", "loss", "past_key_values", "hidden_states"}
"""What can be put together from the outputs of several pieces."""


@dataclass(kw_only=True)
class Piece:
    """T tokens that are read together: the slots `low` to `high` - 1."""

    low: int
    high: int
    ids: Tensor | None
    """[B, T], or None where the caller passed embeddings."""
    embeds: Tensor | None
    """[B, T, E], or None where the caller passed ids."""
    real: Tensor | None
    """[B, high] bool: the tokens so far that are no padding; None without padding."""
    closes: bool
    """Whether the piece ends at a cut, not only with the call."""
    wanted: int
    """The first slot whose logits the caller asked for."""
    call: dict[str, Any]
    """The arguments of the model's own forward; `Reader.before` may change them."""


class Reader:
    """What a method does around the pieces of one call; this one does nothing."""

    instead_of_checkpointing = (
        "Train on texts that are read in one piece with use_cache=False, or turn it off: "
        "model.gradient_checkpointing_disable()."
    )
    """Ends the error."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.ledger = model, ledger_of(model)

    def passes(self, tokens: int) -> bool:
        """Whether the model may answer a call of so many tokens without a cache on its own."""
        return False

    def cannot(self, call: dict[str, Any]) -> None:
        """`call` has no tokens, or ids and embeddings, or a mask that is more than padding: refuse
        it here, or leave it to the model.
        """

    def accept(self, call: dict[str, Any]) -> None:
        """Look at the whole call before anything of it is read; raise what it cannot be."""

    def enter(self, cache: Cache, own: bool) -> int:
        """Take the cache of this call, made for it alone if `own`; slots that it has seen."""
        return cache.get_seq_length()

    def undo(self) -> None:
        """The call ended in an error: put its cache back as it was when the call began, where that
        can be done.
        """

    def lost(self) -> Tensor | None:
        """[B, 1] id of the last token, if it must be read again."""
        return None

    def cuts(self, begin: int, end: int, real: Tensor | None) -> Sequence[int]:
        """The slots in (begin, end] before which a piece ends, in order. `real` [B, end] bool."""
        return ()

    def before(self, piece: Piece) -> None:
        """Prepare `piece`, which is read next."""

    def around(self, piece: Piece) -> AbstractContextManager[None]:
        """Open while `piece` is read."""
        return nullcontext()

    def after(self, piece: Piece, output: Any) -> Any:
        """What the caller gets of `piece`: an output whose logits and hidden states are those of
        its T tokens.
        """
        return output


def read_in_pieces(model: PreTrainedModel, make: Callable[[Any], Reader]) -> None:
    """Let the patched `model` read in pieces, with the reader that `make` builds for each call."""
    reading = functools.partial(_read, model, model.forward, make)
    functools.update_wrapper(reading, model.forward)  # `generate` looks at the signature
    ledger_of(model).replace_method(model, "forward", reading)


@uncompiled()
def _read(
    model: Any, forward: Callable[..., Any], make: Callable[[Any], Reader], *args: Any, **kw: Any
) -> Any:
    """`model.forward(*args, **kw)`, in pieces."""
    controls = ledger_of(model).controls
    call = named_arguments(forward, args, kw)
    if controls.disabled or controls.intercept:
        return forward(**call)
    tokens = [call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None]
    mask = call.get("attention_mask")
    reader = make(model)
    if len(tokens) != 1 or (mask is not None and mask.dim() != 2):
        reader.cannot(call)
        return forward(**call)
    reading = _Reading(model, forward, reader, call)
    if reading.cache is None and reading.reader.passes(reading.new):
        return forward(**call)
    return reading.run()


class _Reading:
    """One call of a model that reads in pieces."""

    real: Tensor | None
    """[B, slots] bool: what is no padding, up to the end of the call."""

    def __init__(
        self, model: Any, forward: Callable[..., Any], reader: Reader, call: dict[str, Any]
    ) -> None:
        self.model, self.forward, self.reader = model, forward, reader
        self.controls = ledger_of(model).controls
        self.call = dict(call)
        self.named = inspect.signature(forward).parameters
        self.labels = self.call.pop("labels", None)
        self.kept = self.call.pop("logits_to_keep", 0)
        self.returns_dict = self.call.pop("return_dict", None)
        use_cache = self.call.pop("use_cache", None)
        if use_cache is None:
            use_cache = model.config.get_text_config().use_cache
        self.cache: Cache | None = self.call.pop("past_key_values", None)
        self.returns_cache = use_cache or self.cache is not None
        if self.cache is None and use_cache:
            self.cache = DynamicCache(config=model.config)

    @property
    def new(self) -> int:
        """Tokens of the call."""
        given = self.call.get("input_ids")
        return (self.call["inputs_embeds"] if given is None else given).shape[1]

    def run(self) -> Any:
        """The output of the model for all pieces together."""
        if self.model.training and self.model.is_activation_checkpointing:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} reads {self.new} tokens in pieces on a cache, and "
                "gradient checkpointing in Transformers leaves the cache out. "
                f"{self.reader.instead_of_checkpointing}"
            )
        if not self.new:
            raise StateError("0 tokens were given to read; pass at least one.")
        if self.cache is not None:
            begin = self.reader.enter(self.cache, False)
            try:
                return self._run(self.cache, begin)
            except BaseException:
                self.reader.undo()
                raise
        cache = DynamicCache(config=self.model.config)
        with _nothing_carried(self.controls):
            return self._run(cache, self.reader.enter(cache, True))

    def _run(self, cache: Cache, begin: int) -> Any:
        again = self.reader.lost()
        if again is not None:
            self._put_before(again)
            cache.crop(-1)
            begin -= 1
        end = begin + self.new
        self._check(end)
        mask = self.call.get("attention_mask")
        self.real = None if mask is None else mask.bool()
        keep = self._kept_from(end, begin + (again is not None))
        cuts = self.reader.cuts(begin, end, self.real)
        bounds = [begin, *(x for x in cuts if x < end), end]
        last, logits, hidden = None, [], []
        for low, high in itertools.pairwise(bounds):
            piece = self._piece(slice(low - begin, high - begin), low, high, high in cuts, keep)
            self.reader.before(piece)
            call = {"past_key_values": cache, "use_cache": True, "return_dict": True} | piece.call
            with self.reader.around(piece):
                output = self.forward(**call)
            last = self.reader.after(piece, output)
            # a copy: a slice would keep the logits of the whole piece alive
            kept = last.logits[:, max(keep - low, 0) :]
            logits.append(kept if kept.shape == last.logits.shape else kept.clone())
            hidden.append(last.get("hidden_states"))
        return self._joined(last, cache, logits, hidden, int(again is not None))

    def _check(self, end: int) -> None:
        mask = self.call.get("attention_mask")
        if mask is not None and mask.shape[1] != end:
            raise StateError(
                f"The attention mask is {mask.shape[1]} tokens wide, and with this call the text "
                f"has {end}: {end - self.new} that the cache has seen and {self.new} new ones. "
                "Pass a mask of all, or none."
            )
        self.reader.accept(self.call)

    def _piece(self, columns: slice, low: int, high: int, closes: bool, keep: int) -> Piece:
        call = dict(self.call)
        for name in ("input_ids", "inputs_embeds"):
            if call.get(name) is not None:
                call[name] = call[name][:, columns]
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"][..., columns]
        if call.get("attention_mask") is not None:
            call["attention_mask"] = call["attention_mask"][:, :high]
        return Piece(
            low=low,
            high=high,
            ids=call.get("input_ids"),
            embeds=call.get("inputs_embeds"),
            real=None if self.real is None else self.real[:, :high],
            closes=closes,
            wanted=keep,
            call=call,
        )

    def _kept_from(self, end: int, begin: int) -> int:
        """The first slot whose logits the caller wants."""
        if isinstance(self.kept, int) and self.kept:
            return max(end - self.kept, begin)
        return begin

    def _put_before(self, token: Tensor) -> None:
        """Put the last token of the cache before the new ones."""
        call = self.call
        if call.get("input_ids") is not None:
            call["input_ids"] = torch.cat([token, call["input_ids"]], dim=1)
        else:
            embedded = self.model.get_input_embeddings()(token)
            call["inputs_embeds"] = torch.cat([embedded, call["inputs_embeds"]], dim=1)
        positions = call.get("position_ids")
        if positions is not None:
            before = (positions[..., :1] - 1).clamp(min=0)
            call["position_ids"] = torch.cat([before, positions], dim=-1)

    def _joined(self, output: Any, cache: Cache, logits: list, hidden: list, again: int) -> Any:
        """One output, as the model would have given it."""
        count = len(logits)
        unknown = [name for name in output if name not in JOINED and output[name] is not None]
        if unknown and (count > 1 or again):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} was asked for {', '.join(unknown)} of an input that "
                f"is read in {count} pieces, and these cannot be joined. Do not ask for them, or "
                "pass fewer tokens at once."
            )
        fields = dict(output)
        fields["logits"] = torch.cat(logits, dim=1)
        if isinstance(self.kept, Tensor):
            fields["logits"] = fields["logits"][:, self.kept]
        if output.get("hidden_states") is not None:
            parts = zip(*hidden, strict=True)
            fields["hidden_states"] = tuple(torch.cat(p, dim=1)[:, again:] for p in parts)
        if self.labels is not None:
            fields["loss"] = self.model.loss_function(
                logits=fields["logits"],
                labels=self.labels,
                vocab_size=self.model.config.get_text_config().vocab_size,
                **{k: v for k, v in self.call.items() if k not in self.named},
            )
        fields["past_key_values"] = cache if self.returns_cache else None
        joined = type(output)(**fields)
        as_dict = self.returns_dict
        if as_dict is None:
            as_dict = getattr(self.model.config, "return_dict", True)
        return joined if as_dict else joined.to_tuple()


@contextmanager
def _nothing_carried(controls: Any):
    """A cache of the reader's own is no new conversation."""
    carried, controls.carried = controls.carried, None
    try:
        yield
    finally:
        controls.carried = carried
