"""Memory tokens: input embeddings that stand before a segment, and are replaced by what the model
makes of their like behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from memretrofit.modules.model_spec import InputEmbedding, ModelSpec
from memretrofit.modules.segment_memory import Opening, Past, SegmentMemory, State

MEMORY = "memory"
NOISE = 0.1
"""Of the standard deviation of the embeddings: rows that begin as one token must become several."""
GATE = 0.3
"""Of the norm of embeddings, before training: a pretrained model that reads several hidden states
at the whole norm is harmed, at this one it is not.
"""
SAMPLE = 1024
"""Tokens of the vocabulary from which the scale of the embeddings is taken."""

Start = Literal["sink", "random"]


class TokenRows(nn.Module):
    """Trainable input embeddings [M, E]."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows.float())

    def forward(self) -> Tensor:
        """The rows [M, E]; a copy, which a conversation may keep while they train on."""
        return self.weight.clone()

    def like(self, embeds: Tensor) -> Tensor:
        """The rows [B, M, E] for every row of `embeds` [B, ...], where those are and of their
        type.
        """
        return self().to(embeds).expand(len(embeds), -1, -1)


@dataclass(eq=False)
class SinkTokens:
    """The model's own token that begins a text, `count` times. Attention rests on what stands
    first; without such a token it would rest on the memory.
    """

    embedding: InputEmbedding
    token_id: int
    count: int

    def __call__(self, like: Tensor) -> Tensor:
        """[B, count, E] where `like` [B, ...] is, in its dtype."""
        ids = torch.full((1, self.count), self.token_id, device=like.device)
        return self.embedding.of(ids).to(like).expand(len(like), -1, -1)


def sink_tokens(spec: ModelSpec, count: int) -> SinkTokens:
    """`count` sinks of the model."""
    return SinkTokens(spec.embedding, spec.sink_token_id, count)


def _sample(spec: ModelSpec) -> Tensor:
    """[n, E] embeddings of tokens from the whole vocabulary."""
    step = max(1, spec.vocab_size // SAMPLE)
    return spec.embedding.of(torch.arange(0, spec.vocab_size, step)).float()


def _near_sink(spec: ModelSpec, count: int) -> Tensor:
    rows = spec.embedding.of(torch.full((count,), spec.sink_token_id)).float()
    return rows + NOISE * _at_random(spec, count)


def _at_random(spec: ModelSpec, count: int) -> Tensor:
    sample = _sample(spec)
    return torch.randn(count, spec.hidden_size).to(sample) * sample.std()


STARTS: dict[Start, Callable[[ModelSpec, int], Tensor]] = {
    "sink": _near_sink,
    "random": _at_random,
}
"""Rows [M, E] to begin with: close to the model's sink token, or with the spread of embeddings."""


class Carry(nn.Module):
    """How hidden states are read as input embeddings."""

    norm: Tensor
    """[] the mean norm of the model's embeddings; hidden states are many times longer."""

    def __init__(self, norm: Tensor) -> None:
        super().__init__()
        self.register_buffer("norm", norm)

    def forward(self, written: Tensor, rows: Tensor) -> Tensor:
        """As they are.

        Args:
            written: [B, M, E] hidden states.
            rows: [M, E] what stands for a memory where nothing was written.
        """
        return written


class Rescaled(Carry):
    """w |E| / |w|: with the mean norm of embeddings."""

    def forward(self, written: Tensor, rows: Tensor) -> Tensor:
        """The same directions."""
        return nn.functional.normalize(written, dim=-1) * self.norm


class Added(Rescaled):
    """rows + g w |E| / |w|: what was written moves the rows, at first by less than their length."""

    def __init__(self, norm: Tensor) -> None:
        super().__init__(norm)
        self.gate = nn.Parameter(norm.new_full((1,), GATE))

    def forward(self, written: Tensor, rows: Tensor) -> Tensor:
        """Rows, moved."""
        return rows.to(written) + self.gate.to(written) * super().forward(written, rows)


CARRIES: dict[str, type[Carry]] = {"added": Added, "raw": Carry, "rescaled": Rescaled}


def carry_of(spec: ModelSpec, kind: str) -> Carry:
    """One of `CARRIES`, at the scale of the model's embeddings."""
    return CARRIES[kind](_sample(spec).norm(dim=-1).mean())


class MemoryTokens(SegmentMemory):
    """M tokens in front of a segment and behind it: `[sinks ; m ; tokens ; m]`, and m becomes what
    the decoder made of the last M.
    """

    def __init__(
        self, *, segment_length: int, sinks: SinkTokens, first: Tensor, carry: Carry
    ) -> None:
        """`first` [M, E]: the rows that a conversation begins with, which are trained."""
        super().__init__()
        self.spans = (segment_length,)
        self.sinks, self.first, self.carry = sinks, TokenRows(first), carry

    def begin(self, rows: int, device: torch.device) -> State:
        """The trained rows."""
        return {MEMORY: self.first().to(device).expand(rows, -1, -1)}

    def opening(self, span: int, past: Past) -> Opening:
        """Sinks, then the memory."""
        return Opening(embeds=torch.cat([self.sinks(past.embeds), self._memory(past)], dim=1))

    def trailing(self, span: int, past: Past) -> Tensor:
        """The memory once more."""
        return self._memory(past)

    def write(self, span: int, written: Tensor, past: Past) -> State:
        """What became of it."""
        return {MEMORY: self.carry(written.to(past.state[MEMORY]), self.first())}

    def _memory(self, past: Past) -> Tensor:
        return past.state[MEMORY].to(past.embeds)
