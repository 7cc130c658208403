"""Run a recipe: load the base, patch it, train the stages, save the memory and what made it."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

from memretrofit.errors import ConfigError
from memretrofit.files import held
from memretrofit.recipe import Recipe
from memretrofit.retrofit import patch
from memretrofit.training.base import load_base
from memretrofit.training.injection import Inject
from memretrofit.training.procedure_stage import TeachProcedures
from memretrofit.training.progress import RunLog, StageProgress
from memretrofit.training.recurrence_stage import Recurrence
from memretrofit.training.row_stages import Distill, Transfer
from memretrofit.training.stage import Stage

STAGES: dict[str, type[Stage]] = {
    stage.name: stage for stage in (Transfer, Distill, Inject, Recurrence, TeachProcedures)
}
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
        ConfigError: `output` holds another run, or cannot be written; the text is missing, or there
            are several processes for a stage that trains in one.
        StateError: another process trains in `output`, a promised parameter received no gradient,
            or the loss is not finite.
        CheckpointError: the base cannot be loaded, or a checkpoint is damaged.
    """
    if dry_run:
        from memretrofit.training.rehearsal import rehearse

        rehearse(recipe)
        return output
    state = PartialState()
    stages = stages_of(recipe, state.num_processes)
    if state.is_main_process and resume:
        _check_same(recipe, output)
    with held(output) if state.is_main_process else nullcontext():
        if state.is_main_process and not resume:
            prepare_folder(recipe, output)
        state.wait_for_everyone()
        return _train(recipe, stages, output, resume)


def _train(recipe: Recipe, stages: list[Stage], output: Path, resume: bool) -> Path:
    """What follows once the folder is ours."""
    state, base = PartialState(), recipe.base
    try:
        model, tokenizer = load_base(base.model, base.revision, base.gguf_file, base.dtype)
        torch.manual_seed(recipe.train.seed)  # initialisation of the memory
        patch(model, recipe.method)
        material = stages[0].prepare(model, tokenizer) if stages else None
        nn.Module.to(model, state.device)
    except BaseException:
        if state.is_main_process and not resume:
            (output / DRAFT).unlink(missing_ok=True)
        raise
    return run_stages(recipe, model, material, output, resume, tokenizer)


def prepare_folder(recipe: Recipe, output: Path) -> None:
    """Draft the resolved recipe of a run that begins.

    Raises:
        ConfigError: the folder holds a run, or cannot be written.
    """
    if (output / RECIPE).exists():
        raise ConfigError(
            f"{output} holds a run already; pass --resume to go on, or another --output"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / DRAFT).write_text(recipe.to_yaml(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {output} cannot be written: {error}") from error


def _check_same(recipe: Recipe, output: Path) -> None:
    """Refuse to resume what is no run, or another one."""
    path = output / RECIPE
    if not path.is_file():
        raise ConfigError(f"--resume: {output} holds no run; leave it out to start one")
    # through the schema of today: a field that the run did not know yet has its default
    before = Recipe.from_dict(yaml.safe_load(path.read_text(encoding="utf-8"))).to_dict()
    now = recipe.to_dict()
    # where the result goes and how it is measured do not change what is trained
    differ = [k for k in ("base", "method", "train", "data") if before[k] != now[k]]
    if differ:
        raise ConfigError(
            f"--resume: the recipe differs from {path} in {', '.join(differ)}; "
            "resume with the recipe of the run, or choose another --output"
        )


def stages_of(recipe: Recipe, processes: int = 1) -> list[Stage]:
    """The stages that a recipe names, in order.

    Raises:
        ConfigError: one of them trains in one process, and there are several.
    """
    return [STAGES[name](recipe, processes) for name in recipe.train.stages]


def run_stages(
    recipe: Recipe,
    model: PreTrainedModel,
    material: Any,
    output: Path,
    resume: bool,
    tokenizer: Any,
) -> Path:
    """Train a patched model through the stages of a recipe, which read `material`; save it."""
    state, trained = PartialState(), model
    if state.is_main_process and not resume:  # base and text are there: now it is a run
        os.replace(output / DRAFT, output / RECIPE)
    console = Console(stderr=True, quiet=not state.is_main_process)
    names = list(recipe.train.stages)
    for stage in stages_of(recipe, state.num_processes):
        progress = StageProgress(
            RunLog(output / LOG), names, stage.name, stage.tokens(material), console
        )
        report = progress.advance if state.is_main_process else _untold
        with progress:
            trained = stage.run(trained, material, output / CHECKPOINTS, report, resume)
    if state.is_main_process:
        _save(recipe, trained, output, tokenizer)
    state.wait_for_everyone()
    return output


def _untold(step: int, loss: float, **fields: Any) -> None:
    """What other processes measured is the same."""


def _save(recipe: Recipe, model: Any, output: Path, tokenizer: Any) -> None:
    from memretrofit.evaluation.plots import plot_loss
    from memretrofit.hub import save_pretrained

    save_pretrained(model, output, recipe=recipe.to_dict(), tokenizer=tokenizer)
    if recipe.train.stages:
        plot_loss(output / LOG, output / PLOT)
