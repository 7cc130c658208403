"""The dry run of procedures: examples checked, every step in small, sizes and time."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from memretrofit.data.lessons import Item
from memretrofit.hub.base import load_tokenizer
from memretrofit.patching.vocabulary import open_procedures, vocabulary_ledger_of
from memretrofit.recipe import Recipe
from memretrofit.retrofit import memory_parameters, patch
from memretrofit.training.procedure_stage import Procedures, TeachProcedures, procedures_of
from memretrofit.training.progress import duration
from memretrofit.training.run import prepare_folder, run_stages
from memretrofit.training.small import (
    STEPS,
    Rehearsal,
    multiplications_per_second,
    shapes_of,
    tiny_model,
)

PASSES = 3
"""Forward passes' worth of products per token: forward, and backward for activations."""
TEXTS, LENGTH = 6, 8
"""Of the run in small."""


class ProcedureRehearsal(Rehearsal):
    """Two steps on random tokens."""

    def rehearse(self, recipe: Recipe, config: PreTrainedConfig, console: Console) -> None:
        """Read the examples, take two steps on a tiny random model of the same architecture, save
        and delete the result; then tell sizes and time.

        Raises:
            ConfigError: broken examples, or the method does not fit the base.
        """
        tokenizer = load_tokenizer(
            recipe.base.model, revision=recipe.base.revision, gguf_file=recipe.base.gguf_file
        )
        model, total = shapes_of(recipe, config)
        found = procedures_of(recipe, tokenizer, vocabulary_ledger_of(model).vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            self.run_small(recipe, config, Path(folder))
        memory = sum(p.numel() for p in memory_parameters(model).values())
        each = memory // recipe.method.num_procedures  # type: ignore[attr-defined]
        tokens = sum(TeachProcedures(recipe).tokens(found))
        seconds = PASSES * total * tokens / multiplications_per_second()
        for line in (
            "dry run: two steps ran and the result was saved and deleted; no weights were loaded",
            f"base {recipe.base.model}: {total / 1e6:,.1f}M parameters",
            f"memory {recipe.method.method}: {memory:,} parameters, of which "
            f"{each * len(found.names):,} learn",
            f"examples: {len(found.items):,} of {len(found.names)} procedures to learn from, and "
            f"{len(found.held_out):,} that are asked afterwards",
            f"procedures: {recipe.train.procedures.steps} steps, {tokens:,} tokens, "
            f"roughly {duration(seconds)} here",
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def run_small(self, recipe: Recipe, config: PreTrainedConfig, output: Path) -> Path:
        """See `Rehearsal`."""
        torch.manual_seed(recipe.train.seed)
        model = tiny_model(config)
        own = replace(recipe.train.procedures, steps=STEPS, batch_size=2)
        small = replace(recipe, train=replace(recipe.train, procedures=own))
        patch(model, small.method)
        (opener,) = open_procedures(model, 1)
        texts = torch.randint(256, (TEXTS, LENGTH))
        texts[:, LENGTH // 2] = opener
        items = [Item(ids, LENGTH // 2) for ids in texts]
        prepare_folder(small, output)
        material = Procedures(("random",), items[2:], items[:2])
        return run_stages(small, model, material, output, False, None)
