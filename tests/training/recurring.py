"""A base whose tokenizer knows the words of the texts, and runs that teach it; also a script."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from training.tiny import config, die_after
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from memretrofit.data import personas, recall, stories
from memretrofit.recipe import Recipe
from memretrofit.training import train

SEGMENT = 32
PROSE = "In the beginning was a word. It stood in the book. Nobody read it. The end came soon.\n"
_WORD = r"\w+|[^\w\s]|\n"


def _words() -> list[str]:
    said = [recall.FACT, recall.QUESTION, *recall.FILLER, *recall.NAMES, *recall.OBJECTS, PROSE]
    for attribute in personas.ATTRIBUTES:
        said += [attribute.own, attribute.changed, attribute.other, attribute.question]
        said += [attribute.own.capitalize(), attribute.stem, attribute.words]
    said += [*personas.NAMES, *personas.EVENTS, *personas.HABITS, *personas.REPLIES]
    said += [*personas.RELATIVES, "My I now Assistant Question Answer : \n"]
    said += [*stories.PEOPLE, *stories.ROOMS, *stories.THINGS, *stories.WENT, "Where is ?"]
    return list(dict.fromkeys(word for text in said for word in re.findall(_WORD, text)))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, stop and new line."""
    words = ["<unk>", "<s>", *_words()]
    inner = Tokenizer(models.WordLevel({x: i for i, x in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex(r"[^\w\s]|\n"), "isolated"),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


def write_base(folder: Path) -> Path:
    """A tiny base with these words."""
    tokenizer, small = word_tokenizer(), config()
    small.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    LlamaForCausalLM(small).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "prose").mkdir()
    for number in range(4):
        (folder / "prose" / f"{number}.txt").write_text(PROSE * (50 + number))
    return folder


def recipe(folder: Path, *, method: str = "rmt", **recurrence: object) -> Recipe:
    """Ten steps, saved every four."""
    own = {"steps": 10, "batch_size": 2, "learning_rate": 1e-2, "segments": [1, 2]}
    if not str(recurrence.get("texts", "")).startswith("babilong"):
        own["facts"] = 1
    return Recipe.from_dict(
        {
            "base": {"model": str(folder / "base")},
            "method": {"name": method, "segment_length": SEGMENT, "num_memory_tokens": 2},
            "train": {
                "stages": ["recurrence"],
                "trainable": "memory+lora",
                "lora_rank": 2,
                "save_steps": 4,
                "recurrence": own | recurrence,
            },
            "data": {"sources": [str(folder / "prose")]},
        }
    )


def with_segment(given: Recipe, length: int) -> Recipe:
    """The same with longer segments."""
    return replace(given, method=replace(given.method, segment_length=length))


def run_until_killed(folder: str, step: str) -> None:
    die_after("recurrence", int(step))
    train(recipe(Path(folder)), Path(folder) / "killed")


if __name__ == "__main__":
    run_until_killed(*sys.argv[1:])
