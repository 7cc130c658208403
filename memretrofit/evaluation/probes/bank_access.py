"""How evenly the rows of a bank are read.

Slots that learned keys choose are easily read by all text alike: what is written into such a hub is
changed for every text. `SlotShares.busiest` shows hubs, `used` slots that nothing reads, `gini` and
`kl_to_uniform` how far the whole is from even.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memretrofit.evaluation.probes.full_attention import check_ids
from memretrofit.evaluation.probes.slot_access import SlotShares
from memretrofit.patching.ffn import bank_of
from memretrofit.patching.row_counts import check_read, row_counts
from memretrofit.patching.wrapping import unwrapped


@torch.no_grad()
def bank_access(model: nn.Module, rows: Tensor) -> dict[str, SlotShares]:
    """Shares [1, rows of the table] of the reads of each table while the model reads `rows` [R, T].

    Texts are read one at a time. All heads and layers that read a table are counted together.

    Raises:
        ConfigError: rows are not usable token ids.
        StateError: the model has no bank, or nothing is read (a switch is off).
    """
    ids = check_ids(model, rows, 2)
    bank = bank_of(unwrapped(model))
    totals = {name: torch.zeros(table.rows).double() for name, table in bank.each_table()}
    for row in ids:
        for name, count in row_counts(model, {"input_ids": row[None]}).items():
            totals[name] += count
    check_read(totals)
    return {
        name: SlotShares((total / total.sum().clamp(min=1)).float()[None])
        for name, total in totals.items()
    }
