"""Sparse memory finetuning: new text is written into the few rows that are its own.

Lin et al., 2025, arXiv:2510.15103. Of all slots that a text reads, those that ordinary text reads
too are left alone::

    TF_i   = reads of slot i by this text / all its reads
    IDF_i  = log( (D + 1) / (1 + batches of ordinary text, of D, that read slot i) )
    rows   = the t largest TF_i IDF_i above 0; of equal ones the lower slot

Only these rows move. Rows that were opened for an earlier text would move with them, so their
gradient is taken away (`only_these_rows`); and the optimizer must have no memory of its own, SGD
without momentum. The background is counted once and saved with the bank: count general text, not
more of what is to be written::

    count_background(model, generic_batches)
    for batch in new_text:
        rows = choose_rows(model, batch, top_t=500)
        open_rows(model, rows)
        optimizer = torch.optim.SGD(table_deltas(model), lr=learning_rate)
        with only_these_rows(model, rows):
            loss(batch).backward()
        optimizer.step()

A recipe does the same with `train.inject.rows=own` (`memretrofit.training.writing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from memretrofit.errors import ConfigError, StateError, UnsupportedModelError
from memretrofit.modules.product_key import ProductKeyBank
from memretrofit.patching.ffn import bank_of
from memretrofit.patching.row_counts import check_read, row_counts
from memretrofit.patching.wrapping import unwrapped

Batch = Mapping[str, Tensor]
"""`input_ids` [B, T], and `attention_mask` where there is padding."""


@torch.no_grad()
def count_background(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Count which slots ordinary text reads, in place of any earlier count. Returns D.

    A slot counts once for each batch, however often the batch reads it: the published D is 1000
    batches as large as those of training.

    Raises:
        StateError, UnsupportedModelError: no bank of slots, no batch, or nothing was read.
    """
    bank, number = _slots_of(model), 0
    counts = {name: torch.zeros_like(bank.background(name)) for name, _ in bank.each_table()}
    for batch in batches:
        number += 1
        for name, reads in row_counts(model, batch).items():
            counts[name] += (reads > 0).to(counts[name])
    if not number:
        raise StateError("There is no batch of ordinary text to count. Pass at least one.")
    check_read(counts)
    for name, count in counts.items():
        bank.background(name).copy_(count)
    bank.background_batches.fill_(number)
    return number


def tf_idf(reads: Tensor, background: Tensor, batches: int) -> Tensor:
    """TF_i IDF_i of every slot, float64 [slots], from counts [slots]; zeros if nothing was read."""
    frequency = reads.double() / reads.sum().clamp(min=1)
    return frequency * torch.log((batches + 1) / (1 + background.double()))


def top_rows(scores: Tensor, count: int) -> Tensor:
    """The numbers of at most `count` largest scores above 0, ascending; of equal ones the lower."""
    best = scores.argsort(descending=True, stable=True)[:count]
    return best[scores[best] > 0].sort().values


def choose_rows(model: nn.Module, batch: Batch, *, top_t: int) -> dict[str, Tensor]:
    """The rows of each table that may move for this batch, at most `top_t` each.

    The rows are chosen by what the model reads now: choose again where keys or lower layers train.

    Raises:
        ConfigError: top_t is below 1.
        StateError: the background was not counted, nothing was read, or no slot is the text's own.
        UnsupportedModelError: the bank has no slots.
    """
    if top_t < 1:
        raise ConfigError(f"top_t={top_t}: at least one row has to move")
    bank = _slots_of(model)
    batches = int(bank.background_batches)
    if not batches:
        raise StateError(
            "It is not known which slots ordinary text reads. Call count_background(model, "
            "batches) once; the counts are saved with the bank."
        )
    counts = row_counts(model, batch)
    check_read(counts)
    rows = {
        name: top_rows(tf_idf(reads, bank.background(name).cpu(), batches), top_t)
        for name, reads in counts.items()
    }
    if not any(len(index) for index in rows.values()):
        raise StateError(
            f"Each slot that this text reads was read by all {batches} batches of the background. "
            "Count smaller batches, or give the bank more slots or heads fewer of them (top_k)."
        )
    return rows


def open_rows(model: nn.Module, rows: Mapping[str, Tensor]) -> None:
    """Let these rows train, beside those that are open already."""
    bank = bank_of(unwrapped(model))
    for name, index in rows.items():
        bank.table(name).open(index)


def table_deltas(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is given: the open rows of each table. Anew after rows were opened."""
    return [
        table.delta
        for _, table in bank_of(unwrapped(model)).each_table()
        if table.delta is not None
    ]


@contextmanager
def only_these_rows(model: nn.Module, rows: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a backward pass leaves the gradient of every other open row at zero.

    Raises:
        StateError: a row is not open.
    """
    bank, handles = bank_of(unwrapped(model)), list[Any]()
    for name, table in bank.each_table():
        index = rows.get(name, torch.empty(0, dtype=torch.long))
        shut = index[~table.is_open(index)]
        if len(shut):
            raise StateError(
                f"{len(shut)} of {len(index)} rows of {name} are not open, so they cannot move: "
                f"{shut[:5].tolist()}. Call open_rows(model, rows) first."
            )
        if table.delta is not None and table.delta_index is not None:
            moves = torch.isin(table.delta_index, index.to(table.delta_index.device))
            handles.append(table.delta.register_hook(_masked(moves)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _masked(moves: Tensor) -> Any:
    """A hook that keeps the rows of a gradient, sparse or not, where `moves` [n] is true."""

    def hook(gradient: Tensor) -> Tensor:
        if not gradient.is_sparse:
            return gradient * moves.view(-1, *[1] * (gradient.dim() - 1)).to(gradient)
        gradient = gradient.coalesce()
        kept = moves[gradient.indices()[0]]
        return torch.sparse_coo_tensor(
            gradient.indices()[:, kept],
            gradient.values()[kept],
            gradient.shape,
            is_coalesced=True,
            check_invariants=False,
        )

    return hook


def _slots_of(model: nn.Module) -> ProductKeyBank:
    bank = bank_of(unwrapped(model))
    if not isinstance(bank, ProductKeyBank):
        raise UnsupportedModelError(
            f"{type(bank).__name__} has no slots that hidden states choose, so there is nothing to "
            "count: bank.open_rows(texts) opens what a text reads. Patch product_key or "
            "memory_plus."
        )
    return bank
