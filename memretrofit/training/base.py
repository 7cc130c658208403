"""The base model of a recipe: weights and tokenizer, or its config alone."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from memretrofit.errors import ConfigError
from memretrofit.hub import base as hub_base


def load_base(
    model: str, revision: str | None = None, gguf_file: str | None = None, dtype: str = "float32"
) -> tuple[PreTrainedModel, Any]:
    """The pretrained model, on the CPU and in evaluation mode, and its tokenizer.

    Args:
        model: Hub id, folder, or `package:<name>` of an installed package that ships a GGUF file.
        revision: commit on the Hub.
        gguf_file: file inside the folder or repository.
        dtype: `float32`, `bfloat16` or `float16`.

    Raises:
        CheckpointError: the model cannot be found or read, or the package is not installed.
    """
    loaded = hub_base.load_base(
        model, revision=revision, gguf_file=gguf_file, dtype=getattr(torch, dtype)
    )
    tokenizer = hub_base.load_tokenizer(model, revision=revision, gguf_file=gguf_file)
    tokenizer.padding_side = "left"  # a GGUF file says right; generation continues on the right
    return loaded.eval(), tokenizer


def load_base_config(
    model: str, revision: str | None = None, gguf_file: str | None = None
) -> PreTrainedConfig:
    """The config of a base model, without its weights.

    Raises:
        ConfigError: it cannot be found or read.
    """
    source, gguf_file = hub_base.find_base(model, gguf_file)
    options = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        return AutoConfig.from_pretrained(source, revision=revision, **options)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"the config of base model {model!r} cannot be read: {error}") from error
