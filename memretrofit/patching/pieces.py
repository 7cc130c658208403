"""The sequence seam: a patched model reads a long input in pieces, and notes what each piece said.

The places at which a text is cut are slots, so they do not depend on the calls that bring it: the
first piece ends when sinks and window are full, each later one a window after that. So whatever
leaves the window during a piece came in an earlier one, and what the model knows of a token only at
the end of a forward (here: its surprise) is known before the token is folded.

`model(...)` and `generate` are called as always. Notes are columns of the cache layers beside the
keys: they move with beams, and are cropped and copied with them. Where a crop took the prediction
at the last token away, that token is read once more.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from memretrofit.errors import UnsupportedModelError
from memretrofit.ops.segment import surprise
from memretrofit.patching.cache import MemoryLayer, upgrade
from memretrofit.patching.surgery import ledger_of

NO_TOKEN = -1
"""Id of an embedding that is no token's."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """T tokens that were read, and what is known of those before them."""

    surprises: Tensor
    """[B, T] nats; NaN where nothing predicted the token."""
    history: Tensor
    """[B, h] the same of the slots before, as far as the window reaches."""
    stored: Tensor
    """[B, T] bool: whether the token will leave the window into a memory: no sink, no padding."""
    size: Tensor
    """[B] tokens that the open event holds."""


Segment = Callable[[Piece, int], Tensor]
"""(piece, window) to the place of each token in its event [B, T], -1 where it is not stored."""


def read_in_pieces(model: PreTrainedModel, segment: Segment) -> None:
    """Let the patched `model` read in pieces, and keep what `segment` says of their tokens."""
    reader = functools.partial(_read, model, model.forward, segment)
    functools.update_wrapper(reader, model.forward)  # `generate` looks at the signature
    ledger_of(model).replace_method(model, "forward", reader)


def _read(model: Any, forward: Callable[..., Any], segment: Segment, *args: Any, **kwargs: Any):
    """`model.forward(*args, **kwargs)`, in pieces."""
    controls = ledger_of(model).controls
    call = _arguments(forward, args, kwargs)
    tokens = [call[name] for name in ("input_ids", "inputs_embeds") if call.get(name) is not None]
    mask = call.get("attention_mask")
    if controls.disabled or controls.intercept or len(tokens) != 1:
        return forward(**call)
    if mask is not None and mask.dim() != 2:  # attention refuses it, and says why
        return forward(**call)
    reading = _Reading(model, forward, segment, call)
    if reading.cache is None and reading.fits():
        return forward(**call)
    return reading.run()


