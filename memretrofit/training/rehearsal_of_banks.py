"""The dry run of a bank: lessons and text checked, every step in small, sizes and time."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedConfig

from memretrofit.data.lessons import Item
from memretrofit.description import in_units
from memretrofit.hub.base import load_tokenizer
from memretrofit.modules.bank import MemoryBank
from memretrofit.modules.row_sources import row_nbytes
from memretrofit.patching.ffn import bank_of
from memretrofit.recipe import Recipe
from memretrofit.retrofit import patch
from memretrofit.training.injection import (
    check_injection,
    fit_bank,
    generic_texts,
    lesson_items,
    opened,
)
from memretrofit.training.progress import duration
from memretrofit.training.run import prepare_folder, run_stages
from memretrofit.training.small import (
    STEPS,
    Rehearsal,
    multiplications_per_second,
    shapes_of,
    text_lines,
    tiny_model,
)
from memretrofit.training.writing import ROWS, writing_of

TEXTS = 16
PASSES = 3
"""Forward passes' worth of products per token: forward, and backward for activations."""


class BankRehearsal(Rehearsal):
    """Two steps on the recipe's own lessons."""

    def rehearse(self, recipe: Recipe, config: PreTrainedConfig, console: Console) -> None:
        """Read lessons and text, take two steps on a tiny random model of the same architecture,
        save and delete the result; then tell sizes and time.

        Raises:
            ConfigError: broken lessons or missing text, or the method does not fit the base.
            CheckpointError: there is no usable bank to go on with.
            StateError: the lessons read no row of the bank.
        """
        check_injection(recipe)
        tokenizer = load_tokenizer(
            recipe.base.model, revision=recipe.base.revision, gguf_file=recipe.base.gguf_file
        )
        items, generic = lesson_items(recipe, tokenizer), generic_texts(recipe, tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            bank = _inject_small(recipe, config, items, generic, Path(folder))
        for line in [*_sizes(recipe, config, items, bank), *text_lines(recipe)]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def run_small(self, recipe: Recipe, config: PreTrainedConfig, output: Path) -> Path:
        """See `Rehearsal`."""
        generator = torch.Generator().manual_seed(recipe.train.seed)
        texts = torch.randint(256, (TEXTS, 2, 16), generator=generator)
        items = [Item(ids, 8) for ids in texts[:, 0]]
        _inject_small(recipe, config, items, list(texts[:, 1]), output)
        return output


def _inject_small(
    recipe: Recipe, config: PreTrainedConfig, items: list[Item], generic: list[Any], output: Path
) -> MemoryBank:
    """The run in small, on the same texts in a smaller vocabulary; returns the bank it trained."""
    torch.manual_seed(recipe.train.seed)
    model = tiny_model(config)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    # a bank that goes on learning would not fit a tiny model
    inject = replace(recipe.train.inject, steps=STEPS, onto=None, earlier=())
    section = replace(recipe.train, inject=inject)
    method: Any = recipe.method
    layers = method.layers_to_transform
    if layers is not None:
        # a tiny model has few layers; those of the recipe are checked when the real one is patched
        method = replace(method, layers_to_transform=(0,))
    small = replace(recipe, train=section, method=method)
    patch(model, small.method)
    few = [Item(item.ids % vocabulary, item.first) for item in items]
    ordinary = [ids % vocabulary for ids in generic]
    fit_bank(model, few, ordinary, None)
    material = opened(inject, model, few, ordinary)
    prepare_folder(small, output)
    run_stages(small, model, material, output, False, None)
    return bank_of(model)


def _sizes(
    recipe: Recipe, config: PreTrainedConfig, items: list[Item], small: MemoryBank
) -> list[str]:
    """What the real model and bank would hold, from shapes alone, and how long it takes here."""
    model, total = shapes_of(recipe, config)
    trained = writing_of(recipe.train.inject).parameters(model)
    dense = sum(p.numel() for name, p in trained.items() if not name.endswith(ROWS))
    tables = dict(bank_of(model).each_table())
    numbers = sum(table.rows * row_nbytes(table.source) for table in tables.values())
    opened = {name: table.opened for name, table in small.each_table()}
    learned = sum(row_nbytes(table.source) * opened[name] for name, table in tables.items())
    inject = recipe.train.inject
    mean = sum(len(item.ids) for item in items) / len(items)
    tokens = round(inject.steps * inject.batch_size * mean)
    seconds = PASSES * total * tokens / multiplications_per_second()
    return [
        "dry run: two steps ran and the result was saved and deleted; no weights were loaded",
        f"base {recipe.base.model}: {total / 1e6:,.1f}M parameters",
        f"lessons: {len(items):,} texts of {mean:.1f} tokens in the mean",
        f"bank {recipe.method.method}: {in_units(numbers)} if every row were written; about "
        f"{in_units(learned)} learn, and {dense:,} dense parameters",
        f"inject: {inject.steps} steps, {tokens:,} tokens, roughly {duration(seconds)} here",
    ]
