"""How often the rows of a bank are read by a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memretrofit.errors import StateError
from memretrofit.modules.bank import MemoryBank
from memretrofit.modules.product_key import Choice, ProductKeyRead
from memretrofit.patching.ffn import bank_of
from memretrofit.patching.ffn_sites import decoder_of
from memretrofit.patching.wrapping import evaluating, unwrapped

INPUTS = ("input_ids", "attention_mask", "position_ids")
"""What of a batch is given to the model."""


@torch.no_grad()
def row_counts(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How often each row of each table is read: int64 [rows], on the CPU.

    A slot counts once for each head, layer and token that reads it, padding left out. Rows that are
    named by the text count as often as the bank asks for them.

    Args:
        model: patched, as it stands; read in evaluation mode, without a cache.
        batch: `input_ids` [B, T], and `attention_mask` [B, T] where there is padding.

    Raises:
        StateError: the model has no bank beside it.
    """
    inner = unwrapped(model)
    bank = bank_of(inner)
    given: dict[str, Any] = {name: batch[name] for name in INPUTS if name in batch}
    mask = given.get("attention_mask")
    real = torch.ones_like(given["input_ids"]) if mask is None else mask
    counts = {name: torch.zeros(table.rows, dtype=torch.long) for name, table in bank.each_table()}
    with evaluating(model), _counted(inner, bank, real.bool(), counts):
        decoder_of(inner)[1](**given, use_cache=False)
    return counts


def check_read(counts: Mapping[str, Tensor]) -> None:
    """Raise a StateError if no row of any table was read."""
    if not any(count.any() for count in counts.values()):
        raise StateError(
            "No row was read: a switch keeps the bank off, or it abstains from all of this text. "
            "Leave memory_disabled and memory_silenced, or pass text that it knows."
        )


@contextmanager
def _counted(
    model: nn.Module, bank: MemoryBank, real: Tensor, counts: dict[str, Tensor]
) -> Iterator[None]:
    def add(name: str, index: Tensor) -> None:
        counts[name] += torch.bincount(index.flatten().cpu(), minlength=len(counts[name]))

    def choosing(name: str) -> Any:
        def hook(keys: nn.Module, args: tuple[Tensor], choice: Choice) -> None:
            read = (choice.weights > 0) & real.to(choice.weights.device)[..., None, None]
            add(name, choice.slots[read])

        return hook

    def asking(name: str) -> Any:
        return lambda table, args: add(name, args[0])

    reads = [module for module in model.modules() if isinstance(module, ProductKeyRead)]
    chosen = {read.table for read in reads}
    handles = [read.keys.register_forward_hook(choosing(read.table)) for read in reads]
    handles += [
        table.register_forward_pre_hook(asking(name))
        for name, table in bank.each_table()
        if name not in chosen  # product keys ask for distinct rows
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
