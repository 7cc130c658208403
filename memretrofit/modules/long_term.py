"""What a pool drops goes to a store behind it, from which a learned retriever takes rows back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memretrofit.modules.pool import POOL, WRITES, LayerPool, PoolMemory, rows_at
from memretrofit.modules.segment_memory import Past, State

AGE, STORE, STORE_KEY, STORE_AGE = "age", "store", "store_key", "store_age"
NOBODY = -1.0
"""Age of a place that holds no row, and of copies that fill a pool: these go nowhere."""
RECALL = 1
"""The span that has recalled rows in front; the tokens before it are the query."""


class Projection(nn.Module):
    """W_2 f(W_1 norm(x)): from hidden states [..., E] to keys or queries [..., D]."""

    def __init__(
        self, hidden_size: int, key_dim: int, activation: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.inner = nn.Linear(hidden_size, 2 * key_dim, bias=False)
        self.outer = nn.Linear(2 * key_dim, key_dim, bias=False)
        self._activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        """In the dtype of the weights."""
        hidden = hidden.to(self.inner.weight.dtype)
        return self.outer(self._activation(self.inner(F.rms_norm(hidden, hidden.shape[-1:]))))


class LongTermMemory(PoolMemory):
    """Makes room for recalled rows too, once there is something to look for them with.

    ::

        span 0       [ sink ; N rows ; h tokens ]
        span 1       [ sink ; recalled ; N rows ; the h tokens again ; T - h tokens ]
        last span    [ sink ; last K rows ; the T tokens again ]
    """

    def __init__(self, *, top_k: int, **pool: Any) -> None:
        super().__init__(**pool)
        self.top_k = top_k

    def rows(self, span: int, past: Past) -> Tensor:
        """As a pool, and recalled rows as many as a store has, at most `top_k`."""
        rows = super().rows(span, past)
        if span != RECALL:
            return rows
        held = (past.state[f"{self._layer}.{STORE_AGE}"] > NOBODY).sum(-1, keepdim=True)
        recalled = torch.arange(self.top_k, 0, -1, device=rows.device) <= held
        return torch.cat([recalled, rows], dim=1)


class LayerLongTerm(LayerPool):
    """One layer's pool and store. A store has C places, filled from the right; the row that has
    been in it for longest leaves.
    """

    def __init__(
        self,
        *,
        top_k: int,
        long_term_size: int,
        key_dim: int,
        activation: Callable[[Tensor], Tensor],
        **pool: Any,
    ) -> None:
        super().__init__(**pool)
        self.top_k, self.long_term_size, self.key_dim = top_k, long_term_size, key_dim
        self.query_map = Projection(self.hidden_size, key_dim, activation)
        self.key_map = Projection(self.hidden_size, key_dim, activation)
        # equal at the start: what is alike is found
        self.key_map.load_state_dict(self.query_map.state_dict())

    def begin(self, rows: int, device: torch.device) -> State:
        """An empty pool and an empty store: [B, C, E] rows, [B, C, D] keys, ages in tokens."""
        places = rows, self.long_term_size
        return super().begin(rows, device) | {
            AGE: torch.full((rows, self.size), NOBODY, device=device),
            STORE: torch.zeros(*places, self.hidden_size, device=device),
            STORE_KEY: torch.zeros(*places, self.key_dim, device=device),
            STORE_AGE: torch.full(places, NOBODY, device=device),
        }

    def rows(self, span: int, tokens: Tensor, state: State) -> Tensor:
        """As a pool, with recalled rows in front of it."""
        rows = super().rows(span, tokens, state)
        return rows if span != RECALL else torch.cat([self.recalled(tokens, state), rows], dim=1)

    def recalled(self, tokens: Tensor, state: State) -> Tensor:
        """The `top_k` rows [B, k, E] of best score, oldest first; what is missing is on the left.

        Choosing has no gradient, so a score s gets that of moving its row x away from the mean m
        of the store, s (x - m): the value of the rows is x, whatever s.
        """
        scores = self.scores(tokens, state)
        held = state[STORE_AGE] > NOBODY
        best = scores.masked_fill(~held, NOBODY).topk(self.top_k, dim=-1).indices
        age = torch.where(held, state[STORE_AGE], torch.inf)
        best = rows_at(best, rows_at(age, best).argsort(dim=-1, descending=True, stable=True))
        share = held.to(scores) / held.sum(-1, keepdim=True).clamp(min=1)
        mean = share[:, None].to(state[STORE]) @ state[STORE]
        rows, score = rows_at(state[STORE], best), rows_at(scores, best)[..., None]
        return rows + (score - score.detach()).to(rows) * (rows - mean)

    def scores(self, tokens: Tensor, state: State) -> Tensor:
        """[B, C] mean over `tokens` [B, h, E] of sigmoid(query . key)."""
        queries = self.query_map(tokens.detach())
        return (queries @ state[STORE_KEY].to(queries).mT).sigmoid().mean(1)

    def replaced(self, new: Tensor, state: State, stay: Tensor, leave: Tensor) -> State:
        """As a pool; the rows that are dropped go to the store. No gradient goes through it."""
        empty = state[WRITES][:, None] == 0
        fresh = torch.arange(self.block - 1, -1, -1, device=new.device).to(state[AGE])
        fresh = fresh.expand(len(new), -1)
        copies = F.pad(fresh, (self.size - self.block, 0), value=NOBODY)
        age, store_age = self._older(state[AGE]), self._older(state[STORE_AGE])
        gone = rows_at(state[POOL], leave).detach()
        gone_age = rows_at(age, leave)
        joined = torch.cat([store_age, gone_age], dim=1)
        kept = (joined > NOBODY).int().argsort(dim=-1, stable=True)[:, self.block :]
        keys = torch.cat([state[STORE_KEY], self.key_map(gone).to(state[STORE_KEY])], dim=1)
        return super().replaced(new, state, stay, leave) | {
            AGE: torch.where(empty, copies, torch.cat([rows_at(age, stay), fresh], dim=1)),
            STORE: rows_at(torch.cat([state[STORE], gone], dim=1), kept),
            STORE_KEY: rows_at(keys, kept),
            STORE_AGE: rows_at(joined, kept),
        }

    def _older(self, age: Tensor) -> Tensor:
        return torch.where(age > NOBODY, age + self.block, age)
