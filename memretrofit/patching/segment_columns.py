"""The columns of one forward over pieces of a text that is read in segments, and what of its output
is the text's own.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memretrofit.errors import UnsupportedModelError
from memretrofit.modules.segment_memory import Columns, Part, State
from memretrofit.patching.pieces import JOINED

KEEP = "logits_to_keep"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One forward: what it reads, and what the text is afterwards."""

    columns: Columns
    call: dict[str, Any]
    opening: int
    tokens: int
    trailing: int
    counts: Tensor
    """[B] tokens of each row."""
    pieces: tuple[Tensor, ...]
    """As `Session.pieces`."""


@functools.cache
def chooses_logits(model: type[PreTrainedModel]) -> bool:
    """Whether its forward can be asked for the logits of some tokens alone."""
    return KEEP in inspect.signature(model.forward).parameters


def slides(model: PreTrainedModel) -> bool:
    """Whether distance in attention is counted in columns, as it is in a sliding window: then no
    other column may stand between those of a row.
    """
    return getattr(model.config.get_text_config(), "sliding_window", None) is not None


class Parts:
    """Columns of several spans, one behind the other."""

    def __init__(self, begin: int) -> None:
        self.begin = self.end = begin
        self.parts: list[Part] = []
        self.embeds: list[Tensor] = []
        self.real: list[Tensor] = []

    def add(self, span: int, rows: Tensor, embeds: Tensor | None, real: Tensor | None) -> None:
        """Columns [B, n, E] that `rows` [B] have, of those that are `real` [B, n]: both end up on
        the CPU.
        """
        begin = self.end
        if embeds is not None and embeds.shape[1]:
            self.end += embeds.shape[1]
            self.embeds.append(embeds)
            there = rows[:, None].expand(-1, embeds.shape[1])
            self.real.append(there if real is None else there & real.cpu())
        self.parts.append(Part(span, begin, self.end, rows))


def known(width: int, counts: Tensor) -> Tensor:
    """[B, width] bool: which of the last columns hold a token, where the row has so many."""
    return torch.arange(width, 0, -1, device=counts.device) <= counts[:, None]


def nothing_like(embeds: Tensor) -> Tensor:
    """[B, 0, E]; a slice would keep all of `embeds` [B, T, E]."""
    return embeds.new_empty(len(embeds), 0, embeds.shape[-1])


def or_ones(real: Tensor | None, embeds: Tensor) -> Tensor:
    """`real` [B, T], or that all of `embeds` [B, T, E] are."""
    return torch.ones(embeds.shape[:2], dtype=torch.bool) if real is None else real


def where_rows(rows: Tensor, new: State, old: State) -> State:
    """`new` in the chosen rows, and the tensors of `old` with these names in the others."""
    on = {device: rows.to(device) for device in {x.device for x in new.values()}}
    return {
        name: torch.where(on[x.device].view(-1, *(1,) * (x.ndim - 1)), x, old[name])
        for name, x in new.items()
    }


def tokens_of(output: Any, plan: Plan) -> Any:
    """The output of the piece's own tokens."""
    columns = slice(plan.opening, plan.opening + plan.tokens)
    more = plan.opening + plan.trailing
    unknown = [name for name in output if name not in JOINED and output[name] is not None]
    if more and unknown:
        raise UnsupportedModelError(
            f"A model that reads in segments was asked for {', '.join(unknown)}, and these would "
            f"be of {more} more columns than tokens. Do not ask for them."
        )
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(x[:, columns] for x in output["hidden_states"])
    if output.logits.shape[1] == plan.tokens + more and more:
        output["logits"] = output.logits[:, columns]
    return output
