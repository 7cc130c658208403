"""The dry run of a memory between segments: its texts made, every step in small, sizes and time."""

from __future__ import annotations

import tempfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedConfig

from memretrofit.data.lessons import IGNORED
from memretrofit.hub.base import load_tokenizer
from memretrofit.patching.segment_visit import segment_ledger_of
from memretrofit.recipe import Recipe
from memretrofit.retrofit import memory_parameters, patch
from memretrofit.training.progress import duration
from memretrofit.training.recurrence import Texts
from memretrofit.training.recurrence_stage import Recurrence
from memretrofit.training.run import prepare_folder, run_stages
from memretrofit.training.small import (
    STEPS,
    Rehearsal,
    multiplications_per_second,
    shapes_of,
    tiny_model,
    with_few_layers,
)

PASSES = {"full": 2, "truncated": 2, "replay": 3}
"""Forward passes' worth of products per token: forward, backward for activations, forward again."""


@dataclass(frozen=True)
class _Batch:
    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class _RandomTexts:
    """Random tokens, the last of which is learned."""

    segment_length: int
    vocabulary: int

    def batch(self, segments: int, size: int, key: str, *, held_out: bool = False) -> _Batch:
        """See `Texts`."""
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        shape = size, segments * self.segment_length
        ids = torch.randint(self.vocabulary, shape, generator=generator)
        labels = torch.full_like(ids, IGNORED)
        labels[:, -1] = ids[:, -1]
        return _Batch(ids, labels)

    def tokens(self, segments: int) -> float:
        """See `Texts`."""
        return segments * self.segment_length


class RecurrenceRehearsal(Rehearsal):
    """Two steps on random tokens, in segments as long as the recipe's."""

    def rehearse(self, recipe: Recipe, config: PreTrainedConfig, console: Console) -> None:
        """See `Rehearsal`."""
        tokenizer = load_tokenizer(
            recipe.base.model, revision=recipe.base.revision, gguf_file=recipe.base.gguf_file
        )
        model, total = shapes_of(recipe, config)
        stage = Recurrence(recipe)
        texts: Texts = stage.prepare(model, tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            self.run_small(recipe, config, Path(folder))
        memory = sum(p.numel() for p in memory_parameters(model).values()) / 1e6
        tokens, section = sum(stage.tokens(texts)), recipe.train.recurrence
        passes = PASSES[section.credit]
        seconds = passes * total * tokens / multiplications_per_second()
        stages = ", ".join(map(str, section.segments))
        for line in (
            "dry run: two steps ran and the result was saved and deleted; no weights were loaded",
            f"base {recipe.base.model}: {total / 1e6:,.1f}M parameters",
            f"memory {recipe.method.method}: {memory:,.3f}M parameters",
            f"recurrence: {section.steps} steps, up to {stages} segments of "
            f"{segment_ledger_of(model).memory.segment_length} tokens, {tokens:,} tokens, "
            f"roughly {duration(seconds)} here",
        ):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def run_small(self, recipe: Recipe, config: PreTrainedConfig, output: Path) -> Path:
        """See `Rehearsal`."""
        torch.manual_seed(recipe.train.seed)
        model = tiny_model(config)
        section = recipe.train
        most = (max(section.recurrence.segments),)  # the watch over gradients waits for these
        own = replace(section.recurrence, steps=STEPS, batch_size=2, segments=most, shares=())
        small = replace(
            recipe,
            train=replace(section, recurrence=own, lora_rank=min(2, section.lora_rank)),
            method=with_few_layers(recipe.method, model),
        )
        patch(model, small.method)
        length = segment_ledger_of(model).memory.segment_length
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        prepare_folder(small, output)
        return run_stages(small, model, _RandomTexts(length, vocabulary), output, False, None)
