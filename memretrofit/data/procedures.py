"""Procedures by example, one JSON object a line: what is asked, and how the procedure responds.

::

    {"procedure": "opposite", "prompt": "What is the opposite of hot?", "response": " cold"}

A procedure is one token that stands between a prompt and its response. The model must emit it, so
a prompt has to say which procedure it asks for, and go on from it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memretrofit.data.lessons import Item, read_objects, refuse_unknown
from memretrofit.errors import ConfigError

KEYS = ("procedure", "prompt", "response")


@dataclass(frozen=True)
class Example:
    """One use of a procedure."""

    procedure: str
    prompt: str
    response: str
    """With the space that begins it, if any; it follows the procedure's token."""


def read_procedures(path: Path) -> tuple[Example, ...]:
    """All examples of a file; empty lines do not count.

    Raises:
        ConfigError: the file cannot be read, holds nothing, has broken lines (each is named), or
            has one example of a procedure: none would be left to be asked afterwards.
    """
    found = read_objects(
        path, _example, f"examples: one JSON object a line, with {', '.join(KEYS)}"
    )
    counts = {name: 0 for name in names_of(found)}
    for example in found:
        counts[example.procedure] += 1
    if single := [name for name, count in counts.items() if count == 1]:
        raise ConfigError(
            f"{path} has one example of {', '.join(single)}; give two or more of each procedure: "
            "some are held out and asked afterwards"
        )
    return found


def _example(values: dict[str, Any]) -> Example:
    refuse_unknown(values, KEYS)
    for key in KEYS:
        text = values.get(key)
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"{key!r} is {text!r}, no text")
    return Example(*(values[key] for key in KEYS))


def names_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """The procedures in the order of their first examples: their tokens have this order."""
    return tuple(dict.fromkeys(example.procedure for example in examples))


def split_examples(
    examples: Sequence[Example], held_out: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Examples to train on, and those that are asked afterwards: a share of each procedure, at
    least one, and never all. A function of its arguments alone.
    """
    kept, asked = [], []
    for name in names_of(examples):
        own = [example for example in examples if example.procedure == name]
        random.Random(f"{seed}/{name}").shuffle(own)
        count = min(max(1, round(held_out * len(own))), len(own) - 1)
        asked += own[:count]
        kept += own[count:]
    return kept, asked


def procedure_items(
    examples: Sequence[Example],
    names: Sequence[str],
    tokenizer: Any,
    first_id: int,
    length: int,
) -> list[Item]:
    """`[prompt ; procedure ; response ; end]` of each example, learned from the procedure on.

    Args:
        names: the procedures; number i is the token `first_id` + i.
        tokenizer: its end-of-text token closes a response, if it has one.
        length: tokens that a text may have at most.

    Raises:
        ConfigError: a text is longer.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for example in examples:
        # begun as prompts are: with the token that the tokenizer puts before a text, if any
        prompt = tokenizer(example.prompt)["input_ids"]
        response = tokenizer(example.response, add_special_tokens=False)["input_ids"]
        token = first_id + names.index(example.procedure)
        ids = [*prompt, token, *response, *end]
        if len(ids) > length:
            raise ConfigError(
                f"an example of {example.procedure!r} has {len(ids)} tokens, and "
                f"train.sequence_length={length}; raise it, or shorten the example: "
                f"{example.prompt[:60]!r}"
            )
        found.append(Item(torch.tensor(ids), len(prompt)))
    return found
