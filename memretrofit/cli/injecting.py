"""`memretrofit inject`: new knowledge into a bank beside a frozen model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from memretrofit.errors import ConfigError


def inject(
    lessons: Annotated[
        Path,
        typer.Argument(
            help="JSON lines: {text}, {texts, answer} or {question, answer}.", show_default=False
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Of the recipe that this makes, e.g. train.inject.steps=600",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str,
        typer.Option(help="Base model: Hub id, folder or package: name.", show_default=False),
    ] = "",
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the run.", show_default=False)
    ] = Path("runs/inject"),
    revision: Annotated[
        str | None, typer.Option(help="With a Hub id: the commit of the base.")
    ] = None,
    method: Annotated[str, typer.Option(help="A method of the bank family.")] = "hierarchical_ffn",
    preset: Annotated[str | None, typer.Option(help="A preset of that method.")] = None,
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
        bool, typer.Option("--dry-run", help="Check the lessons; print sizes and time.")
    ] = False,
) -> None:
    """Train a bank on lessons with the model frozen, measure it, and write the card.

    Afterwards: memretrofit generate OUTPUT --prompt "...".
    """
    if not base:
        raise ConfigError("inject: --base is missing; name the model that gets the bank")
    values: dict[str, Any] = {
        "base": {"model": base, "revision": revision},
        "method": {"name": method} | ({} if preset is None else {"preset": preset}),
        "train": {"stages": ["inject"]},
        "data": {"lessons": str(lessons)},
    }
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