def _arguments(forward: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    signature = inspect.signature(forward)
    given = dict(signature.bind_partial(*args, **kwargs).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given


class _Reading:
    """One call of a model that reads in pieces."""

    def __init__(
        self, model: Any, forward: Callable[..., Any], segment: Segment, call: dict[str, Any]
    ) -> None:
        self.model, self.forward, self.segment = model, forward, segment
        self.ledger = ledger_of(model)
        self.call = dict(call)
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
        memory = next(iter(self.ledger.seams.values())).memory
        window = self.ledger.controls.window
        self.window, self.sinks = window or (memory.sliding_window, memory.num_sink_tokens)

    @property
    def new(self) -> int:
        """Tokens of the call."""
        given = self.call.get("input_ids")
        return (self.call["inputs_embeds"] if given is None else given).shape[1]

    def fits(self) -> bool:
        """Whether nothing leaves the window of a fresh cache."""
        return self.new <= self.window + self.sinks

    def run(self) -> Any:
        """The output of the model for all pieces together."""
        if self.cache is not None:
            return self._run(self.cache, None)
        if self.model.training and self.model.is_activation_checkpointing:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} reads {self.new} tokens in pieces on a cache, and "
                "gradient checkpointing in Transformers leaves the cache out. Train on at most "
                f"{self.window + self.sinks} tokens, or turn checkpointing off."
            )
        with _nothing_carried(self.ledger.controls):
            return self._run(DynamicCache(config=self.model.config), (self.window, self.sinks))

    def _run(self, cache: Cache, window: tuple[int, int] | None) -> Any:
        layers = [
            upgrade(cache, seam.layer_idx, seam.memory, seam.owner.key, window)
            for seam in self.ledger.seams.values()
            if cache.layer_class_to_replicate is not None or seam.layer_idx < len(cache.layers)
        ]
        notes = _Notes(layers)
        again = int(notes.forgotten())
        begin = layers[0].seen - again
        if again:
            self._repeat(notes.last_token())
            expected = notes.last_surprise()
            cache.crop(-1)
        else:
            expected = None
        total = begin + self.new
        keep = self._kept_from(total, begin + again)
        ids = self._ids()
        count, last, logits, hidden = 0, None, [], []
        for low, high in self._pieces(begin, total):
            piece = slice(low - begin, high - begin)
            notes.open(ids[:, piece])
            output = self.forward(**self._piece(piece, high), past_key_values=cache)
            found = output.logits
            notes.close(
                self.segment, found.detach(), ids[:, piece], self._real(high), expected, keep
            )
            expected = None
            count, last = count + 1, output
            # a copy: a slice would keep the logits of the whole piece alive
            kept = found[:, max(keep - low, 0) :]
            logits.append(kept if kept.shape == found.shape else kept.clone())
            hidden.append(output.get("hidden_states"))
        return self._joined(last, count, logits, hidden, again)

    def _pieces(self, begin: int, total: int) -> list[tuple[int, int]]:
        first = self.window + self.sinks
        cuts = [x for x in range(first, total, self.window) if x > begin]
        if self.ledger.controls.silenced:
            cuts = []  # nothing is folded
        return list(zip([begin, *cuts], [*cuts, total], strict=True))

    def _piece(self, piece: slice, high: int) -> dict[str, Any]:
        call = dict(self.call)
        for name in ("input_ids", "inputs_embeds"):
            if call.get(name) is not None:
                call[name] = call[name][:, piece]
        if call.get("position_ids") is not None:
            call["position_ids"] = call["position_ids"][..., piece]
        if call.get("attention_mask") is not None:
            call["attention_mask"] = call["attention_mask"][:, :high]
        return call | {"use_cache": True, "return_dict": True}

    def _real(self, high: int) -> Tensor | None:
        mask = self.call.get("attention_mask")
        return None if mask is None else mask[:, :high].bool()

    def _kept_from(self, total: int, begin: int) -> int:
        """The first slot whose logits the caller wants."""
        if isinstance(self.kept, int) and self.kept:
            return max(total - self.kept, begin)
        return begin

    def _ids(self) -> Tensor:
        """[B, T] the tokens; an embedding that is a row of the model's table is that token."""
        ids = self.call.get("input_ids")
        if ids is not None:
            return ids
        embeds = self.call["inputs_embeds"].detach()
        table = self.model.get_input_embeddings()
        rows = torch.nn.functional.normalize(table.weight.detach(), dim=-1)
        ids = (embeds.to(rows) @ rows.mT).argmax(-1)
        found = (table(ids) == embeds).all(-1)
        return ids.masked_fill(~found, NO_TOKEN)

    def _repeat(self, token: Tensor) -> None:
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

    def _joined(self, output: Any, count: int, logits: list, hidden: list, again: int) -> Any:
        """One output, as the model would have given it."""
        known = {"logits", "loss", "past_key_values", "hidden_states"}
        unknown = [name for name in output if name not in known and output[name] is not None]
        if unknown and (count > 1 or again):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} was asked for {', '.join(unknown)} of an input that "
                f"is read in {count} pieces, and these cannot be joined. Do not ask for "
                f"them, or pass at most {self.window} tokens at once."
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
                **{k: v for k, v in self.call.items() if k == "num_items_in_batch"},
            )
        if not self.returns_cache:
            fields["past_key_values"] = None
        joined = type(output)(**fields)
        as_dict = self.returns_dict
        if as_dict is None:
            as_dict = getattr(self.model.config, "return_dict", True)
        return joined if as_dict else joined.to_tuple()


