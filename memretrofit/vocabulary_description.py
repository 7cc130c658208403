"""What tokens behind a model's vocabulary added to it."""

from __future__ import annotations

from torch import nn

from memretrofit.description import base_parameters
from memretrofit.patching.vocabulary import VocabularyLedger
from memretrofit.patching.wrapping import unwrapped


def render_vocabulary(model: nn.Module, ledger: VocabularyLedger) -> str:
    """The ids of the open procedures, how many wait, what trains, and the totals, as plain text."""
    inner, memory = unwrapped(model), ledger.memory
    opened, room, first = int(memory.opened), len(memory.rows), ledger.vocab_size
    ids = f"ids {first} to {first + opened - 1}" if opened else "none is open"
    parameters = list(memory.parameters())
    added = sum(p.numel() for p in parameters)
    trains = sum(p.numel() for p in parameters if p.requires_grad)
    base = sum(p.numel() for _, p in base_parameters(inner))
    share = f"{100 * added / base:.2f}% of the base model's {base:,}" if base else "no base weights"
    return "\n".join(
        [
            f"{type(inner).__name__} + {ledger.config}",
            f"vocabulary: {first:,} tokens, and room for {room:,} procedures behind it",
            f"open procedures: {opened:,} of {room:,}, {ids}",
            f"parameters added: {added:,} ({share}), of which {trains:,} train",
            "cache: as without the memory",
        ]
    )
