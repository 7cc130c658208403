"""What a memory between segments is: the contract between a recurrence and the seam that reads a
text in segments.

A text is read T = `segment_length` tokens at a time, each segment from position 0, with no key or
value of the one before. What goes on is a `State`. A segment is read in one span or several, of
`spans` tokens each. Span i of a row is one forward (or any split of it)::

    columns   [ opening ; tokens of the span ; trailing ]      positions 0, 1, 2, ...
    opening = memory.opening(i, past)          before the first token: a sink, memory tokens,
                                               tokens that are read again
    trailing = memory.trailing(i, past)        behind the last token: they cannot change what
                                               stands before them
    memory.write(i, ...)                       what the trailing columns became goes into the state

Beside the memory, which stands at the decoder, each patched layer may have a `LayerMemory`, which
changes the layer's input, and writes a state of its own.

A span of 0 tokens reads only its opening: a second pass over a segment that is closed. Rows of a
batch are at different places in their segments: what `opening` and `write` return is used for the
rows that begin, or close, a span and ignored elsewhere. Letters: see `memretrofit.__doc__`; P is
the number of columns in front, M that of trailing ones, C all columns of a forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
"""What is carried, by name: the batch is the first dimension of each tensor. What a memory computes
has the type of its own weights (float32, and float64 in a float64 model), copies of hidden states
have the model's, and counters are int64.
"""


@dataclass(frozen=True, kw_only=True)
class Past:
    """What is known where a span begins or closes. What says which rows and columns there are is
    on the CPU, where it is decided what to read.
    """

    state: State
    """Of the whole model: the memory's own names, and `{layer}.{name}` of layer memories."""
    segments: Tensor
    """[B] segments that each row has closed."""
    embeds: Tensor
    """[B, n, E] the last n <= `SegmentMemory.kept_tokens` tokens of each row, its last token in
    the last column.
    """
    real: Tensor
    """[B, n] bool: which of them there are."""


@dataclass(frozen=True, kw_only=True)
class Opening:
    """P columns that are read before a span's first token."""

    embeds: Tensor
    """[B, P, E]"""
    real: Tensor | None = None
    """[B, P] bool, best on the CPU: columns that a row does not have are read by nobody; None: all
    are there.
    """

    def together(self) -> Opening:
        """With the columns that a row does not have in front of all that it has. A sliding window
        counts columns: one that is missing in between would push others out of sight.
        """
        if self.real is None or bool(self.real.all()):
            return self
        order = self.real.int().argsort(dim=-1, stable=True)
        index = order.to(self.embeds.device)[..., None]
        embeds = self.embeds.gather(1, index.expand_as(self.embeds))
        return Opening(embeds=embeds, real=self.real.gather(1, order))


@dataclass(frozen=True)
class Part:
    """Columns of a forward that belong to a span which some rows open, or close."""

    span: int
    begin: int
    """First column."""
    end: int
    """Behind the last column; `begin` where the span has none."""
    rows: Tensor
    """[B] bool, on the CPU: the rows that do; the columns of the others are not real."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The C columns of one forward, for memories in layers."""

    state: State
    """As `Past.state`."""
    segments: Tensor
    """[B] segments that each row had closed."""
    real: Tensor | None
    """[B, C] bool, on the CPU; None: all are there."""
    openings: tuple[Part, ...]
    """In front. More than one where rows are at different places in their segments."""
    closings: tuple[Part, ...]
    """Trailing tokens. A span of 0 tokens has its opening instead, and closes with it."""
    written: bool = True
    """Whether any row of `state` may have written something: no layer has to ask its device."""


class LayerMemory(nn.Module):
    """One layer's part. Parameters are read in the forward of the module that holds them: give
    each step a child of its own (a `nn.Linear`, a small module), as Accelerate and FSDP need it.
    """

    def begin(self, rows: int, device: torch.device) -> State:
        """The state of `rows` conversations that have written nothing."""
        return {}

    def read(self, hidden: Tensor, state: State, columns: Columns) -> Tensor:
        """The layer's input [B, C, E], with what was remembered; `state` is the layer's own."""
        return hidden

    def write(self, inputs: Tensor, outputs: Tensor, state: State, closing: Part) -> State:
        """The layer's own state after `closing`; what is returned for other rows is ignored.

        Args:
            inputs: [B, C, E] the layer's input, as `read` returned it.
            outputs: [B, C, E] its output.
            state: the layer's own.
        """
        return state


class SegmentMemory(nn.Module):
    """The part of a memory between segments that stands beside all layers."""

    spans: tuple[int, ...]
    """Tokens of each span; together one segment."""
    kept_tokens: int = 0
    """How many of a row's last tokens `opening` or `trailing` look at."""

    def begin(self, rows: int, device: torch.device) -> State:
        """The state of `rows` conversations that have written nothing."""
        return {}

    def opening(self, span: int, past: Past) -> Opening | None:
        """What is read before the tokens of `span`; None for nothing in any row."""
        return None

    def trailing(self, span: int, past: Past) -> Tensor | None:
        """[B, M, E] what is read behind the tokens of `span`; None for nothing."""
        return None

    def write(self, span: int, written: Tensor, past: Past) -> State:
        """The memory's own state after `span` was closed; a name left out stays as it was.

        Args:
            written: [B, M, E] what the trailing columns became: the decoder's last hidden states,
                after its norm. M is 0 where nothing trails.
        """
        return {}

    @property
    def segment_length(self) -> int:
        """T."""
        return sum(self.spans)
