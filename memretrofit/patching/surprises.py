"""What a text that is read in pieces says of its tokens: their surprise, and the event of each.

The first piece ends when sinks and window are full, each later one at most a window after that
(`Edges.piece`). So whatever leaves the window during a piece came in an earlier one, and what the
model knows of a token only at the end of a forward is known before the token is folded.

Notes are columns of the cache layers beside the keys. The first layer keeps, of each token::

    token, surprise, surprising (whether it stood out), cut and origin (`modules.edges`)

and what was predicted after those slots which the next token may follow; each layer keeps the
token's place in its event, for its memory. Where a crop took the prediction at the last token away,
that token is read once more, and keeps the surprise that it had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from memretrofit.errors import ConfigError
from memretrofit.modules.edges import NOT_STORED, Edges, Tail
from memretrofit.ops.segment import boundaries, resampled, surprise
from memretrofit.patching.cache import NOTES, MemoryLayer, upgrade
from memretrofit.patching.lookup import NO_TOKEN, TokenLookup
from memretrofit.patching.pieces import Piece, Reader
from memretrofit.patching.surgery import attention_ledger_of


@dataclass(frozen=True, kw_only=True)
class Surprises:
    """T new tokens, and what stands out of them."""

    surprising: Tensor
    """[B, T] bool."""
    history: Tensor
    """[B, h] the same of the slots before, as far as the window reaches."""
    ranks: Tensor
    """[B, T] index of each among its row's real tokens; -1 for padding."""
    window: int


Segmentation = Literal["surprise", "fixed", "random"]

SEGMENTATIONS: dict[Segmentation, Callable[[Surprises], Tensor]] = {
    "surprise": lambda found: found.surprising,
    "fixed": lambda found: torch.zeros_like(found.surprising),
    "random": lambda found: resampled(found.surprising, found.ranks, found.window, found.history),
}
"""Where a text asks to be cut, [B, T] bool: where it surprises, nowhere, or as often but anywhere.
"""


