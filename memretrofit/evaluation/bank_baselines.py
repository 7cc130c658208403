"""What a bank is compared with: LoRA on the FFNs of the same frozen model, same lessons and steps.

Two ranks, because a bank has two sizes: as many trainable parameters as the rows that learned, and
as many active ones as a token reads. Each is trained from the base model alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from rich.console import Console
from torch import nn

from memretrofit.data.lessons import Item, Lesson, read_lessons
from memretrofit.evaluation.bank_recall import asked, recall
from memretrofit.evaluation.bank_report import held_out_prose, measure_prose_arms, write_results
from memretrofit.evaluation.statistics import accuracy_interval
from memretrofit.hub import from_pretrained, read_record, tokenizer_of
from memretrofit.hub.adapter import add_adapter
from memretrofit.hub.record import read_json
from memretrofit.modules.bank import Tokens
from memretrofit.patching.ffn import bank_of
from memretrofit.patching.ffn_sites import find_bank_sites
from memretrofit.recipe import Recipe
from memretrofit.retrofit import unpatch
from memretrofit.training.inject import inject
from memretrofit.training.injection import inject_settings, lesson_items

LEARNING_RATE = 3e-4
"""Of Adam, at its peak: a tenth of what rows take, as is usual for LoRA."""


def active_numbers(model: Any, items: Sequence[Item]) -> float:
    """Numbers of the bank that a token reads, mean over the last tokens of `items` that read any;
    0 where the bank does not say what is read.
    """
    bank = bank_of(model)
    found = []
    for item in items:
        rows = bank.addresses(Tokens(ids=item.ids[None], new=1))
        numbers = sum(len(x) * torch.Size(bank.table(n).shape).numel() for n, x in rows.items())
        found += [numbers] if numbers else []
    return sum(found) / len(found) if found else 0.0


def lora_ranks(model: Any, trained: float, active: float) -> dict[str, int]:
    """Ranks with which LoRA on every FFN of `model` has so many parameters, at least 1."""
    width = sum(x.in_features + x.out_features for x in ffn_linears(model).values())
    wanted = {"lora_trainable": trained, "lora_active": active}
    return {name: max(1, round(count / width)) for name, count in wanted.items() if count}


def ffn_linears(model: Any) -> dict[str, nn.Linear]:
    """The linear maps inside the FFNs of a model without memory, by name."""
    return {
        f"{site.name}.{name}": module
        for site in find_bank_sites(model, "ffn")
        for name, module in site.module.named_modules()
        if isinstance(module, nn.Linear)
    }


def compare_lora(
    model: Any,
    tokenizer: Any,
    lessons: Sequence[Lesson],
    items: Sequence[Item],
    prose: torch.Tensor,
    recipe: Recipe,
    rank: int,
    checkpoint: Path,
    console: Console,
) -> dict[str, Any]:
    """Train LoRA of a rank on a model without memory, and measure it as a bank is measured. The
    model is as it was afterwards.
    """
    torch.manual_seed(recipe.train.seed)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=list(ffn_linears(model)),
        task_type="CAUSAL_LM",
    )
    wrapped: Any = add_adapter(model, config)
    try:
        parameters = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
        settings = inject_settings(recipe.train, learning_rate=LEARNING_RATE)
        console.print(f"LoRA of rank {rank}: {sum(p.numel() for p in parameters.values()):,}")
        inject(wrapped, parameters, items, settings, checkpoint=checkpoint)
        with torch.no_grad():
            return {
                "rank": rank,
                "parameters": sum(p.numel() for p in parameters.values()),
                "recall": {
                    kind: accuracy_interval(
                        recall(wrapped, tokenizer, pairs, lambda *_: nullcontext())
                    )._asdict()
                    for kind, pairs in asked(lessons).items()
                },
                "prose": measure_prose_arms(
                    wrapped,
                    prose,
                    {"base": wrapped.disable_adapter, "trained": nullcontext},
                    recipe.evaluate,
                    console,
                )["trained"],
            }
    finally:
        wrapped.unload()


def add_baselines(directory: Path, recipe: Recipe, output: Path) -> dict[str, Any]:
    """Train and measure both ranks beside the bank that is saved and measured in `directory`, and
    write its report again with them. A run that was killed goes on.

    Raises:
        CheckpointError: the folder holds no usable memory, or `output` no report of one.
        ConfigError: lessons or prose are missing.
    """
    console = Console(stderr=True, highlight=False)
    results = dict(read_json(output))
    tokenizer = tokenizer_of(read_record(directory).base)
    model = from_pretrained(directory).eval()
    items, prose = lesson_items(recipe, tokenizer), held_out_prose(recipe, tokenizer)
    lessons = read_lessons(Path(recipe.data.lessons or ""))
    active = active_numbers(model, items)
    unpatch(model)
    trained = results["sizes"]["row_parameters"] + results["sizes"]["dense_parameters"]
    results["baselines"] = {
        name: compare_lora(
            model,
            tokenizer,
            lessons,
            items,
            prose,
            recipe,
            rank,
            directory / "checkpoints" / f"{name}.pt",
            console,
        )
        for name, rank in lora_ranks(model, trained, active).items()
    }
    write_results(directory, results, output)
    return results
