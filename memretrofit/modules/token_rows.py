"""One row per token of the vocabulary, with a part for each layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memretrofit.modules.bank import BankRead, MemoryBank, Read, Tokens, is_real
from memretrofit.modules.table import FreshRows, Table

ROWS = "rows"
EPSILON = 1e-6


class TokenParts(NamedTuple):
    """What the new tokens found: each distinct one once, however often it stands there."""

    parts: tuple[Tensor, ...]
    """[U, D] of each layer."""
    which: Tensor
    """[B, T] < U."""
    live: Tensor
    """[B, T] bool: the tokens to which something is added."""


class TokenBank(MemoryBank):
    """A table [vocabulary, layers, D], all zero at the start: the parts of one token lie together,
    so that one read serves all layers.
    """

    def __init__(self, *, vocab_size: int, layers: int, value_dim: int, hot_bytes: int) -> None:
        rows = FreshRows(vocab_size, (layers, value_dim), torch.float32, 0, 0.0)
        super().__init__({ROWS: Table(rows, hot_bytes=hot_bytes)})

    def forward(self, tokens: Tokens) -> TokenParts:
        """The rows of the new tokens; tokens whose row is neither open nor written are not live."""
        ids, real, which = self._distinct(tokens)
        rows = self.table(ROWS)(ids)
        live = self.table(ROWS).is_open(ids) | (rows != 0).flatten(1).any(-1)
        return TokenParts(rows.unbind(1), which, _at(live, which) & real)

    def addresses(self, tokens: Tokens) -> dict[str, Tensor]:
        """The tokens themselves."""
        return {ROWS: self._distinct(tokens)[0]}

    def _distinct(self, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """The distinct new ids [U], which tokens are real, and the place of each among the ids."""
        real = is_real(tokens)
        ids, places = tokens.ids[:, -tokens.new :][real].unique(return_inverse=True)
        return ids, real, torch.zeros_like(real, dtype=torch.long).index_put((real,), places)


class AddedRow(BankRead):
    """The row itself is added: nothing trains but the rows."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden: Tensor, found: TokenParts, past: Tensor | None) -> Read:
        """What the token carries for this layer."""
        added = _at(found.parts[self.number], found.which)
        return Read(added.to(hidden.device), found.live.to(hidden.device))


class ProjectedTokenBank(TokenBank):
    """p = (norm(A e) / norm's scale + row) / sqrt 2 for each layer, with e the token's embedding:
    tokens without a row of their own find what A makes of their embedding.
    """

    def __init__(
        self, *, embedding: Callable[[], Tensor], layers: int, value_dim: int, **sizes: int
    ) -> None:
        super().__init__(layers=layers, value_dim=value_dim, **sizes)
        self._embedding, self.shape = embedding, (layers, value_dim)
        self.project = nn.Linear(embedding().shape[1], layers * value_dim, bias=False)
        self.project_scale = nn.Parameter(torch.ones(value_dim))

    def forward(self, tokens: Tokens) -> TokenParts:
        """Every token is live."""
        ids, real, which = self._distinct(tokens)
        weight = self.project.weight
        embedded = self._embedding()[ids].to(weight)
        projected = self.project(embedded).unflatten(-1, self.shape)
        projected = F.rms_norm(projected, self.shape[1:], self.project_scale, EPSILON)
        rows = self.table(ROWS)(ids).to(weight)
        return TokenParts(((projected + rows) / math.sqrt(2)).unbind(1), which, real)


class GatedRow(BankRead):
    """norm(B (f(G h) * p)): the hidden state chooses from p. The norm's scale starts at zero.

    B could not: the norm would turn its first small step into one of full size.
    """

    def __init__(
        self,
        *,
        number: int,
        hidden_size: int,
        value_dim: int,
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.number, self._activation = number, activation
        self.gate_map = nn.Linear(hidden_size, value_dim, bias=False)
        self.out_map = nn.Linear(value_dim, hidden_size, bias=False)
        self.out_scale = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, hidden: Tensor, found: TokenParts, past: Tensor | None) -> Read:
        """What the state takes from the token's part for this layer."""
        weight = self.out_map.weight
        part = _at(found.parts[self.number], found.which).to(weight)
        added = self.out_map(self._activation(self.gate_map(hidden.to(weight))) * part)
        added = F.rms_norm(added, self.out_scale.shape, self.out_scale, EPSILON)
        return Read(added, found.live.to(weight.device))


def _at(rows: Tensor, which: Tensor) -> Tensor:
    """`rows` [U, ...] at `which` [B, T]; zeros where there is no row at all."""
    if not len(rows):
        return rows.new_zeros(*which.shape, *rows.shape[1:])
    return rows[which]
