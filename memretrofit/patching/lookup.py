"""The tokens behind embeddings: rows of a model's table, found by the bits of the row."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

NO_TOKEN = -1
"""Id of an embedding that is no token's."""

NUMBERS = 2**22
"""Numbers of the table, or of embeddings, that are looked at together."""

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class TokenLookup:
    """Finds the token whose embedding a vector is, bit for bit; of equal ones the first.

    Rows are compared by a 64-bit sum of their bits, so a search makes nothing of size B T V; the
    sums of the table are made once.
    """

    def __init__(self, table: nn.Embedding) -> None:
        self.table = table

    @torch.no_grad()
    def __call__(self, embeds: Tensor) -> Tensor:
        """[B, T] tokens of `embeds` [B, T, E]; `NO_TOKEN` where it is nobody's."""
        rows = embeds.detach().flatten(0, 1)
        parts = [self._found(part) for part in rows.split(self._step)]
        return torch.cat(parts).view(embeds.shape[:-1])

    @cached_property
    def _known(self) -> tuple[Tensor, Tensor]:
        """Sums of the table's rows in order [V], and whose each is [V]."""
        ids = torch.arange(self.table.num_embeddings, device=self.table.weight.device)
        # what the module says, not its weight: some models scale it
        sums = torch.cat([_sum(self.table(part)) for part in ids.split(self._step)])
        known, order = sums.sort(stable=True)
        return known, order

    @property
    def _step(self) -> int:
        return max(1, NUMBERS // self.table.embedding_dim)

    def _found(self, rows: Tensor) -> Tensor:
        known, order = self._known
        place = torch.searchsorted(known, _sum(rows)).clamp(max=len(known) - 1)
        token = order[place]
        return token.masked_fill((self.table(token) != rows).any(-1), NO_TOKEN)


def _sum(rows: Tensor) -> Tensor:
    """A 64-bit sum of the bits of each row [n, E], weighed by odd numbers."""
    # + 0.0: of the two zeros one
    bits = (rows.detach() + 0.0).contiguous().view(_BITS[rows.element_size()])
    generator = torch.Generator().manual_seed(rows.shape[-1])
    weights = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator) * 2 + 1
    return (bits.long() * weights.to(bits.device)).sum(-1)
