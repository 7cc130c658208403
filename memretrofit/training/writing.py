"""What of a bank a step of injection may change, and by which optimizer: `train.inject.rows`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.data.lessons import Item
from memretrofit.errors import ConfigError
from memretrofit.modules.product_key import ProductKeyBank, SlotSizes
from memretrofit.patching.ffn import bank_of
from memretrofit.recipe import InjectSection
from memretrofit.retrofit import memory_parameters
from memretrofit.training.sparse_rows import (
    choose_rows,
    count_background,
    only_these_rows,
    open_rows,
)

ROWS = ".delta"
"""How the name of a table's learned rows ends, among parameters."""


class Writing(ABC):
    """One rule: which rows are opened for lessons, and which of them a step moves."""

    @abstractmethod
    def check(self, method: MethodConfig) -> None:
        """Raise a ConfigError if the rule cannot write into a bank of this method."""

    @abstractmethod
    def learning_rate(self, section: InjectSection) -> float:
        """The one of a recipe that is meant for this rule's optimizers."""

    @abstractmethod
    def open(
        self, model: PreTrainedModel, items: Sequence[Item], generic: Sequence[Tensor]
    ) -> None:
        """Let the rows of `items` train in a prepared bank; `generic` is ordinary text.

        Raises:
            StateError: an item, or all of them, would train nothing.
        """

    @abstractmethod
    def parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """What trains, by its name in `model`. After `open`: open rows are new parameters."""

    @abstractmethod
    def optimizers(
        self, parameters: Mapping[str, nn.Parameter], learning_rate: float
    ) -> list[torch.optim.Optimizer]:
        """For those of `parameters`, of any model."""

    def moving(
        self, model: PreTrainedModel, items: Sequence[int]
    ) -> AbstractContextManager[object]:
        """The context of the backward pass of a step on the items with these numbers."""
        return nullcontext()


class ReadRows(Writing):
    """Every row that a lesson reads learns, and with it what reads them: keys, gates and maps.

    Adam of rows is sparse: it moves those of a step, and no other by its old momentum.
    """

    def check(self, method: MethodConfig) -> None:
        """See `Writing`: it can write into any."""

    def learning_rate(self, section: InjectSection) -> float:
        """See `Writing`."""
        return section.learning_rate

    def open(
        self, model: PreTrainedModel, items: Sequence[Item], generic: Sequence[Tensor]
    ) -> None:
        """See `Writing`."""
        bank_of(model).open_rows([item.ids for item in items])

    def parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """See `Writing`."""
        return memory_parameters(model)

    def optimizers(
        self, parameters: Mapping[str, nn.Parameter], learning_rate: float
    ) -> list[torch.optim.Optimizer]:
        """See `Writing`."""
        rows = [p for name, p in parameters.items() if name.endswith(ROWS)]
        dense = [p for name, p in parameters.items() if not name.endswith(ROWS)]
        found: list[torch.optim.Optimizer] = []
        if rows:
            found.append(torch.optim.SparseAdam(rows, learning_rate))
        if dense:
            found.append(torch.optim.AdamW(dense, learning_rate, weight_decay=0.0))
        return found


class OwnRows(Writing):
    """Sparse memory finetuning (`sparse_rows`): of all rows a step moves those that are its texts'
    own, by SGD without momentum, and leaves every other bit as it was.

    The background is counted where the bank has no counts yet, a piece of ordinary text being a
    batch. Rows are chosen once, by what the model reads before the first step: a step that chose
    anew would open rows that no checkpoint knows of.

    Args:
        top_t: own rows of a text in each table, at most.
    """

    def __init__(self, top_t: int) -> None:
        self.top_t = top_t
        self.rows: list[dict[str, Tensor]] = []
        """Of each item, after `open`."""

    def check(self, method: MethodConfig) -> None:
        """See `Writing`. Values learn by themselves only where the map behind them is not zero."""
        if not isinstance(method, SlotSizes):
            raise ConfigError(
                f"train.inject.rows=own: {method.method} has no slots that hidden states choose, "
                "of which some could be a text's own. Take method.name=product_key or memory_plus "
                "with method.starts_at_zero=rows, or leave train.inject.rows=read."
            )
        if method.starts_at_zero != "rows":
            raise ConfigError(
                f"train.inject.rows=own with method.starts_at_zero={method.starts_at_zero}: only "
                "values learn, and the map behind them is zero and would stay so. Set "
                "method.starts_at_zero=rows."
            )

    def learning_rate(self, section: InjectSection) -> float:
        """See `Writing`."""
        return section.sgd_learning_rate

    def open(
        self, model: PreTrainedModel, items: Sequence[Item], generic: Sequence[Tensor]
    ) -> None:
        """See `Writing`."""
        bank = bank_of(model)
        if not (isinstance(bank, ProductKeyBank) and int(bank.background_batches)):
            count_background(model, ({"input_ids": text[None]} for text in generic))
        self.rows = [
            choose_rows(model, {"input_ids": item.ids[None]}, top_t=self.top_t) for item in items
        ]
        open_rows(model, joined(self.rows))

    def parameters(self, model: PreTrainedModel) -> dict[str, nn.Parameter]:
        """See `Writing`."""
        return {name: p for name, p in memory_parameters(model).items() if name.endswith(ROWS)}

    def optimizers(
        self, parameters: Mapping[str, nn.Parameter], learning_rate: float
    ) -> list[torch.optim.Optimizer]:
        """See `Writing`."""
        return [torch.optim.SGD(parameters.values(), learning_rate)]

    def moving(
        self, model: PreTrainedModel, items: Sequence[int]
    ) -> AbstractContextManager[object]:
        """See `Writing`."""
        return only_these_rows(model, joined([self.rows[number] for number in items]))


def joined(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The rows of all of these, each once."""
    names = {name: None for found in rows for name in found}
    return {
        name: torch.cat([found[name] for found in rows if name in found]).unique() for name in names
    }


def writing_of(section: InjectSection) -> Writing:
    """The rule that a recipe names."""
    rules: dict[str, Any] = {"read": ReadRows, "own": lambda: OwnRows(section.top_t)}
    return rules[section.rows]()
