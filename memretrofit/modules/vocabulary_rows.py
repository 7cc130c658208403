"""Rows behind a model's vocabulary: each is a new token, an embedding and a class."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from memretrofit.errors import ConfigError

LEAST_NORM = 1e-6


class VocabularyRows(nn.Module):
    """l rows [E], each a parameter of its own, so that one can be frozen while another trains and
    no optimizer touches it. Of the l, the first `opened` are tokens; the others wait.

    Args:
        rows: [l, E] at the start.
        output_rows: [l, E] at the start, where a class has another row than its embedding.
    """

    opened: Tensor
    """[] int: saved with the rows."""

    def __init__(self, rows: Tensor, output_rows: Tensor | None = None) -> None:
        super().__init__()
        self.rows = nn.ParameterList(row.clone() for row in rows)
        self.output_rows = None
        if output_rows is not None:
            self.output_rows = nn.ParameterList(row.clone() for row in output_rows)
        self.register_buffer("opened", torch.tensor(0))
        self._learns_from = 0
        self._counted: tuple[Tensor | None, int, int] = (None, 0, 0)
        self._held = False
        self._stacked: tuple[Tensor, Tensor] | None = None

    def forward(self) -> tuple[Tensor, Tensor]:
        """The embeddings [n, E] and the classes [n, E] of the n open rows, n > 0."""
        if self._stacked is not None and not torch.is_grad_enabled():
            return self._stacked
        found = _pair([torch.stack(self._open_rows(table)) for table in self._tables()])
        if self._held and not torch.is_grad_enabled():
            self._stacked = found
        return found

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, rows do not change: stacked once, and not for every token that is decoded."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
            self._stacked = self._stacked if before else None

    @property
    def count(self) -> int:
        """`opened`, which is read from its device only where it may have changed."""
        if self.opened.is_inference():  # it has no version
            return int(self.opened)
        held, version, count = self._counted
        if held is not self.opened or version != self.opened._version:
            count = int(self.opened)
            self._counted = (self.opened, self.opened._version, count)
        return count

    @property
    def closed(self) -> list[nn.Parameter]:
        """The rows that must not train: those that wait, and those that were open before the last
        call of `open`.
        """
        learning = range(self._learns_from, self.count)
        pairs = (pair for table in self._tables() for pair in enumerate(table.parameters()))
        return [row for number, row in pairs if number not in learning]

    def open(self, count: int) -> None:
        """Let the first `count` rows be tokens. Those that were none before train; no other does.

        Raises:
            ConfigError: fewer than are open, or more than there are.
        """
        before = self.count
        if type(count) is not int or not before < count <= len(self.rows):
            raise ConfigError(
                f"count={count!r}: {before} of {len(self.rows)} procedures are open, so it must be "
                f"an int above {before} and at most {len(self.rows)}. Patch with a larger "
                "num_procedures to have more."
            )
        self.opened.fill_(count)
        self._learns_from = before
        for rows in self._tables():
            for number, row in enumerate(rows):
                row.requires_grad_(before <= number < count)

    @torch.no_grad()
    def renormalise(self) -> None:
        """Apply `renormalised` to the classes of the open rows; active are those that train."""
        rows = self._open_rows(self._tables()[-1])
        active = torch.tensor([row.requires_grad for row in rows], dtype=torch.bool)
        if not active.any():
            return
        found = renormalised(torch.stack(rows), active)
        for row, new in zip(rows, found, strict=True):
            if row.requires_grad:
                row.copy_(new)

    def _open_rows(self, table: nn.ParameterList) -> list[Tensor]:
        # an iterator over the list itself looks each row up by its name, ten times as slowly
        return list(itertools.islice(table.parameters(recurse=False), self.count))

    def _tables(self) -> list[nn.ParameterList]:
        return [rows for rows in (self.rows, self.output_rows) if rows is not None]


def _pair(tables: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings and classes, of two tables or of one."""
    return tables[0], tables[-1]


def renormalised(rows: Tensor, active: Tensor) -> Tensor:
    """`rows` [l, E] with each active one at the mean length of the others::

        M_i <- M_i / |M_i| * mean_{j not active} |M_j|       i active

    of all rows where all are active. The others keep their bits. A class that is longer than the
    rest wins more often than its direction says; the released code does this after each step.

    Args:
        active: [l] bool.
    """
    norms = rows.norm(dim=-1, keepdim=True).clamp(min=LEAST_NORM)
    active = active.to(rows.device)
    others = norms if bool(active.all()) else norms[~active]
    return torch.where(active[:, None], rows * (others.mean() / norms), rows)


def like_rows_of(table: Tensor, count: int) -> Tensor:
    """[count, E] float32, drawn around the mean of a table [V, E] with its spread in each place."""
    if table.is_meta:
        return torch.empty(count, table.shape[1], device="meta")
    variance, mean = torch.var_mean(table.detach(), dim=0, correction=0)
    noise = torch.randn(count, table.shape[1])
    return mean.float().cpu() + variance.sqrt().float().cpu() * noise
