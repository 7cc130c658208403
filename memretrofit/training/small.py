"""A run in small: a tiny random model of the kind that a recipe is about, and what a run costs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from memretrofit.data import load_documents
from memretrofit.errors import ConfigError
from memretrofit.recipe import Recipe
from memretrofit.retrofit import patch

STEPS = 2
"""Of each stage."""


class Rehearsal(ABC):
    """The dry run of recipes of one kind."""

    @abstractmethod
    def run_small(self, recipe: Recipe, config: PreTrainedConfig, output: Path) -> Path:
        """The run of a recipe in small, on random tokens: a tiny model of the kind that `config`
        describes.
        """

    @abstractmethod
    def rehearse(self, recipe: Recipe, config: PreTrainedConfig, console: Console) -> None:
        """Run it in small, delete the result, and tell sizes and time.

        Raises:
            ConfigError: the method does not fit the base, or what is trained on is broken.
        """


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


def with_few_layers(method: Any, model: PreTrainedModel) -> Any:
    """A method's config for a tiny model: layers that it does not have are checked when the real
    one is patched.
    """
    chosen = getattr(method, "layers_to_transform", None)
    if chosen is None:
        return method
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    return replace(method, layers_to_transform=tuple(i for i in chosen if i < layers) or None)


def shapes_of(recipe: Recipe, config: PreTrainedConfig) -> tuple[PreTrainedModel, int]:
    """The real model, patched, of shapes alone; parameters of its base."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    return patch(model, recipe.method), total


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
