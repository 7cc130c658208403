"""What a pool drops goes to a store behind it, from which a learned retriever takes rows back."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memretrofit.modules.memory_tokens import SinkTokens
from memretrofit.modules.pool import POOL, WRITES, LayerPool, PoolMemory, PoolSizes, rows_at
from memretrofit.modules.segment_memory import Past, State

BORN, STORED, STORE, STORE_KEY, STORE_BORN = "born", "stored", "store", "store_key", "store_born"
"""Names of the state; a store's rows are in several tensors, `store_0` and so on."""
NOBODY = -1
"""When a row was born that there is not, or a copy that fills a pool: these go nowhere."""
RECALL = 1
"""The span that has recalled rows in front; the tokens before it are the query."""
PARTS = 16
"""Tensors that a store is cut into: a write makes those anew that it touches, and shares the rest
with the states before it.
"""


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

    def __init__(self, sizes: PoolSizes, *, top_k: int, sink: SinkTokens, layer: int) -> None:
        """`layer` is any that has a store."""
        super().__init__(sizes, sink=sink, layer=layer)
        self.top_k = top_k

    def rows(self, span: int, past: Past) -> Tensor:
        """As a pool, and recalled rows as many as a store has, at most `top_k`."""
        rows = super().rows(span, past)
        if span != RECALL:
            return rows
        stored = past.state[f"{self._layer}.{STORED}"].cpu()[:, None]
        recalled = torch.arange(self.top_k, 0, -1, device="cpu") <= stored
        return torch.cat([recalled, rows], dim=1)


class LayerLongTerm(LayerPool):
    """One layer's pool and store. A store has C places, filled in turn: row number n goes to place
    n mod C, and the row that has been there for longest leaves.
    """

    def __init__(
        self,
        sizes: PoolSizes,
        *,
        top_k: int,
        long_term_size: int,
        key_dim: int,
        activation: Callable[[Tensor], Tensor],
        **pool: Any,
    ) -> None:
        super().__init__(sizes, **pool)
        self.top_k, self.long_term_size, self.key_dim = top_k, long_term_size, key_dim
        self.query_map = Projection(self.hidden_size, key_dim, activation)
        self.key_map = Projection(self.hidden_size, key_dim, activation)
        # equal at the start: what is alike is found
        self.key_map.load_state_dict(self.query_map.state_dict())
        step = -(-long_term_size // PARTS)
        bounds = [*range(0, long_term_size, step), long_term_size]
        self.parts = {
            f"{STORE}_{number}": places for number, places in enumerate(itertools.pairwise(bounds))
        }
        """Name -> its places, from the first to the one behind the last."""

    def begin(self, rows: int, device: torch.device) -> State:
        """An empty pool and an empty store: [B, C, E] rows, [B, C, D] keys, and when each was born:
        how many rows were written before it. Those of the pool, and how many rows ever went to the
        store, are on the CPU, where places are given out.
        """
        places, size = (rows, self.long_term_size), self.hidden_size
        dtype = self.key_map.inner.weight.dtype
        store = {
            name: torch.zeros(rows, end - begin, size, dtype=self.dtype, device=device)
            for name, (begin, end) in self.parts.items()
        }
        return super().begin(rows, device) | {
            BORN: torch.full((rows, self.size), NOBODY, device="cpu"),
            STORED: torch.zeros(rows, dtype=torch.long, device="cpu"),
            **store,
            STORE_KEY: torch.zeros(*places, self.key_dim, dtype=dtype, device=device),
            STORE_BORN: torch.full(places, NOBODY, device=device),
        }

    def rows(self, span: int, tokens: Tensor, state: State) -> Tensor:
        """As a pool, with recalled rows in front of it."""
        rows = super().rows(span, tokens, state)
        return rows if span != RECALL else torch.cat([self.recalled(tokens, state), rows], dim=1)

    def store(self, state: State) -> Tensor:
        """[B, C, E] the rows by place, in one tensor."""
        return torch.cat([state[name] for name in self.parts], dim=1)

    def recalled(self, tokens: Tensor, state: State) -> Tensor:
        """The `top_k` rows [B, k, E] of best score, oldest first; what is missing is on the left.

        Choosing has no gradient, so a score s gets that of moving its row x away from the mean m
        of the store, s (x - m): the value of the rows is x, whatever s.
        """
        scores, born = self.scores(tokens, state), state[STORE_BORN]
        held = born > NOBODY
        best = scores.masked_fill(~held, NOBODY).topk(self.top_k, dim=-1).indices
        best = rows_at(best, rows_at(born, best).argsort(dim=-1, stable=True))
        rows = self._stored_at(best, state)
        if not scores.requires_grad:
            return rows
        share = held.to(scores) / held.sum(-1, keepdim=True).clamp(min=1)
        mean = (share[:, None] @ self.store(state).to(share)).to(rows)
        score = rows_at(scores, best)[..., None]
        return rows + (score - score.detach()).to(rows) * (rows - mean)

    def scores(self, tokens: Tensor, state: State) -> Tensor:
        """[B, C] mean over `tokens` [B, h, E] of sigmoid(query . key)."""
        queries = self.query_map(tokens.detach())
        return (queries @ state[STORE_KEY].to(queries).mT).sigmoid().mean(1)

    def _stored_at(self, places: Tensor, state: State) -> Tensor:
        """Rows of the store [B, n, E] at places [B, n]."""
        found = None
        for name, (begin, end) in self.parts.items():
            here = rows_at(state[name], (places - begin).clamp(0, end - begin - 1))
            found = here if found is None else torch.where((places < begin)[..., None], found, here)
        assert found is not None
        return found

    def replaced(self, new: Tensor, state: State, stay: Tensor, leave: Tensor) -> State:
        """As a pool; the rows that are dropped go to the store. No gradient goes through it."""
        writes, born = state[WRITES][:, None], state[BORN]
        fresh = writes * self.block + torch.arange(self.block, device="cpu")
        copies = F.pad(fresh, (self.size - self.block, 0), value=NOBODY)
        older = torch.cat([rows_at(born, stay), fresh], dim=1)
        gone = rows_at(state[POOL], leave).detach()
        return (
            super().replaced(new, state, stay, leave)
            | {BORN: torch.where(writes == 0, copies, older)}
            | self._kept(gone, rows_at(born, leave), state)
        )

    def _kept(self, gone: Tensor, born: Tensor, state: State) -> State:
        """What changes of the store when rows [B, K, E] that were `born` [B, K] come."""
        real, size = born > NOBODY, self.long_term_size
        rank = real.cumsum(-1)
        places = (state[STORED][:, None] + rank - 1) % size
        real = real & (rank > rank[:, -1:] - size)  # more than it holds: the last ones stay
        row, column = real.nonzero(as_tuple=True)
        place = places[row, column]
        device = gone.device

        def put(held: Tensor, values: Tensor, chosen: Tensor, begin: int) -> Tensor:
            index = row[chosen].to(device), (place[chosen] - begin).to(device)
            own = values[index[0], column[chosen].to(device)]
            return held.index_put(index, own.to(held))

        every = torch.ones_like(row, dtype=torch.bool)
        found = {
            STORED: state[STORED] + rank[:, -1],
            STORE_KEY: put(state[STORE_KEY], self.key_map(gone), every, 0),
            STORE_BORN: put(state[STORE_BORN], born.to(device), every, 0),
        }
        for name, (begin, end) in self.parts.items():
            here = (place >= begin) & (place < end)
            if bool(here.any()):
                found[name] = put(state[name], gone, here, begin)
        return found
