"""One way to train, as a recipe names it: what it reads, how long it takes, and how it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Protocol

from transformers import PreTrainedModel

from memretrofit.data import Document, load_documents, split_documents
from memretrofit.errors import ConfigError
from memretrofit.recipe import Recipe, TrainSection


class Report(Protocol):
    """Takes what a step measured."""

    def __call__(self, step: int, loss: float, **fields: Any) -> None:
        """Step number `step` counts from 1."""
        ...


class Stage(ABC):
    """One stage of a recipe. The stages of a recipe that stand together read one material."""

    name: ClassVar[str]
    """As recipes, logs and checkpoints call it."""

    def __init__(self, recipe: Recipe, processes: int = 1) -> None:
        self.recipe, self.processes = recipe, processes

    @property
    def section(self) -> TrainSection:
        """What the recipe says of training."""
        return self.recipe.train

    @abstractmethod
    def prepare(self, model: PreTrainedModel, tokenizer: Any) -> Any:
        """The material: what the recipe trains on, for the patched `model` on the CPU.

        Raises:
            ConfigError: something of it is missing or broken.
        """

    @abstractmethod
    def tokens(self, material: Any) -> list[int]:
        """Tokens that each step reads, in all processes."""

    @abstractmethod
    def run(
        self, model: Any, material: Any, checkpoints: Path, report: Report, resume: bool
    ) -> Any:
        """Train `model`, going on from a checkpoint of its own; it, or the PeftModel around it."""


class LocalStage(Stage):
    """A stage that one process trains.

    Raises:
        ConfigError: there are several.
    """

    def __init__(self, recipe: Recipe, processes: int = 1) -> None:
        if processes > 1:
            raise ConfigError(
                f"the stage {self.name} trains in one process, and {processes} were launched; "
                "start it without torchrun or accelerate launch"
            )
        super().__init__(recipe, processes)


def training_documents(recipe: Recipe) -> list[Document]:
    """The recipe's sources, without what is held out.

    Raises:
        ConfigError: a source is missing.
    """
    documents = [d for source in recipe.data.sources for d in load_documents(source)]
    kept, _ = split_documents(documents, recipe.data.held_out, recipe.train.seed)
    return kept
