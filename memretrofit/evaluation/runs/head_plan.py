"""`memretrofit heads`: from a base model to a plan of the heads that keep everything.

The plan's file is JSON: `method` is a config as `MethodConfig.from_dict` takes it; the rest is what
it rests on::

    method      head_plan with its full_heads
    choice      best | inverted | random, with share and seed
    plans       all three, of the same size
    scores      of each head (`RetrievalHeads`)
    base        the model that was measured
    measured    tasks, lengths, items, seed and prose of the prompts
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from memretrofit.config import MethodConfig
from memretrofit.errors import ConfigError, did_you_mean
from memretrofit.evaluation.material.prose import NO_PROSE, load_prose
from memretrofit.evaluation.probes.head_plans import inverted_plan, plan_from_scores, random_plan
from memretrofit.evaluation.probes.retrieval_heads import RetrievalHeads, retrieval_heads, trials_of
from memretrofit.evaluation.runs.evaluate import find_device, parse_lengths
from memretrofit.evaluation.task import token_counter
from memretrofit.evaluation.tasks import get_tasks
from memretrofit.files import write_json
from memretrofit.hub import load_base, load_tokenizer
from memretrofit.hub.base import base_record
from memretrofit.hub.record import read_json
from memretrofit.methods.head_plan import HeadPlanConfig, Plan

CHOICES = ("best", "inverted", "random")
"""Which of the plans of one size is written as the config; the last two are its controls."""


def plan_for_base(
    source: str,
    output: Path,
    *,
    share: float = 0.25,
    choice: str = "best",
    config: HeadPlanConfig | None = None,
    tasks: str = "niah_single_1",
    lengths: str = "1k",
    number: int = 20,
    seed: int = 0,
    prose: str = "kjv",
    device: str | None = None,
) -> tuple[RetrievalHeads, Plan]:
    """Measure the heads of a base model on generated prompts, write a plan, and return both.

    Args:
        source: a base model as `load_base` takes it.
        output: the JSON file to write.
        share: of all KV heads, the part that keeps everything.
        choice: one of `CHOICES`.
        config: window and sinks of the other heads; None takes the defaults.
        tasks: comma-separated; each item has one answer that stands in its context.
        lengths: tokens of a prompt, comma-separated; `4k` is 4096.
        number: prompts of each task and length.
        seed: of the prompts, and of the random plan.
        prose: a named source, or a path. Not read where no task reads any.
        device: where to run; None takes the GPU if there is one.

    Raises:
        ConfigError: a choice, share, task, length or device that cannot be used; an item without
            something to copy. CheckpointError: the base cannot be read.
        StateError: the model answered no prompt.
    """
    if choice not in CHOICES:
        raise ConfigError(f"unknown choice {choice!r} of a plan; {did_you_mean(choice, CHOICES)}")
    if not 0 <= share <= 1 or number < 1:
        raise ConfigError(
            f"share={share}, items={number}: a share is from 0 to 1, items at least 1"
        )
    chosen, tokens, place = get_tasks(tasks), parse_lengths(lengths), find_device(device)
    text = load_prose(prose) if any(task.reads_prose for task in chosen) else NO_PROSE
    tokenizer: Any = load_tokenizer(source)
    count = token_counter(tokenizer)
    trials = [
        trial
        for task in chosen
        for length in tokens
        for trial in trials_of(
            task.items(count, text, length=length, number=number, seed=seed), tokenizer
        )
    ]
    model: Any = load_base(source)
    most = max(task.answer_tokens for task in chosen)
    found = retrieval_heads(model.to(place).eval(), trials, max_new_tokens=most)
    plans = {
        "best": plan_from_scores(found, share),
        "inverted": inverted_plan(found, share),
        "random": random_plan(found, share, seed),
    }
    write_json(
        output,
        {
            "method": replace(config or HeadPlanConfig(), full_heads=plans[choice]).to_dict(),
            "choice": {"plan": choice, "share": share, "seed": seed},
            "plans": plans,
            "scores": found.to_dict(),
            "base": base_record(model, None, tokenizer).to_dict(),
            "measured": {
                "tasks": [task.name for task in chosen],
                "lengths": tokens,
                "items": number,
                "seed": seed,
                "prose": text.source,
            },
        },
    )
    return found, plans[choice]


def planned_config(path: str | Path) -> MethodConfig:
    """The config in a plan's file.

    Raises:
        CheckpointError: the file cannot be read. ConfigError: it holds no config.
    """
    found = read_json(Path(path)).get("method")
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no method; pass a file that `memretrofit heads` wrote")
    return MethodConfig.from_dict(found)
