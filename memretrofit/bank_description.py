"""What a bank added to a model: its reads layer by layer, its tables, and where their bytes are."""

from __future__ import annotations

import math

from rich.box import SIMPLE
from rich.table import Table as Grid
from torch import nn

from memretrofit.description import as_text, in_units, layer_lines, share_of_base
from memretrofit.modules.table import Table
from memretrofit.patching.ffn import BankLedger
from memretrofit.patching.wrapping import unwrapped


def render_bank(model: nn.Module, ledger: BankLedger) -> str:
    """A table of layers, one of the bank's tables, and the totals, as plain text."""
    inner = unwrapped(model)
    tables = dict(ledger.bank.each_table())
    numbers = sum(table.rows * math.prod(table.shape) for table in tables.values())
    opened = sum(0 if t.delta is None else t.delta.numel() for t in tables.values())
    added = sum(p.numel() for seat in ledger.seams.values() for p in seat.memory.parameters())
    return as_text(
        f"{type(inner).__name__} + {ledger.config}",
        _layers(ledger),
        _tables(tables),
        f"numbers in the bank: {numbers:,}; parameters that train: {added:,} "
        f"({share_of_base(inner, added)}), of which {opened:,} in open rows",
    )


def _layers(ledger: BankLedger) -> Grid:
    grid = Grid(box=SIMPLE, pad_edge=False)
    for name in ("layers", "module", "memory"):
        grid.add_column(name)
    grid.add_column("added", justify="right")
    rows = []
    for site in ledger.sites:
        seat = ledger.seams.get(site.name)
        path = ".".join("*" if x == str(site.layer_idx) else x for x in site.name.split("."))
        what = "none: not chosen" if seat is None else ledger.config.method
        added = 0 if seat is None else sum(p.numel() for p in seat.memory.parameters())
        rows.append((site.layer_idx, (path, what, f"{added:,}")))
    for label, cells in layer_lines(rows):
        grid.add_row(label, *cells)
    return grid


def _tables(tables: dict[str, Table]) -> Grid:
    grid = Grid(box=SIMPLE, pad_edge=False)
    grid.add_column("table")
    for name in ("rows", "numbers in a row", "open rows", "rows lie", "device", "RAM", "disk"):
        grid.add_column(name, justify="right")
    for name, table in tables.items():
        held = table.nbytes
        grid.add_row(
            name,
            f"{table.rows:,}",
            f"{math.prod(table.shape):,}",
            f"{table.opened:,}",
            table.tier,
            *(in_units(held[tier]) for tier in ("device", "ram", "disk")),
        )
    return grid