class SurpriseReader(Reader):
    """Notes the surprise of each token and the event that it belongs to."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        threshold: float,
        segmentation: Callable[[Surprises], Tensor],
        edges: Edges,
    ) -> None:
        super().__init__(model)
        self.threshold, self.segmentation, self.edges = threshold, segmentation, edges
        self.seams = list(attention_ledger_of(model).seams.values())
        memory = self.seams[0].memory
        override = self.ledger.controls.window
        self.window, self.sinks = override or (memory.sliding_window, memory.num_sink_tokens)
        self.layers: list[MemoryLayer] = []
        self.tokens_of = TokenLookup(model.get_input_embeddings())  # type: ignore[arg-type]
        self.expected: Tensor | None = None
        self.noted: dict[str, Tensor] = {}
        self.ids: Tensor | None = None

    def passes(self, tokens: int) -> bool:
        """Nothing leaves the window of a fresh cache."""
        return tokens <= self.window + self.sinks

    def enter(self, cache: Cache, own: bool) -> int:
        """Put memory layers into `cache`; in another window only if it is the call's own."""
        window = (self.window, self.sinks) if own else None
        self.layers = [
            upgrade(cache, seam.layer_idx, seam.memory, seam.owner.key, window)
            for seam in self.seams
            if cache.layer_class_to_replicate is not None or seam.layer_idx < len(cache.layers)
        ]
        return self.first.seen

    @property
    def first(self) -> MemoryLayer:
        """The layer that keeps the notes."""
        return self.layers[0]

    def lost(self) -> Tensor | None:
        """The last token, if its prediction was cropped and the token is known."""
        seen, token = self.first.seen, self.first.streams["token"].view
        if not seen or seen - 1 in self.first.logits or token is None:
            return None
        if bool((token[:, -1] == NO_TOKEN).any()):
            return None
        surprises = self.first.streams["surprise"].view
        assert surprises is not None
        self.expected = surprises[:, -1, 0].clone()
        return token[:, -1].clone()

    def cuts(self, begin: int, end: int, real: Tensor | None) -> list[int]:
        """Sinks and window, then as many tokens at a time as the edges allow.

        Raises:
            ConfigError: the window is too small for the edges.
        """
        if self.ledger.controls.silenced:
            return []  # nothing is folded
        step = self.edges.piece(self.window)
        if step < 1:
            raise ConfigError(
                f"sliding_window={self.window} is too small: an edge between events is moved by "
                "what lies around it, and tokens would leave before their event is known. Choose "
                "a larger window, a smaller max_event_size, or refinement='none'."
            )
        return [x for x in range(self.window + self.sinks, end + 1, step) if x > begin]

    def before(self, piece: Piece) -> None:
        """Make room for the notes of `piece`: as many columns as its keys will be."""
        ids = piece.ids
        if ids is None:
            assert piece.embeds is not None
            ids = self.tokens_of(piece.embeds)
        self.ids = ids
        nothing = {name: torch.zeros_like(ids) for name in NOTES}
        nothing |= {"token": ids.clone(), "place": torch.full_like(ids, NOT_STORED)}
        nothing["surprise"] = torch.full(ids.shape, torch.nan, device=ids.device)
        # copies: what leaves the window is overwritten while the piece is read
        self.noted = {name: self._kept(name, nothing[name]) for name in NOTES}
        for name in NOTES:
            for layer in self.layers if name == "place" else self.layers[:1]:
                layer.streams[name].append(nothing[name][..., None].clone())

    def _kept(self, name: str, like: Tensor) -> Tensor:
        """[B, h] a note of the last tokens, as far as the window reaches."""
        view = self.first.streams[name].view
        if view is None:
            return like[:, :0]
        return view[:, self.first.pinned :, 0][:, -self.first.sliding_window :].clone()

    def after(self, piece: Piece, output: Any) -> Any:
        """Note what the logits of `piece` say."""
        layer, logits = self.first, output.logits.detach()
        window, noted = layer.sliding_window, self.noted
        found = self._surprises(piece, logits)
        ranks = self._ranks(piece)
        surprising = boundaries(found, window, self.threshold, noted["surprise"])
        asks = self.segmentation(
            Surprises(
                surprising=surprising,
                history=noted["surprising"].bool(),
                ranks=ranks,
                window=window,
            )
        )
        cuts = asks.long().masked_fill(ranks < layer.num_sink_tokens, NOT_STORED)
        tail = Tail(
            end=piece.high,
            cuts=torch.cat([noted["cut"], cuts], dim=1),
            places=noted["place"],
            origins=noted["origin"],
            similarity=self._similarity,
        )
        places, origins = self.edges.decide(tail)
        _fill(layer, "surprise", found)
        _fill(layer, "surprising", surprising)
        _fill(layer, "cut", cuts)
        _fill(layer, "origin", origins)
        for each in self.layers:
            _fill(each, "place", places)
        # what a crop may bring back to the end: of these, those that the caller wanted to see
        unsure = max(layer.confirmed - 1, 0) if layer.record_past else piece.high
        layer.logits = {slot: x for slot, x in layer.logits.items() if slot >= unsure}
        for slot in {*range(max(unsure, piece.low, piece.wanted), piece.high), piece.high - 1}:
            layer.logits[slot] = logits[:, slot - piece.low].clone()
        return output

    def _surprises(self, piece: Piece, logits: Tensor) -> Tensor:
        """[B, T] of the piece's tokens; NaN where nothing predicted the token."""
        ids = self.ids
        assert ids is not None
        before = self.first.logits.get(piece.low - 1, torch.full_like(logits[:, 0], torch.nan))
        found = surprise(torch.cat([before[:, None], logits[:, :-1]], dim=1), ids.clamp(min=0))
        if self.expected is not None:
            found[:, 0], self.expected = self.expected, None
        known = ids != NO_TOKEN
        if piece.low == 0:
            known[:, 0] = False
        if piece.real is not None:
            real = F.pad(piece.real, (1, 0))
            known = known & real[:, piece.low + 1 :] & real[:, piece.low : piece.high]
        return found.masked_fill(~known, torch.nan)

    def _ranks(self, piece: Piece) -> Tensor:
        """[B, T] index of each token among its row's real tokens; -1 for padding."""
        assert self.ids is not None
        if piece.real is None:
            slots = torch.arange(piece.low, piece.high, device=self.ids.device)
            return slots.expand_as(self.ids)
        rank = piece.real.cumsum(-1) - 1
        return rank.masked_fill(~piece.real, -1)[:, piece.low :]

    def _similarity(self, row: int, slots: Tensor) -> Tensor:
        """[m, m] inner products of keys before the rotary embedding, over layers and heads."""
        assert self.ids is not None
        total = torch.zeros(len(slots), len(slots), device=self.ids.device)
        for layer in self.layers:
            keys = layer.streams["unrotated"].view
            assert keys is not None
            # what was dropped is only asked for where nothing is folded (`memory_silenced`)
            columns = (slots.to(keys.device) - layer.first + layer.pinned).clamp(min=0)
            chosen = keys[row].detach()[:, columns].float()
            total += (chosen @ chosen.mT).sum(0).to(total.device)  # layers may lie on many devices
        return total.cpu()


def _fill(layer: MemoryLayer, stream: str, found: Tensor) -> None:
    """Write the last columns, those that are still kept."""
    kept = layer.streams[stream].view
    assert kept is not None
    count = min(found.shape[1], kept.shape[1] - layer.pinned)
    if count:
        kept[:, -count:, 0] = found[:, -count:].to(kept.dtype)
