"""Rows that a token finds by what it looks like: product keys, and the reads that use them.

The address depends on hidden states, so nothing is known before the forward: the bank hands its
tables to the reads, and each read asks for the rows that its own keys chose.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memretrofit.config import Checked, Range
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


@dataclass(frozen=True, kw_only=True)
class SlotSizes(Checked):
    """The fields that all methods with slots share."""

    num_slots: Annotated[int, Range(least=1)] = 65_536
    """Values in a table; the square of the keys in a half."""
    num_heads: Annotated[int, Range(least=1)] = 4
    """Queries of a token in a layer; each chooses for itself, and all read the same table."""
    key_dim: Annotated[int, Range(least=2)] = 256
    """K of each head, both halves together."""
    top_k: int = 32
    """Slots that a head reads; at most the keys in a half."""
    value_dim: Annotated[int | None, Range(least=1)] = None
    """D; None for the width of the model."""
    null_slot: bool = False
    """Whether a head may read less than top_k slots, or none."""
    starts_at_zero: Literal["rows", "projection"] = "projection"
    """What is zero until it is trained: the values, or the last map of a layer."""
    seed: Annotated[int, Range(least=0)] = 0
    """Of values that start at random."""
    hot_bytes: int = 0
    """Bytes on the device, for each table, of values that were read last, if they lie elsewhere."""

    def problems(self) -> list[str]:
        """Slots are pairs of half keys."""
        side, faults = math.isqrt(self.num_slots), []
        if side * side != self.num_slots:
            near = round(math.sqrt(self.num_slots)) ** 2
            faults.append(f"num_slots={self.num_slots}: must be a square, such as {near}")
        if self.key_dim % 2:
            faults.append(f"key_dim={self.key_dim}: must be even, for a key has two halves")
        if self.top_k > side:
            faults.append(
                f"top_k={self.top_k}: at most {side}, the keys of one half "
                f"(num_slots={self.num_slots})"
            )
        return faults


class ProductKeyBank(MemoryBank):
    """Tables of values, one vector to a slot, and how often ordinary text reads each slot.

    Args:
        names: of the tables; `own_table` of each layer, or `SHARED`.
        hidden_size: of the model.
    """

    background_batches: Tensor
    """[] batches of ordinary text that were counted."""

    def __init__(self, sizes: SlotSizes, *, names: Sequence[str], hidden_size: int) -> None:
        width = sizes.value_dim or hidden_size
        std = width**-0.5 if sizes.starts_at_zero == "projection" else 0.0
        tables: dict[str, Table] = {}
        for number, name in enumerate(names):
            rows = FreshRows(sizes.num_slots, (width,), torch.float32, sizes.seed + number, std)
            tables[name] = Table(rows, hot_bytes=sizes.hot_bytes)
        super().__init__(tables)
        self.register_buffer("background_batches", torch.zeros((), dtype=torch.long))
        for name in names:
            counts = torch.zeros(sizes.num_slots, dtype=torch.long)
            self.register_buffer(f"background_{name}", counts)

    def constants(self) -> dict[str, Tensor]:
        """None: the keys are parameters, and counts are statistics."""
        return {}

    def forward(self, tokens: Tokens) -> dict[str, Table]:
        """The tables: which of their rows are read, each layer finds out."""
        for _, table in self.each_table():
            source = table.source
            # any text reads rows all over a table: those that nobody wrote are made once, when a
            # model first runs, and not for a model of which only the sizes are asked
            if isinstance(source, FreshRows) and not source.blank and table.opened < table.rows:
                table.attach(HeldRows.copy_of(source, "device", table.place.device))
        return dict(self.each_table())

    def open_rows(self, texts: Sequence[Tensor]) -> int:
        """Let all rows train, whatever the texts: keys that learn reach any row, so what is saved
        is the whole of each table. To write a few, see `memretrofit.training.sparse_rows`.
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

    With `null_slot` each head has one more slot, without a value and with a score of its own. A
    slot that scores below it is not read, and it takes its share of the softmax.
    """

    null: nn.Parameter | None
    """[H] scores of the null slots."""

    def __init__(self, sizes: SlotSizes, hidden_size: int) -> None:
        super().__init__()
        self.num_heads, self.top_k, width = sizes.num_heads, sizes.top_k, sizes.key_dim
        self.query = nn.Linear(hidden_size, self.num_heads * width)
        self.norm = nn.LayerNorm(width)
        keys = torch.empty(2, self.num_heads, math.isqrt(sizes.num_slots), width // 2)
        self.keys = nn.Parameter(nn.init.uniform_(keys, -(width**-0.5), width**-0.5))
        null = nn.Parameter(torch.zeros(self.num_heads)) if sizes.null_slot else None
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
        hidden_size: of the model.
    """

    def __init__(self, sizes: SlotSizes, *, table: str, hidden_size: int) -> None:
        super().__init__()
        self.keys, self.table = ProductKeys(sizes, hidden_size), table
        self.out = self.last_map(sizes.value_dim or hidden_size, hidden_size)
        if sizes.starts_at_zero == "projection":
            nn.init.zeros_(self.out.weight)

    def last_map(self, value_dim: int, hidden_size: int) -> nn.Linear:
        """To the width of the model, without what `starts_at_zero` makes of it."""
        return nn.Linear(value_dim, hidden_size, bias=False)

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

    def __init__(self, sizes: SlotSizes, *, table: str, hidden_size: int) -> None:
        super().__init__(sizes, table=table, hidden_size=hidden_size)
        self.gate = _linear(hidden_size, sizes.value_dim or hidden_size, hidden_size**-0.5)

    def last_map(self, value_dim: int, hidden_size: int) -> nn.Linear:
        """See `ProductKeyRead.last_map`."""
        return _linear(value_dim, hidden_size, hidden_size**-0.5)

    def project(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        """See `ProductKeyRead.project`."""
        return self.out(mixed * F.silu(self.gate(hidden.to(self.gate.weight.dtype))))


def _weighted_rows(table: Table, slots: Tensor, weights: Tensor) -> Tensor:
    """[N, D] sum of the rows `slots` [N, m] with `weights` [N, m]."""
    whole = table.whole
    if whole is not None and (whole.dtype, whole.device) == (weights.dtype, weights.device):
        return F.embedding_bag(slots, whole, mode="sum", per_sample_weights=weights)
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
