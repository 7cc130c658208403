"""Rows that a token finds by what it looks like: product keys, and the reads that use them.

The address depends on hidden states, so nothing is known before the forward: the bank hands its
tables to the reads, and each read asks for the rows that its own keys chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memretrofit.modules.bank import BankRead, MemoryBank, Read, Tokens
from memretrofit.modules.table import FreshRows, HeldRows, Table
from memretrofit.ops.product_key import product_topk, slot_scores

SHARED = "slots"
"""Name of the one table that all layers read."""

PIECE = 64
"""Tokens whose rows are held at once, beside what a gradient needs."""


def own_table(layer: int) -> str:
    """Name of the table that one layer reads alone."""
    return f"{SHARED}_{layer}"


class ProductKeyBank(MemoryBank):
    """Tables of values, one vector to a slot, and how often ordinary text reads each slot.

    Args:
        names: of the tables; `own_table` of each layer, or `SHARED`.
        std: of the values at the start; 0 makes them zero.
    """

    background_batches: Tensor
    """[] batches of ordinary text that were counted."""

    def __init__(
        self,
        *,
        names: Sequence[str],
        num_slots: int,
        value_dim: int,
        std: float,
        seed: int,
        hot_bytes: int,
    ) -> None:
        tables: dict[str, Table] = {}
        for number, name in enumerate(names):
            rows = FreshRows(num_slots, (value_dim,), torch.float32, seed + number, std)
            source = rows if rows.blank else HeldRows.copy_of(rows, "device")
            tables[name] = Table(source, hot_bytes=hot_bytes)
        super().__init__(tables)
        self.register_buffer("background_batches", torch.zeros((), dtype=torch.long))
        for name in names:
            counts = torch.zeros(num_slots, dtype=torch.long)
            self.register_buffer(f"background_{name}", counts)

    def constants(self) -> dict[str, Tensor]:
        """None: the keys are parameters, and counts are statistics."""
        return {}

    def forward(self, tokens: Tokens) -> dict[str, Table]:
        """The tables: which of their rows are read, each layer finds out."""
        return dict(self.each_table())

    def open_rows(self, texts: Sequence[Tensor]) -> int:
        """Let all rows train, whatever the texts: keys that learn reach any row. To write a few,
        see `memretrofit.training.sparse_rows`.
        """
        for _, table in self.each_table():
            table.open(torch.arange(table.rows))
        return sum(table.opened for _, table in self.each_table())

    def background(self, name: str) -> Tensor:
        """[slots] of how many batches of ordinary text read the slot of a table."""
        counts = getattr(self, f"background_{name}")
        assert isinstance(counts, Tensor)
        return counts


class Choice(NamedTuple):
    """The slots that each head of a token reads."""

    slots: Tensor
    """[B, T, H, k]"""
    weights: Tensor
    """[B, T, H, k] float32 or float64; exactly 0 where the slot is not read."""


class ProductKeys(nn.Module):
    """The k best of n² slots for each head, by the product of two halves of a normalised query.

    Args:
        null_slot: each head has one more slot, without a value and with a score of its own. A slot
            that scores below it is not read, and it takes its share of the softmax.
    """

    null: nn.Parameter | None
    """[H] scores of the null slots."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_slots: int,
        num_heads: int,
        key_dim: int,
        top_k: int,
        null_slot: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.top_k = num_heads, top_k
        self.query = nn.Linear(hidden_size, num_heads * key_dim)
        self.norm = nn.LayerNorm(key_dim)
        keys = torch.empty(2, num_heads, math.isqrt(num_slots), key_dim // 2)
        self.keys = nn.Parameter(nn.init.uniform_(keys, -(key_dim**-0.5), key_dim**-0.5))
        null = nn.Parameter(torch.zeros(num_heads)) if null_slot else None
        self.register_parameter("null", null)

    def forward(self, hidden: Tensor) -> Choice:
        """The choice of each token of `hidden` [B, T, E], by that token alone."""
        query = self.query(hidden.to(self.query.weight.dtype))
        query = precise(self.norm(query.unflatten(-1, (self.num_heads, -1))))
        first, second = (
            torch.einsum("bthd,hnd->bthn", half, keys)
            for half, keys in zip(query.chunk(2, dim=-1), precise(self.keys), strict=True)
        )
        slots = product_topk(first, second, self.top_k)
        scores = slot_scores(first, second, slots)
        if self.null is None:
            return Choice(slots, scores.softmax(-1))
        null = precise(self.null)[:, None].expand(*scores.shape[:-1], 1)
        scores = scores.masked_fill(scores < null, -torch.inf)
        return Choice(slots, torch.cat([scores, null], dim=-1).softmax(-1)[..., :-1])


class ProductKeyRead(BankRead):
    """out(y), y the sum of the values that the keys chose, weighted, over all heads.

    A token all of whose slots are shut and zero, or below the null slot, keeps its bits.

    Args:
        table: name of the table that is read.
        silent: `out` starts at zero; else the values have to.
    """

    def __init__(
        self, *, keys: ProductKeys, table: str, hidden_size: int, value_dim: int, silent: bool
    ) -> None:
        super().__init__()
        self.keys, self.table = keys, table
        self.out = nn.Linear(value_dim, hidden_size, bias=False)
        if silent:
            nn.init.zeros_(self.out.weight)

    def forward(self, hidden: Tensor, found: Mapping[str, Table], past: Tensor | None) -> Read:
        """Added to the FFN's output."""
        choice, table = self.keys(hidden), found[self.table]
        slots, weights = (x.flatten(2).flatten(0, 1) for x in choice)  # [B T, H k]
        pieces = zip(slots.split(PIECE), weights.split(PIECE), strict=True)
        mixed = torch.cat([_weighted_rows(table, *piece) for piece in pieces])
        # an open row may be zero, and has to get its gradient all the same
        live = (table.is_open(slots) & (weights > 0)) | (mixed != 0).any(-1, keepdim=True)
        mixed = mixed.to(self.out.weight.dtype).view(*hidden.shape[:2], -1)
        return Read(self.project(mixed, hidden), live.any(-1).view(hidden.shape[:2]))

    def project(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        """From the weighted values [B, T, D] to what is added [B, T, E]."""
        return self.out(mixed)


class GatedProductKeyRead(ProductKeyRead):
    """out(y * silu(gate(x))), both linear maps with a bias."""

    def __init__(
        self, *, keys: ProductKeys, table: str, hidden_size: int, value_dim: int, silent: bool
    ) -> None:
        super().__init__(
            keys=keys, table=table, hidden_size=hidden_size, value_dim=value_dim, silent=silent
        )
        self.gate = _linear(hidden_size, value_dim, hidden_size**-0.5)
        self.out = _linear(value_dim, hidden_size, 0.0 if silent else hidden_size**-0.5)

    def project(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        """See `ProductKeyRead.project`."""
        return self.out(mixed * F.silu(self.gate(hidden.to(self.gate.weight.dtype))))


def _weighted_rows(table: Table, slots: Tensor, weights: Tensor) -> Tensor:
    """[N, D] sum of the rows `slots` [N, m] with `weights` [N, m]."""
    distinct, place = slots.unique(return_inverse=True)
    rows = table(distinct, dtype=weights.dtype)
    return F.embedding_bag(place, rows, mode="sum", per_sample_weights=weights)


def _linear(inputs: int, outputs: int, std: float) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.normal_(linear.weight, std=std)
    nn.init.zeros_(linear.bias)
    return linear


def precise(x: Tensor) -> Tensor:
    """At least float32: scores of half precision hold too many ties."""
    return x if x.dtype == torch.float64 else x.float()


def slot_faults(num_slots: int, key_dim: int, top_k: int) -> list[str]:
    """What is wrong with these sizes together, one line per fault."""
    side, faults = math.isqrt(num_slots), []
    if side * side != num_slots:
        near = round(math.sqrt(num_slots)) ** 2
        faults.append(f"num_slots={num_slots}: must be a square, such as {near}")
    if key_dim % 2:
        faults.append(f"key_dim={key_dim}: must be even, for a key has two halves")
    if top_k > side:
        faults.append(
            f"top_k={top_k}: at most {side}, the keys of one half (num_slots={num_slots})"
        )
    return faults
