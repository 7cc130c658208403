"""What a bank added to a model: its reads layer by layer, its tables, and where their bytes are."""

from __future__ import annotations

import io
import math
from itertools import groupby

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as Grid
from torch import nn

from memretrofit.description import WIDTH, base_parameters, in_units
from memretrofit.modules.table import Table
from memretrofit.patching.ffn import BankLedger
from memretrofit.patching.wrapping import unwrapped


def render_bank(model: nn.Module, ledger: BankLedger) -> str:
    """A table of layers, one of the bank's tables, and the totals, as plain text."""
    inner = unwrapped(model)
    console = Console(
        file=io.StringIO(), width=WIDTH, color_system=None, highlight=False, markup=False
    )
    console.print(f"{type(inner).__name__} + {ledger.config}", soft_wrap=True)
    console.print(_layers(ledger))
    tables = dict(ledger.bank.each_table())
    console.print(_tables(tables))
    numbers = sum(table.rows * math.prod(table.shape) for table in tables.values())
    opened = sum(0 if t.delta is None else t.delta.numel() for t in tables.values())
    added = sum(p.numel() for seat in ledger.seams.values() for p in seat.memory.parameters())
    base = sum(p.numel() for _, p in base_parameters(inner))
    share = f"{100 * added / base:.2f}% of the base model's {base:,}" if base else "no base weights"
    console.print(
        f"numbers in the bank: {numbers:,}; parameters that train: {added:,} ({share}), of which "
        f"{opened:,} in open rows",
        soft_wrap=True,
    )
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).strip("\n")


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
    # equal rows make one line as long as their layers follow each other
    for _, group in groupby(enumerate(rows), key=lambda item: (item[1][0] - item[0], item[1][1])):
        members = [row for _, row in group]
        first, last = members[0][0], members[-1][0]
        grid.add_row(str(first) if first == last else f"{first}-{last}", *members[0][1])
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
