"""The dry run: every step of a recipe on a tiny random model of the same architecture."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from memretrofit.data import load_documents
from memretrofit.errors import ConfigError
from memretrofit.recipe import Recipe
from memretrofit.retrofit import memory_parameters, patch
from memretrofit.training.base import load_base_config
from memretrofit.training.progress import duration
from memretrofit.training.run import prepare_folder, run_stages, stage_rows

STEPS = 2
LONGEST_ROW = 512
PASSES = {"transfer": 1, "distill": 3}
"""Forward passes' worth of products per token: the base; or teacher, student and backward."""


def rehearse(recipe: Recipe, console: Console | None = None) -> None:
    """Two steps of each stage on random tokens, the result saved and deleted; then sizes and time.

    Raises:
        ConfigError: the config of the base cannot be read, or the method does not fit it.
    """
    console = console or Console()
    config = load_base_config(recipe.base.model, recipe.base.revision, recipe.base.gguf_file)
    if "inject" in recipe.train.stages:
        from memretrofit.training.rehearsal_of_banks import rehearse_injection

        rehearse_injection(recipe, config, console)
        return
    with tempfile.TemporaryDirectory() as folder:
        run_small(recipe, config, Path(folder))
    for line in [*_sizes(recipe, config), *text_lines(recipe)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def run_small(recipe: Recipe, config: PreTrainedConfig, output: Path) -> Path:
    """The run of a recipe in small: a tiny model of the kind that `config` describes."""
    if "inject" in recipe.train.stages:
        from memretrofit.training.rehearsal_of_banks import inject_randomly

        return inject_randomly(recipe, config, output)
    torch.manual_seed(recipe.train.seed)
    model = tiny_model(config)
    small = small_recipe(recipe, model)
    patch(model, small.method)
    rows = random_rows(small, model.config.get_text_config(decoder=True).vocab_size)
    prepare_folder(small, output, resume=False)
    return run_stages(small, model, rows, output, False, None)


def tiny_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A random model of the class that `config` belongs to, with one or two layers of each kind."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", 4)
    groups = heads // (getattr(text, "num_key_value_heads", None) or heads)
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ["full_attention"] * 2))
    layers = kinds if len(kinds) > 1 else kinds * 2
    wanted = {
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "hidden_size": 32 * groups,
        "intermediate_size": 96,
        "num_attention_heads": 2 * groups,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 256,
        "max_position_embeddings": getattr(text, "max_position_embeddings", 2048),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    known = {key: value for key, value in wanted.items() if hasattr(text, key)}
    if "layer_types" in known and text.layer_types is None:
        del known["layer_types"]
    tiny = type(text)(**known)
    tiny._attn_implementation = text._attn_implementation
    return AutoModelForCausalLM.from_config(tiny, dtype=torch.float32).eval()


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
    method: Any = recipe.method
    chosen = method.layers_to_transform
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if chosen is not None:
        # a tiny model has few layers; those of the recipe are checked when the real one is patched
        chosen = tuple(i for i in chosen if i < layers) or None
    return replace(recipe, train=small, method=replace(method, layers_to_transform=chosen))


def random_rows(recipe: Recipe, vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """As many rows of random tokens as the stages read."""
    generator = torch.Generator().manual_seed(recipe.train.seed)
    shape = (sum(stage_rows(recipe.train).values()), recipe.train.sequence_length)
    return [{"input_ids": ids} for ids in torch.randint(vocab_size, shape, generator=generator)]


def _sizes(recipe: Recipe, config: PreTrainedConfig) -> list[str]:
    """Parameters of the real model, from its shapes alone, and how long its stages take here."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    patch(model, recipe.method)
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


def multiplications_per_second() -> float:
    """What a product of large float32 matrices reaches here; a model reaches about half of it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x = torch.randn(1024, 1024, device=device)
    y = x @ x
    begin = time.perf_counter()
    for _ in range(4):
        y = x @ y * 1e-3
    float(y[0, 0])  # waits for the device
    return 0.5 * 4 * 1024**3 / (time.perf_counter() - begin)


def text_lines(recipe: Recipe) -> list[str]:
    """What is found of each source."""
    lines = []
    for source in recipe.data.sources:
        try:
            documents = load_documents(source)
        except ConfigError as error:
            lines.append(f"text {source}: MISSING: {error}")
            continue
        size = sum(len(document.text) for document in documents)
        lines.append(f"text {source}: {len(documents)} documents, {size / 1e6:.1f}M characters")
    return lines
