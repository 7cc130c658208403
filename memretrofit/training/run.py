"""Run a recipe: load the base, patch it, train the stages, save the memory and what made it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from torch import nn
from torch.utils.data import Subset
from transformers import PreTrainedModel

from memretrofit.data import RowDataset, load_documents, split_documents
from memretrofit.data.lessons import Item
from memretrofit.errors import ConfigError
from memretrofit.recipe import Recipe, TrainSection
from memretrofit.retrofit import patch
from memretrofit.training.base import load_base
from memretrofit.training.distill import DistillSettings, DistillStep, self_distillation
from memretrofit.training.injection import prepare_injection, run_injection
from memretrofit.training.progress import RunLog, StageProgress
from memretrofit.training.trainable import trainable_parameters
from memretrofit.training.transfer import TransferSettings, TransferStep, attention_transfer

DRAFT = "recipe.yaml.draft"
"""The recipe until the base is loaded and the text is found: a start that fails is not a run."""
RECIPE, LOG, PLOT, CHECKPOINTS = "recipe.yaml", "log.jsonl", "loss.png", "checkpoints"


def train(recipe: Recipe, output: Path, *, resume: bool = False, dry_run: bool = False) -> Path:
    """Train what `recipe` says and save it to `output`, which `memretrofit.from_pretrained` reads.

    Beside the memory (and the adapter) lie `recipe.yaml` (every value resolved), `log.jsonl` (a
    record for each step), `loss.png`, and `checkpoints/`, which may be deleted.

    Args:
        recipe: see `memretrofit.recipe`.
        output: folder of the run; created.
        resume: go on from its last checkpoint, with the same losses as an uninterrupted run.
        dry_run: two steps of each stage on a tiny random model of the same architecture, on the
            CPU, then sizes and an estimate of the time. Nothing is written to `output`.

    Raises:
        ConfigError: `output` holds another run or cannot be written, or the text is missing.
        StateError: a promised parameter received no gradient, or the loss is not finite.
        CheckpointError: the base cannot be loaded, or a checkpoint is damaged.
    """
    if dry_run:
        from memretrofit.training.rehearsal import rehearse

        rehearse(recipe)
        return output
    state = PartialState()
    if state.is_main_process:
        prepare_folder(recipe, output, resume)
    state.wait_for_everyone()
    base = recipe.base
    model, tokenizer = load_base(base.model, base.revision, base.gguf_file, base.dtype)
    torch.manual_seed(recipe.train.seed)  # initialisation of the memory
    patch(model, recipe.method)
    if "inject" in recipe.train.stages:
        rows: Any = prepare_injection(recipe, model, tokenizer)
    else:
        rows = training_rows(recipe, tokenizer, state.num_processes) if recipe.train.stages else []
    nn.Module.to(model, state.device)
    return run_stages(recipe, model, rows, output, resume, tokenizer)


def prepare_folder(recipe: Recipe, output: Path, resume: bool) -> None:
    """Make the folder and draft the resolved recipe, or check that it holds this very run.

    Raises:
        ConfigError: it holds another run, or none to resume, or cannot be written.
    """
    path = output / RECIPE
    if resume and not path.is_file():
        raise ConfigError(f"--resume: {output} holds no run; leave it out to start one")
    if not resume and path.exists():
        raise ConfigError(
            f"{output} holds a run already; pass --resume to go on, or another --output"
        )
    if resume:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        now = yaml.safe_load(recipe.to_yaml())
        # where the result goes and how it is measured do not change what is trained
        differ = [k for k in ("base", "method", "train", "data") if before.get(k) != now[k]]
        if differ:
            raise ConfigError(
                f"--resume: the recipe differs from {path} in {', '.join(differ)}; "
                "resume with the recipe of the run, or choose another --output"
            )
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / DRAFT).write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {output} cannot be written: {error}") from error


def training_rows(recipe: Recipe, tokenizer: Any, processes: int = 1) -> RowDataset:
    """Rows of the training sources without what is held out, as many as all stages read."""
    documents = [d for source in recipe.data.sources for d in load_documents(source)]
    kept, _ = split_documents(documents, recipe.data.held_out, recipe.train.seed)
    section = recipe.train
    return RowDataset(
        kept,
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


def stage_rows(section: TrainSection, processes: int = 1) -> dict[str, int]:
    """How many rows each stage of a recipe reads, in order."""
    accumulated = section.batch_size * section.gradient_accumulation_steps
    rows = {
        "transfer": section.transfer.steps * section.transfer.batch_size * processes,
        "distill": section.max_steps * accumulated * processes,
        "inject": section.inject.steps * section.inject.batch_size,
    }
    return {stage: rows[stage] for stage in section.stages}


def run_stages(
    recipe: Recipe,
    model: PreTrainedModel,
    rows: Any,
    output: Path,
    resume: bool,
    tokenizer: Any,
) -> Path:
    """Train a patched model through the stages of a recipe, each on its part of `rows`; save it.

    The stage `inject` takes what `prepare_injection` returned for `rows`.
    """
    state = PartialState()
    if state.is_main_process and not resume:  # base and text are there: now it is a run
        os.replace(output / DRAFT, output / RECIPE)
    run = _inject if "inject" in recipe.train.stages else _transfer_and_distill
    trained = run(recipe, model, rows, output, resume)
    if state.is_main_process:
        _save(recipe, trained, output, tokenizer)
    state.wait_for_everyone()
    return output


def _inject(
    recipe: Recipe, model: PreTrainedModel, items: list[Item], output: Path, resume: bool
) -> Any:
    section = recipe.train.inject
    tokens = section.batch_size * sum(len(item.ids) for item in items) // len(items)
    progress = StageProgress(RunLog(output / LOG), ["inject"], "inject", section.steps, tokens)
    with progress:
        run_injection(recipe, model, items, output / CHECKPOINTS / "inject.pt", progress)
    return model


def _transfer_and_distill(
    recipe: Recipe, model: PreTrainedModel, rows: Any, output: Path, resume: bool
) -> Any:
    section, checkpoints = recipe.train, output / CHECKPOINTS
    state, log, trained = PartialState(), RunLog(output / LOG), model
    begin = 0
    for stage, count in stage_rows(section, state.num_processes).items():
        part = Subset(rows, range(begin, begin + count))
        begin += count
        steps = section.transfer.steps if stage == "transfer" else section.max_steps
        tokens = count // steps * section.sequence_length
        console = Console(stderr=True, quiet=not state.is_main_process)
        progress = StageProgress(log, list(section.stages), stage, steps, tokens, console)
        if stage == "transfer":
            file = checkpoints / "transfer.pt"
            report = _reporter(progress) if state.is_main_process else None
            with progress:
                attention_transfer(
                    model, part, transfer_settings(section), checkpoint=file, on_step=report
                )
        else:
            trained, promised = trainable_parameters(
                model,
                section.trainable,
                lora_rank=section.lora_rank,
                lora_alpha=section.lora_alpha,
            )
            with progress:
                self_distillation(
                    trained,
                    promised,
                    part,
                    distill_settings(section),
                    checkpoints / "distill",
                    resume=resume,
                    on_step=_reporter(progress),
                )
    return trained


def _reporter(progress: StageProgress) -> Any:
    """From what a stage measured to a record of the log."""

    def report(step: TransferStep | DistillStep) -> None:
        fields: dict[str, Any] = {
            "learning_rate": step.learning_rate,
            "window": step.draw.sliding_window,
            "sinks": step.draw.num_sink_tokens,
        }
        if isinstance(step, TransferStep):
            fields["r2"] = sum(step.r2.values()) / len(step.r2)
            fields["r2_by_layer"] = [round(value, 4) for value in step.r2.values()]
        else:
            fields["grad_norm"] = step.grad_norm
        progress.advance(step.step, step.loss, **fields)

    return report


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


def _save(recipe: Recipe, model: Any, output: Path, tokenizer: Any) -> None:
    from memretrofit.evaluation.plots import plot_loss
    from memretrofit.hub import save_pretrained

    save_pretrained(model, output, recipe=recipe.to_dict(), tokenizer=tokenizer)
    if recipe.train.stages:
        plot_loss(output / LOG, output / PLOT)
