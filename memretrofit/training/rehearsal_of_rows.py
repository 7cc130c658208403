"""The dry run of the stages that read rows of text, and of recipes without a stage."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedConfig, PreTrainedModel

from memretrofit.recipe import Recipe
from memretrofit.retrofit import memory_parameters, patch
from memretrofit.training.progress import duration
from memretrofit.training.row_stages import stage_rows
from memretrofit.training.run import prepare_folder, run_stages
from memretrofit.training.small import (
    STEPS,
    Rehearsal,
    multiplications_per_second,
    shapes_of,
    text_lines,
    tiny_model,
    with_few_layers,
)

LONGEST_ROW = 512
PASSES = {"transfer": 1, "distill": 3}
"""Forward passes' worth of products per token: the base; or teacher, student and backward."""


class RowRehearsal(Rehearsal):
    """Two steps of each stage on random tokens."""

    def rehearse(self, recipe: Recipe, config: PreTrainedConfig, console: Console) -> None:
        """See `Rehearsal`."""
        with tempfile.TemporaryDirectory() as folder:
            self.run_small(recipe, config, Path(folder))
        for line in [*_sizes(recipe, config), *text_lines(recipe)]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def run_small(self, recipe: Recipe, config: PreTrainedConfig, output: Path) -> Path:
        """See `Rehearsal`."""
        torch.manual_seed(recipe.train.seed)
        model = tiny_model(config)
        small = small_recipe(recipe, model)
        patch(model, small.method)
        rows = random_rows(small, model.config.get_text_config(decoder=True).vocab_size)
        prepare_folder(small, output)
        return run_stages(small, model, rows, output, False, None)


def small_recipe(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """The same recipe, cut to two steps and short rows; every ratio of lengths stays as it is."""
    section = recipe.train
    shrink = max(1, -(-section.sequence_length // LONGEST_ROW))
    windows = tuple(max(1, w // shrink) for w in section.window_range)
    sinks = tuple(s // shrink for s in section.sink_range)
    small = replace(
        section,
        transfer=replace(section.transfer, steps=STEPS, batch_size=1),
        max_steps=STEPS,
        batch_size=1,
        gradient_accumulation_steps=min(2, section.gradient_accumulation_steps),
        lora_rank=min(2, section.lora_rank),
        sequence_length=max(section.sequence_length // shrink, max(windows) + max(sinks) + 1),
        window_range=windows,
        sink_range=sinks,
    )
    return replace(recipe, train=small, method=with_few_layers(recipe.method, model))


def random_rows(recipe: Recipe, vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """As many rows of random tokens as the stages read."""
    generator = torch.Generator().manual_seed(recipe.train.seed)
    shape = (sum(stage_rows(recipe.train).values()), recipe.train.sequence_length)
    return [{"input_ids": ids} for ids in torch.randint(vocab_size, shape, generator=generator)]


def _sizes(recipe: Recipe, config: PreTrainedConfig) -> list[str]:
    """Parameters of the real model, from its shapes alone, and how long its stages take here."""
    model, total = shapes_of(recipe, config)
    memory = sum(p.numel() for p in memory_parameters(model).values())
    speed = multiplications_per_second()
    lines = [
        "dry run: every stage ran and the result was saved and deleted; no weights were loaded",
        f"base {recipe.base.model}: {total / 1e6:,.1f}M parameters",
        f"memory {recipe.method.method}: {memory / 1e6:,.3f}M parameters ({memory / total:.1%})",
    ]
    for stage, rows in stage_rows(recipe.train).items():
        tokens = rows * recipe.train.sequence_length
        seconds = PASSES[stage] * total * tokens / speed
        lines.append(
            f"{stage}: {tokens:,} tokens in {rows:,} rows, roughly {duration(seconds)} here"
        )
    return lines
