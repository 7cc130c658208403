"""The stage `inject` of a recipe: what a bank learns, and the ordinary text that it must leave
alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from memretrofit.data import RowDataset
from memretrofit.data.lessons import Item, items_of, read_lessons
from memretrofit.modules.bank import Preparation, tensors_sha256
from memretrofit.patching.ffn import bank_of
from memretrofit.recipe import Recipe, TrainSection
from memretrofit.retrofit import memory_parameters
from memretrofit.training.inject import InjectSettings, InjectStep, inject
from memretrofit.training.stage import LocalStage, Report, training_documents

GENERIC_TEXTS, GENERIC_TOKENS = 400, 128
"""Pieces of ordinary text, and their length, by which a bank learns what not to answer to."""


def prepare_injection(recipe: Recipe, model: PreTrainedModel, tokenizer: Any) -> list[Item]:
    """Read the lessons, fit the bank to them, and open the rows that they read.

    Raises:
        ConfigError: the file of lessons is broken, or a source of ordinary text is missing.
        StateError: the lessons read no row.
    """
    items = lesson_items(recipe, tokenizer)
    fit_bank(model, items, generic_texts(recipe, tokenizer), tokenizer)
    return items


def lesson_items(recipe: Recipe, tokenizer: Any) -> list[Item]:
    """What the lessons of a recipe train on. See `read_lessons` for errors."""
    assert recipe.data.lessons is not None
    lessons = read_lessons(Path(recipe.data.lessons))
    return items_of(lessons, tokenizer, recipe.train.sequence_length)


def fit_bank(
    model: PreTrainedModel, items: list[Item], generic: list[Tensor], tokenizer: Any
) -> None:
    """Prepare the bank of `model` for `items`, and open the rows that they read.

    Raises:
        StateError: they read no row.
    """
    bank = bank_of(model)
    embedding: Any = model.get_input_embeddings()
    bank.prepare(
        Preparation(
            examples=[item.ids[: item.first] if item.first > 1 else item.ids for item in items],
            generic=generic,
            embedding=embedding.weight.detach(),
            tokenizer=tokenizer,
        )
    )
    bank.open_rows([item.ids for item in items])


def generic_texts(recipe: Recipe, tokenizer: Any) -> list[Tensor]:
    """Pieces of the recipe's sources, of the part that may be looked at before the evaluation.

    Raises:
        ConfigError: a source is missing, or too short for one piece.
    """
    kept, seed = training_documents(recipe), recipe.train.seed
    rows = RowDataset(kept, tokenizer, GENERIC_TOKENS, 0.0, seed, size=GENERIC_TEXTS).rows()[0]
    return list(rows)


def _fingerprint(model: PreTrainedModel, items: list[Item]) -> str:
    """A hash of the texts, and of all that decides which rows they read."""
    texts = ((str(item.first), item.ids) for item in items)
    return tensors_sha256([*texts, *bank_of(model).named_buffers()])[:16]


def inject_settings(section: TrainSection, **others: Any) -> InjectSettings:
    """What a recipe says about injection, but for `others`."""
    values = {
        "steps": section.inject.steps,
        "batch_size": section.inject.batch_size,
        "learning_rate": section.inject.learning_rate,
        "warmup_ratio": section.warmup_ratio,
        "seed": section.seed,
        "save_steps": section.save_steps,
    }
    return InjectSettings(**{**values, **others})


class Inject(LocalStage):
    """What a bank may change learns the lessons."""

    name = "inject"

    def prepare(self, model: PreTrainedModel, tokenizer: Any) -> list[Item]:
        """See `prepare_injection`."""
        return prepare_injection(self.recipe, model, tokenizer)

    def tokens(self, material: list[Item]) -> list[int]:
        """Texts differ in length: their mean."""
        section = self.section.inject
        mean = sum(len(item.ids) for item in material) / len(material)
        return [round(section.batch_size * mean)] * section.steps

    def run(
        self, model: Any, material: list[Item], checkpoints: Path, report: Report, resume: bool
    ) -> Any:
        """See `inject`."""

        def tell(step: InjectStep) -> None:
            report(step.step, step.loss, learning_rate=step.learning_rate)

        settings = inject_settings(self.section, fingerprint=_fingerprint(model, material))
        inject(
            model,
            memory_parameters(model),
            material,
            settings,
            checkpoint=checkpoints / f"{self.name}.pt",
            on_step=tell,
        )
        return model
