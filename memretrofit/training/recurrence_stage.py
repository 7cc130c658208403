"""The stage `recurrence` of a recipe: texts of several segments, and the memory between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from memretrofit.data.dialogue_items import DialogueItems
from memretrofit.data.recall_items import RecallItems
from memretrofit.data.stories import (
    Tell,
    where_is_person,
    where_is_thing,
    where_was_thing,
    which_room,
    who_gave_what,
)
from memretrofit.data.story_items import StoryItems
from memretrofit.modules.bank import tensors_sha256
from memretrofit.patching.segment_visit import segment_ledger_of
from memretrofit.recipe import Recipe, TrainSection
from memretrofit.training.recurrence import (
    RecurrenceSettings,
    RecurrenceStep,
    Texts,
    train_recurrence,
)
from memretrofit.training.stage import LocalStage, Report, training_documents
from memretrofit.training.trainable import trainable_parameters

FACTS = 2
"""Of a text, where a recipe does not say."""


def _recall(recipe: Recipe, segment_length: int, tokenizer: Any) -> Texts:
    return RecallItems(tokenizer, segment_length, recipe.train.recurrence.facts or FACTS)


def _dialogue(recipe: Recipe, segment_length: int, tokenizer: Any) -> Texts:
    return DialogueItems(tokenizer, segment_length, recipe.train.recurrence.facts or FACTS)


def _stories(tell: Tell, recipe: Recipe, segment_length: int, tokenizer: Any) -> Texts:
    documents = [document.text for document in training_documents(recipe)]
    return StoryItems(tokenizer, segment_length, tell, documents)


TEXTS: dict[str, Callable[[Recipe, int, Any], Texts]] = {
    "recall": _recall,
    "dialogue": _dialogue,
    "babilong_qa1": partial(_stories, where_is_person),
    "babilong_qa2": partial(_stories, where_is_thing),
    "babilong_qa3": partial(_stories, where_was_thing),
    "babilong_qa4": partial(_stories, which_room),
    "babilong_qa5": partial(_stories, who_gave_what),
}
"""As recipes call them."""


def recurrence_texts(recipe: Recipe, segment_length: int, tokenizer: Any) -> Texts:
    """What a recipe trains a memory between segments on.

    Raises:
        ConfigError: a segment is too short for it, or a source of prose is missing.
    """
    section = recipe.train.recurrence
    texts = TEXTS[section.texts](recipe, segment_length, tokenizer)
    for segments in set(section.segments):
        texts.batch(segments, section.batch_size, "fits")
    return texts


def recurrence_settings(section: TrainSection, **others: Any) -> RecurrenceSettings:
    """What a recipe says about the stage, but for `others`."""
    own = section.recurrence
    known = {field.name for field in fields(RecurrenceSettings)}
    values = {f.name: getattr(own, f.name) for f in fields(own) if f.name in known}
    values |= {
        "warmup_ratio": section.warmup_ratio,
        "weight_decay": section.weight_decay,
        "seed": section.seed,
        "save_steps": section.save_steps,
    }
    return RecurrenceSettings(**{**values, **others})


class Recurrence(LocalStage):
    """The memory, and LoRA with it, learn to answer what earlier segments said."""

    name = "recurrence"

    @property
    def settings(self) -> RecurrenceSettings:
        """Of the loop."""
        return recurrence_settings(self.section)

    def prepare(self, model: PreTrainedModel, tokenizer: Any) -> Texts:
        """See `recurrence_texts`.

        Raises:
            StateError: the method has no memory between segments.
        """
        length = segment_ledger_of(model).memory.segment_length
        return recurrence_texts(self.recipe, length, tokenizer)

    def tokens(self, material: Texts) -> list[int]:
        """By the segments of each step."""
        settings = self.settings
        return [
            round(settings.batch_size * material.tokens(settings.segments_at(step)))
            for step in range(settings.steps)
        ]

    def run(
        self, model: Any, material: Texts, checkpoints: Path, report: Report, resume: bool
    ) -> Any:
        """See `train_recurrence`."""

        def tell(step: RecurrenceStep) -> None:
            more = {} if step.held_out is None else {"held_out": step.held_out}
            report(
                step.step,
                step.loss,
                learning_rate=step.learning_rate,
                segments=step.segments,
                right=step.right,
                grad_norm=step.grad_norm,
                **more,
            )

        section = self.section
        trained, promised = trainable_parameters(
            model, section.trainable, lora_rank=section.lora_rank, lora_alpha=section.lora_alpha
        )
        train_recurrence(
            trained,
            promised,
            material,
            replace(self.settings, fingerprint=_fingerprint(material, self.settings)),
            checkpoint=checkpoints / f"{self.name}.pt",
            on_step=tell,
        )
        return trained


def _fingerprint(texts: Texts, settings: RecurrenceSettings) -> str:
    """A hash of some of the texts."""
    drawn = [(str(n), texts.batch(n, 1, "fingerprint").ids) for n in settings.segments]
    return tensors_sha256(drawn)[:16]
