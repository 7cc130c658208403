"""`memretrofit eval --tasks`: from a name on the command line to a run's folder and its report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from memretrofit.data import load_documents, split_documents
from memretrofit.errors import ConfigError
from memretrofit.evaluation.material.prose import NO_PROSE, Prose, load_prose
from memretrofit.evaluation.runs.arms import (
    answerers_of,
    kept_exactly,
    memory_state,
    segment_length,
)
from memretrofit.evaluation.runs.report import write_report
from memretrofit.evaluation.runs.runner import run_tasks
from memretrofit.evaluation.tasks import get_tasks
from memretrofit.hub import (
    from_pretrained,
    load_base,
    load_tokenizer,
    read_record,
    tokenizer_of,
    write_card,
)
from memretrofit.hub.base import base_record
from memretrofit.hub.record import CONFIG, TASKS, Record


def evaluate_tasks(
    source: str,
    names: str,
    lengths: str = "1k",
    *,
    arms: str | None = None,
    number: int = 20,
    seed: int = 0,
    batch_size: int = 4,
    prose: str = "kjv",
    window: int | None = None,
    chunk_size: int = 2048,
    device: str | None = None,
    output: Path | None = None,
) -> Path:
    """Run tasks on a saved memory or a base model, write the report, and return its folder.

    Args:
        source: a folder that `save_pretrained` wrote, or a base as `load_base` takes it.
        names: tasks, comma-separated; `all` is every one.
        lengths: tokens, comma-separated; `4k` is 4096.
        arms: comma-separated; None takes all that the model has.
        number: items of each task and length.
        seed: of the items.
        batch_size: items that are read together.
        prose: a named source, or a path. Of a source that the memory was trained on, only the
            documents that its recipe held out are used. Not read where no task reads any.
        window: tokens that the window arm of a base model attends exactly.
        chunk_size: tokens of a prompt per forward.
        device: where to run; None takes the GPU if there is one.
        output: the run's folder; None takes `tasks` in the folder of a saved memory, `runs/tasks`
            for a base model.

    Raises:
        ConfigError, CheckpointError, StateError: see `run_tasks`, `from_pretrained`, `load_base`.
    """
    tasks, tokens, chosen = get_tasks(names), parse_lengths(lengths), parse_arms(arms)
    place = find_device(device)
    directory = Path(source).expanduser()
    is_saved = (directory / CONFIG).is_file()
    record = read_record(directory) if is_saved else None
    recipe: Mapping[str, Any] = (record.recipe if record else None) or {}
    text, held_out = NO_PROSE, False
    if any(task.reads_prose for task in tasks):
        text, held_out = prose_for(prose, recipe)
    memory_seed = recipe.get("train", {}).get("seed", 0)
    model, tokenizer = _saved(directory, record) if record else _base(source)
    model = model.to(place).eval()
    answerers = answerers_of(
        model,
        tokenizer,
        arms=chosen,
        window=window,
        chunk_size=chunk_size,
        seed=memory_seed,
    )
    base = record.base if record else base_record(model, None, tokenizer)
    settings = {
        "model": source,
        "base": base.to_dict(),
        "method": record.method.to_dict() if record else None,
        "memory": memory_state(model, memory_seed),
        "files": dict(record.files) if record else {},
        "window": window,
        "exact_tokens": kept_exactly(model, window),
        "segment_length": segment_length(model),
        "trained_tokens": trained_tokens(recipe, segment_length(model)),
        "chunk_size": chunk_size,
        "device": str(place),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "held_out_prose": held_out,
    }
    folder = output or (directory / TASKS if is_saved else Path("runs") / TASKS)
    run_tasks(
        model,
        tokenizer,
        tasks,
        tokens,
        answerers=answerers,
        prose=text,
        number=number,
        seed=seed,
        batch_size=batch_size,
        output=folder,
        settings=settings,
    )
    write_report(folder)
    if is_saved and folder.resolve() == (directory / TASKS).resolve():
        write_card(directory)
    return folder


def trained_tokens(recipe: Mapping[str, Any], segment: int | None) -> int | None:
    """Tokens of the longest text that a recipe trains on; None where it does not say.

    Args:
        segment: tokens of a segment of the method.
    """
    train: Mapping[str, Any] = recipe.get("train", {})
    if segment and "recurrence" in train.get("stages", ()):
        return segment * max(train["recurrence"]["segments"])
    return train.get("sequence_length")


def _saved(directory: Path, record: Record) -> tuple[Any, Any]:
    tokenizer = tokenizer_of(record.base)
    return from_pretrained(directory), tokenizer


def _base(source: str) -> tuple[Any, Any]:
    return load_base(source), load_tokenizer(source)


def prose_for(source: str, recipe: Mapping[str, Any]) -> tuple[Prose, bool]:
    """Prose that a memory was not trained on, and whether documents had to be left out for it.

    Raises:
        ConfigError: the source is unknown or holds no sentence.
    """
    data: Mapping[str, Any] = recipe.get("data", {})
    trained = {_place(name) for name in data.get("sources", ())}
    if _place(source) not in trained:
        return load_prose(source), False
    _, held_out = split_documents(
        load_documents(source), data["held_out"], recipe.get("train", {}).get("seed", 0)
    )
    return load_prose(source, only=[document.title for document in held_out]), True


def _place(source: str) -> str:
    """One spelling for a path, however it is written."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else source


def parse_lengths(text: str) -> list[int]:
    """`512, 1k, 4k` -> [512, 1024, 4096], in that order; a length that is named twice comes once.

    Raises:
        ConfigError: a part is no number of tokens.
    """
    parts = [part.lower() for part in _parts(text)]
    wrong = [part for part in parts if not re.fullmatch(r"[1-9][0-9]*k?", part)]
    if wrong or not parts:
        raise ConfigError(
            f"lengths={text!r}: {', '.join(wrong) or 'none'} is no number of tokens; write for "
            "example 512,1k,4k (a comma divides lengths, never thousands)"
        )
    found = [int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in parts]
    return list(dict.fromkeys(found))


def parse_arms(text: str | None) -> list[str]:
    """Names of arms, each once; none for None, which means all.

    Raises:
        ConfigError: the text holds no name.
    """
    names = [] if text is None else list(dict.fromkeys(_parts(text)))
    if text is not None and not names:
        raise ConfigError(f"arms={text!r} names none; leave it out to take all of them")
    return names


def find_device(name: str | None) -> torch.device:
    """The device of a name; None is the GPU if there is one.

    Raises:
        ConfigError: PyTorch knows no such device, or it is not there.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "meta":
            raise RuntimeError("it holds no values")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"device={name!r} cannot be used: {reason.rstrip('.')}. Write cpu, or cuda where there "
            "is a GPU."
        ) from None
    return device


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
