"""What tokens behind a model's vocabulary added to it."""

from __future__ import annotations

from torch import nn

from memretrofit.description import share_of_base
from memretrofit.patching.vocabulary import VocabularyLedger
from memretrofit.patching.wrapping import unwrapped


def render_vocabulary(model: nn.Module, ledger: VocabularyLedger) -> str:
    """The ids of the open procedures, how many wait, what trains, and the totals, as plain text."""
    inner, memory = unwrapped(model), ledger.memory
    opened = 0 if memory.opened.is_meta else int(memory.opened)
    room, first = len(memory.rows), ledger.vocab_size
    ids = f"ids {first} to {first + opened - 1}" if opened else "none is open"
    parameters = list(memory.parameters())
    added = sum(p.numel() for p in parameters)
    trains = sum(p.numel() for p in parameters if p.requires_grad)
    return "\n".join(
        [
            f"{type(inner).__name__} + {ledger.config}",
            f"vocabulary: {first:,} tokens, and room for {room:,} procedures behind it",
            f"open procedures: {opened:,} of {room:,}, {ids}",
            f"parameters added: {added:,} ({share_of_base(inner, added)}), "
            f"of which {trains:,} train",
            "cache: as without the memory",
        ]
    )
