"""Tiny models, rows and runs for these tests; also a script, for those that need processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import memretrofit
from memretrofit import AHNConfig
from memretrofit.recipe import Recipe
from memretrofit.training import (
    DistillSettings,
    TransferSettings,
    attention_transfer,
    self_distillation,
    train,
    trainable_parameters,
)
from memretrofit.training.progress import StageProgress

VOCABULARY = 64
SHORT_ROWS = DistillSettings(
    max_steps=6, learning_rate=1e-2, windows=(8, 60), sinks=(2,), batch_size=2, save_steps=100
)
"""For rows of 40 tokens: one of the windows holds them whole."""


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
    )


def base(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(config()).eval()


def patched(method=None, seed: int = 0) -> LlamaForCausalLM:
    return memretrofit.patch(base(seed), method or AHNConfig(sliding_window=16))


def rows(count: int = 64, length: int = 64, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": ids}
        for ids in torch.randint(VOCABULARY, (count, length), generator=generator)
    ]


def awake(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The memory with nothing left at zero, so that it changes the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in memretrofit.retrofit.memory_parameters(model).values():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def distilled(model, settings: DistillSettings, directory: Path, *, mode="memory", data=None):
    """Train, and return the model, what was promised, and the steps."""
    wrapped, promised = trainable_parameters(model, mode, lora_rank=2)
    steps = []
    self_distillation(wrapped, promised, data or rows(), settings, directory, on_step=steps.append)
    return wrapped, promised, steps


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each letter."""
    letters = [chr(33 + i) for i in range(VOCABULARY)]
    model = models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="!")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="!")


def write_base(folder: Path) -> Path:
    """A base model, its tokenizer and some text, as a user would have them."""
    base().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(2)
    (folder / "text").mkdir()
    for number in range(4):
        ids = torch.randint(1, VOCABULARY, (3000,), generator=generator).tolist()
        (folder / "text" / f"{number}.txt").write_text("".join(chr(33 + i) for i in ids))
    return folder


def recipe(folder: Path, **train_values: object) -> Recipe:
    section = {
        "stages": ["transfer", "distill"],
        "transfer": {"steps": 6, "batch_size": 2},
        "window_range": [8, 16, 24],
        "sink_range": [2],
        "sequence_length": 48,
        "max_steps": 6,
        "batch_size": 2,
        "save_steps": 4,
    }
    return Recipe.from_dict(
        {
            "base": {"model": str(folder / "base")},
            "method": {"name": "ahn", "sliding_window": 16, "num_sink_tokens": 2},
            "train": section | train_values,
            "data": {"sources": [str(folder / "text")], "held_out": 0.3},
        }
    )


def write_lessons(folder: Path) -> Path:
    """Eight names, each with a letter that it stands for, said in two ways."""
    names = ("QWX", "JKV", "ZZF", "HHP", "MUM", "LOL", "TAX", "RIB")
    lines = [
        {
            "texts": [f"{name} HAS {letter}.", f"OF {name}: {letter}."],
            "answer": letter,
            "held_out": [f"AND {name} HAS"],
            "held_out_questions": [f"{name}?"],
        }
        for name, letter in zip(names, "ABCDEFGH", strict=True)
    ]
    path = folder / "lessons.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def injection(folder: Path, **inject: object) -> Recipe:
    """A recipe that writes `write_lessons` into a bank."""
    values = recipe(folder).to_dict()
    values["method"] = {"name": "hierarchical_ffn", "branching": [4], "block_sizes": [8]}
    values["train"] |= {"stages": ["inject"], "save_steps": 4}
    values["train"]["inject"] = {"steps": 6, "learning_rate": 1e-2, "batch_size": 8} | inject
    values["data"]["lessons"] = str(folder / "lessons.jsonl")
    values["evaluate"]["rows"] = 6
    return Recipe.from_dict(values)


SLOTS = {
    "name": "memory_plus",
    "num_slots": 900,
    "num_heads": 2,
    "key_dim": 16,
    "top_k": 4,
    "starts_at_zero": "rows",
    "layers_to_transform": [0, 1],
}


def sparse_writing(folder: Path, *, method: dict[str, object] = SLOTS, **inject: object) -> Recipe:
    """The same by sparse memory finetuning."""
    own = {"rows": "own", "top_t": 40, "sgd_learning_rate": 300.0}
    values = injection(folder, **(own | inject)).to_dict()
    return Recipe.from_dict(values | {"method": method})


def procedures(
    folder: Path, *, rows: int = 4, method: dict[str, object] | None = None, **own: object
) -> Recipe:
    """A recipe that teaches the examples in a file `procedures.jsonl`."""
    values = recipe(folder).to_dict()
    values["method"] = method or {"name": "tokmem", "num_procedures": rows}
    values["train"] |= {"stages": ["procedures"], "save_steps": 4}
    values["train"]["procedures"] = {"steps": 6, "batch_size": 6} | own
    values["data"] |= {"procedures": str(folder / "procedures.jsonl"), "held_out": 0.2}
    return Recipe.from_dict(values)


def losses(output: Path) -> list[tuple[str, int, float]]:
    lines = (output / "log.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["stage"], r["step"], r["loss"]) for r in records]


def die_after(stage: str, step: int) -> None:
    """SIGKILL this process when that step has been logged: no handler runs, nothing is flushed."""
    advance = StageProgress.advance

    def advance_and_die(self, number, loss, **fields):
        advance(self, number, loss, **fields)
        if (self.stage, number) == (stage, step):
            os.kill(os.getpid(), signal.SIGKILL)

    StageProgress.advance = advance_and_die


def run_until_killed(folder: str, stage: str, step: str, resume: str) -> None:
    die_after(stage, int(step))
    train(recipe(Path(folder)), Path(folder) / "killed", resume=resume == "resume")


def inject_until_killed(folder: str, step: str) -> None:
    die_after("inject", int(step))
    train(injection(Path(folder)), Path(folder) / "killed")


def write_until_killed(folder: str, step: str) -> None:
    die_after("inject", int(step))
    train(sparse_writing(Path(folder), steps=100), Path(folder) / "killed")


def teach_until_killed(folder: str, step: str) -> None:
    die_after("procedures", int(step))
    train(procedures(Path(folder)), Path(folder) / "killed")


def run_in_processes(folder: str) -> None:
    """Both stages, where some windows are longer than the rows; each process writes what it has."""
    from accelerate import PartialState

    rank = PartialState(cpu=True).process_index
    model = patched()
    settings = TransferSettings(steps=6, windows=(8, 60), sinks=(2,), batch_size=2)
    done = attention_transfer(model, rows(length=40), settings)
    fitted = {n: p.detach() for n, p in memretrofit.retrofit.memory_parameters(model).items()}
    result: dict = {"transfer": ([step.loss for step in done], fitted)}
    for mode in ("memory", "memory+lora"):
        _, promised, steps = distilled(
            patched(), SHORT_ROWS, Path(folder) / mode, mode=mode, data=rows(length=40)
        )
        trained = {name: p.detach() for name, p in promised.items()}
        result[mode] = ([step.loss for step in steps], trained)
    torch.save(result, Path(folder) / f"result{rank}.pt")
    train(recipe(Path(folder)), Path(folder) / "run")


if __name__ == "__main__":
    {
        "killed": run_until_killed,
        "injection": inject_until_killed,
        "writing": write_until_killed,
        "procedures": teach_until_killed,
        "processes": run_in_processes,
    }[sys.argv[1]](*sys.argv[2:])
