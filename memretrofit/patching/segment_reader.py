"""Reads the pieces of a text in segments.

Cuts are where a row opens or closes a span. Before a piece, rows that open one lose their columns
and get those of the opening; the piece's forward reads the session's own cache, each row's columns
under a mask where rows are at different places; after it, rows that close a span write, and lose
their columns again. So a row of a batch is that row alone, and one call is any split of it.

Rows whose segments end at different tokens make more and shorter forwards: up to one for each row
and span.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from memretrofit.errors import ConfigError, StateError
from memretrofit.modules.segment_memory import Columns, Past, State
from memretrofit.patching.history import refuse_packing
from memretrofit.patching.pieces import Piece, Reader
from memretrofit.patching.segment_columns import (
    KEEP,
    Parts,
    Plan,
    chooses_logits,
    known,
    nothing_like,
    or_ones,
    slides,
    tokens_of,
    where_rows,
)
from memretrofit.patching.segment_visit import Visit, segment_ledger_of, visiting
from memretrofit.patching.session import Session, session_of
from memretrofit.patching.wrapping import positions_of

OURS = ("attention_mask", "position_ids", "cache_position", "input_ids", "inputs_embeds")
"""Arguments of a forward that differ between a text and its segments."""


class SegmentReader(Reader):
    """Opens, reads and closes the spans of every row of one call."""

    session: Session
    plan: Plan
    begin: int
    """The first slot of the call."""
    new: Tensor | None
    """[B, T] bool, on the CPU: which of the tokens of the call are no padding; None: all."""
    closed: Tensor
    """[B] segments that each row had closed before the piece."""
    instead_of_checkpointing = (
        "Turn it off with model.gradient_checkpointing_disable(); the recipe's train.recurrence."
        "credit: replay keeps the activations of one segment alone."
    )

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.segments = segment_ledger_of(model)
        self.memory, self.controls = self.segments.memory, self.segments.controls
        self.decoder = self.segments.decoder
        self.contiguous = slides(model)
        spans = self.memory.spans
        self.ends = list(itertools.accumulate(spans))
        self.begins = [end - length for end, length in zip(self.ends, spans, strict=True)]
        self.length = self.ends[-1]

    def cannot(self, call: dict[str, Any]) -> None:
        """Refuse what cannot be read in segments.

        Raises:
            StateError: always.
        """
        given = [name for name in ("input_ids", "inputs_embeds") if call.get(name) is not None]
        mask = call.get("attention_mask")
        shape = "" if mask is None else f", with an attention mask of {mask.dim()} dimensions"
        raise StateError(
            "A model that reads in segments needs either input_ids or inputs_embeds, and a 2-D "
            f"attention mask or none; found {' and '.join(given) or 'neither'}{shape}. Pass one "
            "sequence per row."
        )

    def accept(self, call: dict[str, Any]) -> None:
        """Refuse packed rows: a text would read the memory of the one before it.

        Raises:
            StateError: positions begin anew inside a row.
        """
        positions, mask = call.get("position_ids"), call.get("attention_mask")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            real = torch.ones_like(positions) if mask is None else mask
            refuse_packing(real[:, -positions.shape[-1] :].bool(), positions)

    def enter(self, cache: Cache, own: bool) -> int:
        """Find or make the session in `cache`."""
        self.session = session_of(cache, self.segments.owner)
        if not own:  # a cache of ours goes with the error
            self.held = vars(self.session.twin()) | {"earlier": [*self.session.earlier]}
        return self.session.seen

    def undo(self) -> None:
        """Nothing of the call was read."""
        vars(self.session).update(self.held)

    def cuts(self, begin: int, end: int, real: Tensor | None) -> list[int]:
        """Where a row opens or closes a span. The mask is looked at here, once for the call."""
        new = None if real is None else real[:, begin:].cpu()
        self.begin = begin
        self.new = None if new is None or bool(new.all()) else new
        counts, length = self.session.counts, self.length
        edges = {edge % length for edge in self.ends}
        if self.new is None:
            seen = {0} if counts is None else {x % length for x in counts.tolist()}
            firsts = {begin + (edge - n - 1) % length + 1 for edge in edges for n in seen}
            return sorted(x for first in firsts for x in range(first, end + 1, length))
        new = self.new
        ranks = new.cumsum(-1)  # tokens of the row up to and with each slot
        ranks = ranks if counts is None else ranks + counts[:, None]
        wanted = torch.tensor(sorted(edges))
        opens = torch.isin((ranks - 1) % length, wanted) & new
        closes = torch.isin(ranks % length, wanted) & new
        found = {x + begin for x in opens.any(0).nonzero().flatten().tolist()}
        found |= {x + begin + 1 for x in closes.any(0).nonzero().flatten().tolist()}
        return sorted(x for x in found if x > begin)

    def before(self, piece: Piece) -> None:
        """Open the spans that begin with `piece`, and say what its forward has to be."""
        embeds = piece.embeds
        if embeds is None:
            embeds = self.model.get_input_embeddings()(piece.ids)
        columns = slice(piece.low - self.begin, piece.high - self.begin)
        new = None if self.new is None else self.new[:, columns]
        self._begin(len(embeds))
        self.closed = self._counts // self.length
        state = self._read_state()
        openings = self._open(embeds, new, state)
        self.plan = plan = self._plan(openings, embeds, new, state)
        if not plan.opening and not plan.trailing and piece.ids is not None:
            plan.call["input_ids"] = piece.ids
            del plan.call["inputs_embeds"]
        piece.call = {k: x for k, x in piece.call.items() if k not in OURS} | plan.call
        if chooses_logits(type(self.model)):
            high = plan.opening + plan.tokens
            low = high - 1 if piece.wanted >= piece.high else plan.opening
            piece.call[KEEP] = torch.arange(low, high, device=embeds.device)

    @contextmanager
    def around(self, piece: Piece) -> Iterator[None]:
        """The hooks know which columns the forward reads."""
        self.visit = self._visit(self.plan.columns)
        with visiting(self.visit):
            yield

    def after(self, piece: Piece, output: Any) -> Any:
        """Close the spans that end with `piece`, and give back its tokens alone."""
        session, plan = self.session, self.plan
        session.extend(plan.columns.real, plan.opening + plan.tokens, plan.trailing)
        session.counts, session.pieces = plan.counts, plan.pieces
        session.seen, session.open = session.seen + plan.tokens, session.open + plan.tokens
        closings = plan.columns.closings
        if closings:
            session.remember()
            session.open = 0
        for number, closing in enumerate(closings):
            self._write(self.visit, number)
            session.close(closing.rows)
            following = closing.span + 1
            while following < len(self.memory.spans) and not self.memory.spans[following]:
                self._read_again(following, closing.rows)
                following += 1
        return tokens_of(output, plan)

    def _begin(self, rows: int) -> None:
        """The state of a conversation that has not begun, or a check of one that has."""
        session = self.session
        if self.controls.shuffled and rows < 2:
            raise StateError(
                "state_shuffled swaps the states of whole rows; found one row. Pass at least two."
            )
        if session.counts is None:
            session.state = self._first_state(rows)
            session.counts = torch.zeros(rows, dtype=torch.long)
        if len(session.counts) != rows:
            raise StateError(
                f"This cache holds {len(session.counts)} rows, and {rows} were passed. To go on "
                "from one conversation in several ways (beams, a batch of questions), call "
                "cache.batch_repeat_interleave(n) first, or load_memory(..., repeats=n)."
            )

    def _first_state(self, rows: int) -> State:
        fresh = self.segments.begin(rows)
        if self.controls.carried is None:
            return fresh
        carried = session_of(self.controls.carried, self.segments.owner)
        other = carried.state
        if any(k not in other or other[k].shape != x.shape for k, x in fresh.items()):
            raise StateError(
                f"state_carried: the cache holds no state of {rows} rows of this model. Pass a "
                "cache that this model filled with as many rows."
            )
        self.session.written = carried.written
        return dict(other)

    def _read_state(self) -> State:
        """The state as it is read: not always the rows' own."""
        held = self.session.state
        if self.controls.silenced:
            return self.segments.begin(len(self._counts))
        return {k: x.roll(-1, dims=0) for k, x in held.items()} if self.controls.shuffled else held

    @property
    def _counts(self) -> Tensor:
        counts = self.session.counts
        assert counts is not None
        return counts

    def _past(self, state: State, counts: Tensor, embeds: Tensor) -> Past:
        kept = embeds[:, max(embeds.shape[1] - self.memory.kept_tokens, 0) :]
        real = known(kept.shape[1], counts)
        return Past(state=state, segments=self.closed, embeds=kept, real=real)

    def _open(self, embeds: Tensor, new: Tensor | None, state: State) -> Parts:
        """Close the columns of rows that begin a span; what opens it, unless it was read here."""
        counts, session = self._counts, self.session
        first = torch.ones_like(counts, dtype=torch.bool) if new is None else new[:, 0]
        openings = Parts(0)
        for span, begin in enumerate(self.begins):
            rows = first & (counts % self.length == begin)
            if self.memory.spans[span] and bool(rows.any()):
                if not openings.parts:
                    session.remember()
                    session.open = 0
                session.close(rows)
                kept = nothing_like(embeds) if session.embeds is None else session.embeds
                found = self.memory.opening(span, self._past(state, counts, kept))
                openings.add(span, rows, found and found.embeds, found and found.real)
        if self.contiguous and session.ragged(openings.parts):
            self._read_alone(openings, state)
            return Parts(0)
        return openings

    def _plan(self, openings: Parts, embeds: Tensor, new: Tensor | None, state: State) -> Plan:
        """What the forward of a piece reads: openings, tokens [B, T, E] and what trails them."""
        counts, tokens = self._counts, embeds.shape[1]
        added = torch.full_like(counts, tokens) if new is None else new.sum(-1)
        after, pieces = counts + added, self._keep(embeds, new)
        closings = Parts(openings.end + tokens)
        for span, end in enumerate(self.ends):
            rows = (added > 0) & (after % self.length == end % self.length)
            if self.memory.spans[span] and bool(rows.any()):
                joined = torch.cat(pieces, dim=1)
                past, pieces = self._past(state, after, joined), (joined,)
                closings.add(span, rows, self.memory.trailing(span, past), None)
        real = [*openings.real, or_ones(new, embeds), *closings.real]
        columns = self._columns(state, torch.cat(real, dim=1), openings, closings)
        return Plan(
            columns=columns,
            call=self._call([*openings.embeds, embeds, *closings.embeds], columns.real),
            opening=openings.end,
            tokens=tokens,
            trailing=closings.end - closings.begin,
            counts=after,
            pieces=pieces,
        )

    def _read_alone(self, openings: Parts, state: State) -> None:
        """Read openings before the piece, so that every row's columns can be put side by side."""
        if openings.end:
            real = torch.cat(openings.real, dim=1)
            columns = self._columns(state, real, openings, Parts(openings.end))
            with visiting(self._visit(columns)):
                self.decoder(**self._call(openings.embeds, columns.real))
            self.session.extend(columns.real, openings.end, 0)
        if self.session.valid is not None:  # columns are no slots any more: `crop` ends here
            self.session.remember()
            self.session.align()
            self.session.open = 0

    def _columns(self, state: State, real: Tensor, openings: Parts, closings: Parts) -> Columns:
        return Columns(
            state=state,
            segments=self.closed,
            real=None if bool(real.all()) else real,
            openings=tuple(openings.parts),
            closings=tuple(closings.parts),
            written=self.session.written and not self.controls.silenced,
        )

    def _call(self, parts: list[Tensor], real: Tensor | None) -> dict[str, Any]:
        """What the decoder must be called with to read columns behind those of the session."""
        embeds = parts[0] if len(parts) == 1 else torch.cat([x.to(parts[-1]) for x in parts], 1)
        call: dict[str, Any] = {"inputs_embeds": embeds, "use_cache": True}
        call["past_key_values"] = self.session.inner
        mask = self.session.mask_with(real, embeds.shape[:2])
        self._check_positions(mask, embeds.shape[1])
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -embeds.shape[1] :]
            given = {"attention_mask": mask, "position_ids": positions}
            call |= {name: x.to(embeds.device) for name, x in given.items()}
        return call

    def _check_positions(self, mask: Tensor | None, new: int) -> None:
        most = positions_of(self.model)
        used = self.session.columns + new
        if most is None or used <= most:
            return
        used = used if mask is None else int(mask.sum(-1).max())
        if used > most:
            raise ConfigError(
                f"a segment with what stands around it takes {used} positions, and "
                f"{type(self.model).__name__} was trained on {most}: {self.segments.config}. "
                "Shorten segment_length, or carry less."
            )

    def _keep(self, embeds: Tensor, new: Tensor | None) -> tuple[Tensor, ...]:
        """The tokens that may be read again, those of the piece behind the others."""
        session = self.session
        before = session.pieces or (nothing_like(embeds),)
        if not self.memory.kept_tokens:
            return before
        width = sum(piece.shape[1] for piece in before)
        spare = width - session.open - self.memory.kept_tokens
        if spare > 0 and session.embeds is not None:
            before, width = (session.embeds[:, spare:],), width - spare
        if new is None or bool(new.all()):
            # a slice would keep what it was cut from
            part = embeds.untyped_storage().nbytes() > embeds.nbytes
            return (*before, embeds.clone() if part else embeds)
        joined = torch.cat([*before, embeds], dim=1)
        real = torch.cat([known(width, self._counts), new], dim=1)
        order = real.int().argsort(dim=-1, stable=True)  # padding goes to the left
        index = order.to(joined.device)[..., None]
        return (joined.gather(1, index.expand_as(joined)),)

    def _visit(self, columns: Columns) -> Visit:
        return Visit(columns, self.session.state, [{} for _ in columns.closings])

    def _write(self, visit: Visit, number: int) -> None:
        """Put what one closing part wrote into the state of its rows."""
        if not self.controls.writes:
            return
        closing, session = visit.columns.closings[number], self.session
        assert visit.hidden is not None
        assert session.embeds is not None
        past = self._past(session.state, self._counts, session.embeds)
        written = visit.hidden[:, closing.begin : closing.end]
        found = visit.written[number] | self.memory.write(closing.span, written, past)
        if not bool(closing.rows.all()):
            found = where_rows(closing.rows, found, session.state)
        session.state, session.written = session.state | found, True

    def _read_again(self, span: int, rows: Tensor) -> None:
        """A span of no tokens: what its opening becomes is written, and no column stays."""
        session, counts, state = self.session, self._counts, self._read_state()
        assert session.embeds is not None
        opening = self.memory.opening(span, self._past(state, counts, session.embeds))
        if opening is None:
            return
        openings = Parts(0)
        openings.add(span, rows, opening.embeds, opening.real)
        closings = Parts(openings.end)
        closings.add(span, rows, None, None)
        columns = self._columns(state, openings.real[0], openings, closings)
        visit = self._visit(columns)
        with visiting(visit):
            self.decoder(**self._call(openings.embeds, columns.real))
        session.extend(None, 0, openings.end)
        self._write(visit, 0)
