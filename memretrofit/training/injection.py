"""The stage `inject` of a recipe: what a bank learns, and the ordinary text that it must leave
alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from memretrofit.data import RowDataset
from memretrofit.data.lessons import (
    Item,
    items_of,
    mean_tokens,
    named_texts,
    read_lessons,
)
from memretrofit.errors import ConfigError
from memretrofit.hub import from_pretrained, read_record
from memretrofit.hub.record import DELTA, MEMORY
from memretrofit.modules.bank import Preparation, tensors_sha256
from memretrofit.patching.ffn import bank_of
from memretrofit.recipe import InjectSection, Recipe, TrainSection
from memretrofit.retrofit import unpatch
from memretrofit.training.inject import InjectSettings, InjectStep, inject
from memretrofit.training.stage import LocalStage, Report, training_documents
from memretrofit.training.writing import Writing, writing_of

GENERIC_TEXTS, GENERIC_TOKENS = 400, 128
"""Pieces of ordinary text, and their length, by which a bank learns what not to answer to. One has
about as many tokens as a step of lessons, as counts of a background want it.
"""


@dataclass(frozen=True)
class Material:
    """What a bank is about to learn, and by which rule, opened for just these texts."""

    items: list[Item]
    writing: Writing


def check_injection(recipe: Recipe) -> None:
    """Look at all that can be looked at before a model is loaded.

    Raises:
        ConfigError: lessons are missing or broken, the method has no rows of the kind that is
            asked for, or the bank of `onto` is of another method.
        CheckpointError: the folder of `onto` holds no usable bank.
    """
    section = recipe.train.inject
    writing_of(section).check(recipe.method)
    for path in (recipe.data.lessons, *section.later, *section.earlier):
        if path is not None:
            read_lessons(Path(path))
    if section.onto is None:
        return
    record = read_record(section.onto)
    if record.method != recipe.method:
        mine, other = recipe.method.to_dict(), record.method.to_dict()
        differ = sorted(k for k in {*mine, *other} if mine.get(k) != other.get(k))
        raise ConfigError(
            f"train.inject.onto={section.onto}: a bank of {record.method.method}, and the recipe "
            f"has another method (other: {', '.join(differ)}). Say the method of that bank, or "
            "start a new one without onto."
        )
    if set(record.files) != {MEMORY, DELTA}:
        raise ConfigError(
            f"train.inject.onto={section.onto}: holds {', '.join(sorted(record.files))}, and a "
            f"bank that goes on learning has {MEMORY} and {DELTA}, no more. Name the folder that "
            "an injection wrote."
        )


def prepare_injection(recipe: Recipe, model: PreTrainedModel, tokenizer: Any) -> Material:
    """Read the lessons, fit a new bank to them or take over what another learned, and open rows.

    Raises:
        ConfigError: the file of lessons is broken, or a source of ordinary text is missing.
        StateError: the lessons read no row.
        CheckpointError: the bank of `onto` is damaged, or stands beside another base model.
    """
    section, items = recipe.train.inject, lesson_items(recipe, tokenizer)
    generic = generic_texts(recipe, tokenizer)
    if section.onto is None:
        length = recipe.train.sequence_length
        later = [x for path in section.later for x in _items(Path(path), tokenizer, length)]
        fit_bank(model, [*items, *later], generic, tokenizer)
    else:
        unpatch(model)
        from_pretrained(section.onto, base=model)
    return opened(section, model, items, generic)


def opened(
    section: InjectSection, model: PreTrainedModel, items: list[Item], generic: list[Tensor]
) -> Material:
    """The items, with the rows open that they may change. See `Writing.open` for errors."""
    writing = writing_of(section)
    writing.open(model, items, generic)
    return Material(items, writing)


def lesson_items(recipe: Recipe, tokenizer: Any) -> list[Item]:
    """What the lessons of a recipe train on. See `read_lessons` for errors."""
    assert recipe.data.lessons is not None
    return _items(Path(recipe.data.lessons), tokenizer, recipe.train.sequence_length)


def _items(path: Path, tokenizer: Any, length: int) -> list[Item]:
    return items_of(read_lessons(path), tokenizer, length)


def fit_bank(
    model: PreTrainedModel, items: list[Item], generic: list[Tensor], tokenizer: Any
) -> None:
    """Prepare the bank of `model` for the contexts of `items`; their answers it does not see."""
    embedding: Any = model.get_input_embeddings()
    bank_of(model).prepare(
        Preparation(
            examples=[item.ids[: item.first] if item.first > 1 else item.ids for item in items],
            generic=generic,
            embedding=embedding.weight.detach(),
            tokenizer=tokenizer,
        )
    )


def generic_texts(recipe: Recipe, tokenizer: Any) -> list[Tensor]:
    """Pieces of the recipe's sources, of the part that may be looked at before the evaluation.

    Raises:
        ConfigError: a source is missing, or too short for one piece.
    """
    kept, seed = training_documents(recipe), recipe.train.seed
    rows = RowDataset(kept, tokenizer, GENERIC_TOKENS, 0.0, seed, size=GENERIC_TEXTS).rows()[0]
    return list(rows)


def _fingerprint(model: PreTrainedModel, material: Material, section: InjectSection) -> str:
    """A hash of the texts, of all that decides which rows they read, and of what rows begin as."""
    learned = material.writing.parameters(model) if section.onto is not None else {}
    return tensors_sha256(
        [*named_texts(material.items), *bank_of(model).named_buffers(), *learned.items()]
    )[:16]


def inject_settings(section: TrainSection, **others: Any) -> InjectSettings:
    """What a recipe says about injection, but for `others`."""
    values = {
        "steps": section.inject.steps,
        "batch_size": section.inject.batch_size,
        "learning_rate": writing_of(section.inject).learning_rate(section.inject),
        "warmup_ratio": section.warmup_ratio,
        "seed": section.seed,
        "save_steps": section.save_steps,
    }
    return InjectSettings(**{**values, **others})


class Inject(LocalStage):
    """What a bank may change learns the lessons."""

    name = "inject"

    def __init__(self, recipe: Recipe, processes: int = 1) -> None:
        super().__init__(recipe, processes)
        check_injection(recipe)

    def prepare(self, model: PreTrainedModel, tokenizer: Any) -> Material:
        """See `prepare_injection`."""
        return prepare_injection(self.recipe, model, tokenizer)

    def tokens(self, material: Material) -> list[int]:
        """Texts differ in length: their mean."""
        section = self.section.inject
        return [round(section.batch_size * mean_tokens(material.items))] * section.steps

    def run(
        self, model: Any, material: Material, checkpoints: Path, report: Report, resume: bool
    ) -> Any:
        """See `inject`."""

        def tell(step: InjectStep) -> None:
            report(step.step, step.loss, learning_rate=step.learning_rate)

        fingerprint = _fingerprint(model, material, self.section.inject)
        inject(
            model,
            material.writing.parameters(model),
            material.items,
            inject_settings(self.section, fingerprint=fingerprint),
            writing=material.writing,
            checkpoint=checkpoints / f"{self.name}.pt",
            on_step=tell,
        )
        return model