class _Notes:
    """What is kept of each token of a text, in the streams of its cache layers."""

    def __init__(self, layers: list[MemoryLayer]) -> None:
        self.layers, self.first = layers, layers[0]
        self.history: Tensor | None = None
        self.places: Tensor | None = None

    def forgotten(self) -> bool:
        """Whether the last token's prediction was cropped, though the token is known."""
        seen, token = self.first.seen, self.first.streams["token"].view
        if not seen or seen - 1 in self.first.logits or token is None:
            return False
        return bool((token[:, -1] != NO_TOKEN).all())

    def last_token(self) -> Tensor:
        """[B, 1] id of the last token."""
        token = self.first.streams["token"].view
        assert token is not None
        return token[:, -1].clone()

    def last_surprise(self) -> Tensor:
        """[B] the last token's own surprise."""
        surprises = self.first.streams["surprise"].view
        assert surprises is not None
        return surprises[:, -1, 0].clone()

    def open(self, ids: Tensor) -> None:
        """Make room for a piece: its columns are as many as its keys will be."""
        window = self.first.sliding_window
        empty = torch.full((*ids.shape, 1), torch.nan, device=ids.device)
        surprises, places = (self.first.streams[x].view for x in ("surprise", "place"))
        # copies: what leaves the window is overwritten while the piece is read
        self.history = empty[:, :0, 0] if surprises is None else surprises[:, -window:, 0].clone()
        none = torch.full_like(ids[:, :1], -1)
        self.places = none if places is None else places[:, -window:, 0].clone()
        self.first.streams["token"].append(ids[..., None].clone())
        self.first.streams["surprise"].append(empty)
        for layer in self.layers:
            layer.streams["place"].append(torch.full_like(ids, -1)[..., None])

    def close(
        self,
        segment: Segment,
        logits: Tensor,
        ids: Tensor,
        real: Tensor | None,
        expected: Tensor | None,
        keep: int,
    ) -> None:
        """Note what the logits [B, T, vocabulary] of the piece say; `expected` is the first token's
        surprise, where it is known already; logits from the slot `keep` on are wanted.
        """
        assert self.history is not None
        assert self.places is not None
        layer, time = self.first, ids.shape[1]
        low, high = layer.seen - time, layer.seen
        before = layer.logits.get(low - 1, torch.full_like(logits[:, 0], torch.nan))
        found = surprise(torch.cat([before[:, None], logits[:, :-1]], dim=1), ids.clamp(min=0))
        if expected is not None:
            found[:, 0] = expected
        known = ids != NO_TOKEN
        if low == 0:
            known[:, 0] = False
        stored = torch.arange(low, high, device=ids.device).expand_as(ids) >= layer.num_sink_tokens
        if real is not None:
            rank = real.cumsum(-1)[:, low:]
            known = known & real[:, low:] & torch.nn.functional.pad(real, (1, 0))[:, low:high]
            stored = real[:, low:] & (rank > layer.num_sink_tokens)
        found = found.masked_fill(~known, torch.nan)
        held = torch.arange(1, self.places.shape[1] + 1, device=ids.device) * (self.places >= 0)
        last = self.places.gather(1, (held.argmax(-1, keepdim=True)))
        piece = Piece(
            surprises=found, history=self.history, stored=stored, size=last[:, 0].clamp(min=-1) + 1
        )
        places = segment(piece, layer.sliding_window)
        _fill(layer, "surprise", found)
        for each in self.layers:
            _fill(each, "place", places)
        # what a crop may bring back to the end: of these, those that the caller wanted to see
        unsure = max(layer.confirmed - 1, 0) if layer.record_past else high
        layer.logits = {slot: x for slot, x in layer.logits.items() if slot >= unsure}
        for slot in {*range(max(unsure, low, keep), high), high - 1}:
            layer.logits[slot] = logits[:, slot - low].clone()


def _fill(layer: MemoryLayer, stream: str, found: Tensor) -> None:
    """Write the columns of a piece that are still kept."""
    kept = layer.streams[stream].view
    assert kept is not None
    count = min(found.shape[1], kept.shape[1] - layer.pinned)
    if count:
        kept[:, -count:, 0] = found[:, -count:].to(kept.dtype)


@contextmanager
def _nothing_carried(controls: Any):
    """A cache of the reader's own is no new conversation."""
    carried, controls.carried = controls.carried, None
    try:
        yield
    finally:
        controls.carried = carried
