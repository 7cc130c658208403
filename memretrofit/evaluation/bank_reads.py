"""Which rows a bank reads for what it learned and for ordinary text: how evenly, and how much of it
goes to rows that were trained.

A row that all text reads is a hub: what is written there is said everywhere. Where ordinary text
reads trained rows, the bank speaks although nothing was asked about its lessons.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from memretrofit.evaluation.probes.slot_access import SlotShares
from memretrofit.modules.bank import MemoryBank, Tokens
from memretrofit.patching.ffn import bank_of
from memretrofit.patching.row_counts import row_counts
from memretrofit.patching.wrapping import unwrapped

BUSIEST = 0.01
"""Share of a table's rows whose reads are summed."""


@torch.no_grad()
def measure_reads(model: Any, texts: Iterable[Tensor]) -> dict[str, dict[str, float | int | None]]:
    """For each table of the bank of `model`, over texts [T] of ids that are read one at a time:
    `reads`; the share of its rows that is `used`; and the shares of the reads that fall on the
    `busiest` hundredth of its rows and on `trained` rows (None without reads).

    A routed bank counts the nodes of each text once, every other one as `row_counts` does.
    """
    bank = bank_of(unwrapped(model))
    totals = {name: torch.zeros(table.rows).double() for name, table in bank.each_table()}
    for text in texts:
        counts = _nodes(bank, text) if bank.has_routes else _counts(model, text)
        for name, count in counts.items():
            totals[name] += count
    return {name: _figures(bank, name, total) for name, total in totals.items()}


def _counts(model: Any, text: Tensor) -> Mapping[str, Tensor]:
    return row_counts(model, {"input_ids": text[None].to(unwrapped(model).device)})


def _nodes(bank: MemoryBank, text: Tensor) -> Mapping[str, Tensor]:
    # a bank that keeps the blocks of a path does not ask its tables for them again
    return {
        name: torch.bincount(index, minlength=bank.table(name).rows)
        for name, index in bank.addresses(Tokens.of(text)).items()
    }


def _figures(bank: MemoryBank, name: str, total: Tensor) -> dict[str, float | int | None]:
    reads, open_rows = int(total.sum()), bank.table(name).delta_index
    found: dict[str, float | int | None] = {"reads": reads, "busiest": None, "trained": None}
    shares = SlotShares((total / max(1, reads)).float()[None])
    found["used"] = float(shares.used())
    if reads:
        found["busiest"] = float(shares.busiest(BUSIEST))
        trained = 0.0 if open_rows is None else float(total[open_rows.cpu()].sum())
        found["trained"] = trained / reads
    return found


def reads_table(access: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """What `measure_reads` found for several kinds of text, as `markdown.table` takes it."""
    return {
        "title": "Which rows are read",
        "text": f"Of all reads of a table, those of its {100 * BUSIEST:.0f} % busiest rows (1 % of "
        "them where it is read evenly), and those of rows that were trained.",
        "columns": ["text", "table", "reads", "rows used", "on the busiest", "on trained rows"],
        "rows": [
            [
                kind,
                name,
                entry["reads"],
                *(_percent(entry[k]) for k in ("used", "busiest", "trained")),
            ]
            for kind, tables in access.items()
            for name, entry in tables.items()
        ],
    }


def _percent(share: float | None) -> str:
    return "n/a" if share is None else f"{100 * share:.2f} %"
