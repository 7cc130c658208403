"""The stage `procedures` of a recipe: rows behind the vocabulary learn `data.procedures`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from memretrofit.data.lessons import Item, mean_tokens, named_texts
from memretrofit.data.procedures import (
    Example,
    names_of,
    procedure_items,
    read_procedures,
    split_examples,
)
from memretrofit.errors import ConfigError
from memretrofit.modules.bank import tensors_sha256
from memretrofit.patching.vocabulary import open_procedures, vocabulary_ledger_of
from memretrofit.recipe import Recipe, TrainSection
from memretrofit.training.procedures import ProcedureSettings, ProcedureStep, train_procedures
from memretrofit.training.stage import LocalStage, Report
from memretrofit.training.trainable import trainable_parameters


@dataclass(frozen=True)
class Procedures:
    """What a recipe teaches."""

    names: tuple[str, ...]
    """Number i is the i-th token behind the vocabulary."""
    items: list[Item]
    held_out: list[Item]


def recipe_examples(recipe: Recipe) -> tuple[Example, ...]:
    """The examples that a recipe names. See `read_procedures` for errors.

    Raises:
        ConfigError: there are more procedures than rows.
    """
    assert recipe.data.procedures is not None
    found = read_procedures(Path(recipe.data.procedures))
    names, room = names_of(found), getattr(recipe.method, "num_procedures", len(found))
    if len(names) > room:
        raise ConfigError(
            f"{recipe.data.procedures} has {len(names)} procedures, and method.num_procedures="
            f"{room}; raise it"
        )
    return found


def procedures_of(recipe: Recipe, tokenizer: Any, first_id: int) -> Procedures:
    """The examples as texts of tokens, of which `first_id` is the first procedure."""
    examples, section = recipe_examples(recipe), recipe.train
    names = names_of(examples)
    kept, asked = split_examples(examples, recipe.data.held_out, section.seed)
    length = section.sequence_length
    return Procedures(
        names,
        procedure_items(kept, names, tokenizer, first_id, length),
        procedure_items(asked, names, tokenizer, first_id, length),
    )


def procedure_settings(section: TrainSection, **others: Any) -> ProcedureSettings:
    """What a recipe says about the stage, but for `others`."""
    own = section.procedures
    values = {field.name: getattr(own, field.name) for field in fields(own)}
    values |= {
        "warmup_ratio": section.warmup_ratio,
        "weight_decay": section.weight_decay,
        "seed": section.seed,
        "save_steps": section.save_steps,
    }
    return ProcedureSettings(**{**values, **others})


class TeachProcedures(LocalStage):
    """Rows behind the vocabulary learn when they are asked for, and what follows them."""

    name = "procedures"

    def prepare(self, model: PreTrainedModel, tokenizer: Any) -> Procedures:
        """Read the examples, and open a row for each procedure.

        Raises:
            ConfigError: the file is broken, a text too long, or a row missing.
            StateError: the method has no rows behind the vocabulary.
        """
        ledger = vocabulary_ledger_of(model)
        found = procedures_of(self.recipe, tokenizer, ledger.vocab_size)
        open_procedures(model, len(found.names))
        return found

    def tokens(self, material: Procedures) -> list[int]:
        """Texts differ in length: their mean."""
        section = self.section.procedures
        return [round(section.batch_size * mean_tokens(material.items))] * section.steps

    def run(
        self, model: Any, material: Procedures, checkpoints: Path, report: Report, resume: bool
    ) -> Any:
        """See `train_procedures`."""

        def tell(step: ProcedureStep) -> None:
            more = {} if step.held_out is None else step.held_out._asdict()
            report(
                step.step,
                step.loss,
                learning_rate=step.learning_rate,
                grad_norm=step.grad_norm,
                **{name: value for name, value in more.items() if value is not None},
            )

        trained, promised = trainable_parameters(model)
        fingerprint = tensors_sha256(named_texts(material.items))[:16]
        train_procedures(
            trained,
            promised,
            material.items,
            material.held_out,
            procedure_settings(self.section, fingerprint=fingerprint),
            checkpoint=checkpoints / f"{self.name}.pt",
            on_step=tell,
        )
        return trained
