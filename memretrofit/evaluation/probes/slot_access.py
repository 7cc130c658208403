"""How evenly the slots of a memory are used.

What a slot is, the memory says (`AttentionMemory.accesses`). Of a recurrent state or a feature map
it is one key dimension of a head's state S [K, V]: row d of S. A token is written under a key k
with strength beta, and the state read with a query q, both as the state meets them (centred, or
mapped to features). Each access spreads over the slots by its share of energy::

    writes_d ∝ Σ_t beta_t (k_td / |k_t|)²     over the tokens that left the window
    reads_d  ∝ Σ_t (q_td / |q_t|)²            over the queries that find something

Both sum to 1 over d; of a head whose keys or queries are all zero, to 0. `busiest` is the share of
the most used slots, `effective` the number of equally used slots with the same entropy,
exp(-Σ_d p_d log p_d): all of them where they are used alike, 1 where a single one is. Decay does
not enter: these are accesses, not what is left of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memretrofit.config import exact_tokens
from memretrofit.errors import ConfigError, StateError
from memretrofit.evaluation.probes.full_attention import check_ids, last_logits
from memretrofit.modules.memory import AttentionMemory, Block
from memretrofit.patching.surgery import attention_ledger_of
from memretrofit.patching.wrapping import evaluating, unwrapped


@dataclass(frozen=True, eq=False)
class SlotShares:
    """How the accesses of each head spread over its slots."""

    shares: Tensor
    """float32, each row sums to 1.                                             [heads, slots]"""

    def busiest(self, fraction: float = 0.01) -> Tensor:
        """[heads] share of the accesses that falls on the most used `fraction` of the slots, at
        least one slot.

        Raises:
            ConfigError: the fraction is not in (0, 1].
        """
        if not 0 < fraction <= 1:
            raise ConfigError(f"busiest: fraction={fraction} must lie in (0, 1]")
        count = math.ceil(fraction * self.shares.shape[-1])
        return self.shares.topk(count, dim=-1).values.sum(-1)

    def effective(self) -> Tensor:
        """[heads] number of equally used slots with the same entropy."""
        return torch.special.entr(self.shares).sum(-1).exp()

    def kl_to_uniform(self) -> Tensor:
        """[heads] Σ_d p_d log(p_d n) over n slots, in nats: 0 where all are used alike, log n where
        a single one is, NaN where none is.
        """
        slots = self.shares.shape[-1]
        divergence = math.log(slots) - torch.special.entr(self.shares).sum(-1)
        return divergence.where(self.shares.any(-1), torch.nan)

    def gini(self) -> Tensor:
        """[heads] Σ_i (2 i - n - 1) p_(i) / n over the shares in ascending order, i from 1: 0 where
        all n are used alike, 1 - 1/n where a single one is, NaN where none is.
        """
        ascending, slots = self.shares.double().sort(dim=-1).values, self.shares.shape[-1]
        weights = torch.arange(1 - slots, slots, 2, device=ascending.device)
        found = (weights * ascending).sum(-1) / slots / ascending.sum(-1)
        return found.float()

    def used(self) -> Tensor:
        """[heads] share of the slots that are used at all."""
        return (self.shares > 0).float().mean(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class SlotAccess:
    """Writes and reads of each layer's memory."""

    layers: tuple[int, ...]
    """Index in the model of each layer."""
    writes: tuple[SlotShares, ...]
    """Of each head that holds a state."""
    reads: tuple[SlotShares, ...]
    """Of each query head."""


@torch.no_grad()
def slot_access(model: nn.Module, rows: Tensor) -> SlotAccess:
    """Use of the slots of every memory of a patched model while it reads `rows` [R, T].

    Rows are read one at a time, without a cache, as the model stands.

    Raises:
        StateError: the model is not patched, or nothing is written (a switch is off).
        ConfigError: rows are not usable or too short for anything to be written, or the method
            keeps no state.
        UnsupportedModelError: a memory that does not say how its slots are addressed.
    """
    ledger = attention_ledger_of(unwrapped(model))
    seams: Any = ledger.seams
    ids = check_ids(model, rows, 2)
    memories: list[AttentionMemory] = [seam.memory for seam in seams.values()]
    kept = exact_tokens(ledger.config) or 0
    if ids.shape[1] <= kept:
        raise ConfigError(
            f"slot_access: rows of {ids.shape[1]} tokens never leave the window and the sinks; "
            f"pass at least {kept + 1} tokens"
        )
    for memory in memories:
        if not memory.state_nbytes(1):
            raise ConfigError(
                f"slot_access: {type(memory).__name__} keeps no state, so it has no slots. Patch "
                "a method that has one, such as AHNConfig()."
            )
    counts = [_Count() for _ in memories]
    handles = [
        memory.register_forward_pre_hook(count)
        for memory, count in zip(memories, counts, strict=True)
    ]
    try:
        with evaluating(model):
            for row in ids:
                last_logits(model, row[None])
    finally:
        for handle in handles:
            handle.remove()
    totals = [count.totals() for count in counts]
    return SlotAccess(
        layers=tuple(seam.layer_idx for seam in seams.values()),
        writes=tuple(writes for writes, _ in totals),
        reads=tuple(reads for _, reads in totals),
    )


class _Count:
    """A pre-hook of one memory that adds up its accesses."""

    def __init__(self) -> None:
        self.writes: Any = 0.0
        self.reads: Any = 0.0

    def __call__(self, memory: nn.Module, args: tuple[Block, Any]) -> None:
        """Add the accesses of one block."""
        block = args[0]
        found = memory.accesses(block)  # type: ignore[operator]
        self.writes = self.writes + found.writes[0].sum(1).double().cpu()
        if found.reads is not None:
            # in an unpadded row, every token after the first that is written is written too
            self.reads = self.reads + found.reads[0][:, block.writes[0]].sum(1).double().cpu()

    def totals(self) -> tuple[SlotShares, SlotShares]:
        """Shares of writes and of reads."""
        if not torch.as_tensor(self.writes).any():
            raise StateError(
                "nothing was written to the memory, so no slot was used: a switch keeps it off. "
                "Leave memory_disabled, memory_silenced, writes_disabled and intercepted."
            )
        return _shares(self.writes), _shares(self.reads)


def _shares(totals: Tensor) -> SlotShares:
    """[heads, slots], each head's divided by their sum; zeros stay zeros."""
    return SlotShares(F.normalize(totals, p=1, dim=-1, eps=1e-300).float())
