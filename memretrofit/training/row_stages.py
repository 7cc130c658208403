"""The stages that read rows of ordinary text: `transfer` and `distill` of a recipe."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import PreTrainedModel

from memretrofit.data import RowDataset
from memretrofit.recipe import Recipe, TrainSection
from memretrofit.training.distill import DistillSettings, DistillStep, self_distillation
from memretrofit.training.stage import Report, Stage, training_documents
from memretrofit.training.trainable import trainable_parameters
from memretrofit.training.transfer import TransferSettings, TransferStep, attention_transfer


def stage_rows(section: TrainSection, processes: int = 1) -> dict[str, int]:
    """How many rows each stage of a recipe reads, in order."""
    accumulated = section.batch_size * section.gradient_accumulation_steps
    rows = {
        "transfer": section.transfer.steps * section.transfer.batch_size * processes,
        "distill": section.max_steps * accumulated * processes,
    }
    return {stage: rows[stage] for stage in section.stages}


def training_rows(recipe: Recipe, tokenizer: Any, processes: int = 1) -> RowDataset:
    """Rows of the training sources without what is held out, as many as all stages read."""
    section = recipe.train
    return RowDataset(
        training_documents(recipe),
        tokenizer,
        section.sequence_length,
        recipe.data.repeated_passage_share,
        section.seed,
        minimum_lag=_minimum_lag(section),
        size=sum(stage_rows(section, processes).values()),
    )


def _minimum_lag(section: TrainSection) -> int:
    """A passage returns beyond every window, and at least half a row later if that is farther."""
    length, widest = section.sequence_length, max(section.window_range) + max(section.sink_range)
    longest = max(1, length // 4)  # RowDataset's longest passage
    return min(max(length // 2, widest), length - longest)


class RowStage(Stage):
    """Each stage reads its own part of the rows, behind those of the stages before it."""

    def prepare(self, model: PreTrainedModel, tokenizer: Any) -> RowDataset:
        """See `training_rows`."""
        return training_rows(self.recipe, tokenizer, self.processes)

    @property
    @abstractmethod
    def steps(self) -> int:
        """Updates."""

    def tokens(self, material: Any) -> list[int]:
        """Rows are of one length."""
        rows = stage_rows(self.section, self.processes)[self.name]
        return [rows // self.steps * self.section.sequence_length] * self.steps

    def part(self, rows: Any) -> Subset:
        """The rows of this stage."""
        begin = 0
        for name, count in stage_rows(self.section, self.processes).items():
            if name == self.name:
                return Subset(rows, range(begin, begin + count))
            begin += count
        raise AssertionError(self.name)


class Transfer(RowStage):
    """Each layer's memory learns the far part of that layer's own full attention."""

    name = "transfer"

    @property
    def steps(self) -> int:
        """Updates of every layer."""
        return self.section.transfer.steps

    def run(
        self, model: Any, material: Any, checkpoints: Path, report: Report, resume: bool
    ) -> Any:
        """See `attention_transfer`."""

        def tell(step: TransferStep) -> None:
            report(
                step.step,
                step.loss,
                learning_rate=step.learning_rate,
                window=step.draw.sliding_window,
                sinks=step.draw.num_sink_tokens,
                r2=sum(step.r2.values()) / len(step.r2),
                r2_by_layer=[round(value, 4) for value in step.r2.values()],
            )

        attention_transfer(
            model,
            self.part(material),
            transfer_settings(self.section),
            checkpoint=checkpoints / f"{self.name}.pt",
            on_step=tell,
        )
        return model


class Distill(RowStage):
    """The whole model learns to be itself with full attention."""

    name = "distill"

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return self.section.max_steps

    def run(
        self, model: Any, material: Any, checkpoints: Path, report: Report, resume: bool
    ) -> Any:
        """See `self_distillation`."""

        def tell(step: DistillStep) -> None:
            report(
                step.step,
                step.loss,
                learning_rate=step.learning_rate,
                window=step.draw.sliding_window,
                sinks=step.draw.num_sink_tokens,
                grad_norm=step.grad_norm,
            )

        section = self.section
        trained, promised = trainable_parameters(
            model, section.trainable, lora_rank=section.lora_rank, lora_alpha=section.lora_alpha
        )
        self_distillation(
            trained,
            promised,
            self.part(material),
            distill_settings(section),
            checkpoints / self.name,
            resume=resume,
            on_step=tell,
        )
        return trained


def transfer_settings(section: TrainSection) -> TransferSettings:
    """What a recipe says about attention transfer."""
    return TransferSettings(
        steps=section.transfer.steps,
        learning_rate=section.transfer.learning_rate,
        batch_size=section.transfer.batch_size,
        windows=section.window_range,
        sinks=section.sink_range,
        warmup_ratio=section.warmup_ratio,
        weight_decay=section.weight_decay,
        bf16=section.precision == "bf16",
        seed=section.seed,
        save_steps=section.save_steps,
    )


def distill_settings(section: TrainSection) -> DistillSettings:
    """What a recipe says about self-distillation."""
    return DistillSettings(
        max_steps=section.max_steps,
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        warmup_ratio=section.warmup_ratio,
        batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation_steps,
        gradient_checkpointing=section.gradient_checkpointing,
        bf16=section.precision == "bf16",
        windows=section.window_range,
        sinks=section.sink_range,
        loss_positions=section.loss_positions,
        seed=section.seed,
        save_steps=section.save_steps,
    )
