"""`memretrofit card | push | export`: a saved memory for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memretrofit.errors import ConfigError

Directory = Annotated[
    Path,
    typer.Argument(
        metavar="DIRECTORY", help="Folder that save_pretrained or train wrote.", show_default=False
    ),
]


def card(directory: Directory) -> None:
    """Render the model card again, from config, recipe and report.

    \b
    Examples:
      memretrofit card runs/lolcats
    """
    from memretrofit.hub import write_card

    typer.echo(str(write_card(directory)))


def push(
    directory: Directory,
    repo: Annotated[
        str | None,
        typer.Argument(
            metavar="OWNER/NAME",
            help="Repository on the Hub; default: hub.repo of its recipe.",
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Who may see it; default: hub.private of its recipe."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Id of the base model on the Hub, where it was trained from a folder.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Publish a saved model: memory, adapter and card; never the base weights.

    \b
    Examples:
      memretrofit push runs/lolcats owner/SmolLM2-135M-lolcats
      memretrofit push runs/lolcats owner/SmolLM2-135M-lolcats --public
    """
    from memretrofit.hub import (
        from_pretrained,
        push_to_hub,
        read_record,
        read_results,
        tokenizer_of,
    )

    record = read_record(directory)
    wanted = (record.recipe or {}).get("hub") or {}
    repo = repo or wanted.get("repo")
    if repo is None:
        raise ConfigError(
            f"push: {directory} was trained by no recipe that names hub.repo; say owner/name"
        )
    tokenizer = tokenizer_of(record.base)
    url = push_to_hub(
        from_pretrained(directory),
        repo,
        private=wanted.get("private", True) if private is None else private,
        recipe=record.recipe,
        results=read_results(directory),
        tokenizer=tokenizer,
        base_model=base,
    )
    typer.echo(url)


def export(
    directory: Directory,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)
    ],
) -> None:
    """Write base and memory as one checkpoint, which Transformers loads with trust_remote_code.

    \b
    Examples:
      memretrofit export runs/lolcats -o SmolLM2-135M-lolcats
    """
    from memretrofit.hub import (
        export_standalone,
        from_pretrained,
        read_record,
        read_results,
        tokenizer_of,
    )

    record = read_record(directory)
    export_standalone(
        from_pretrained(directory),
        output,
        recipe=record.recipe,
        results=read_results(directory),
        tokenizer=tokenizer_of(record.base),
    )
    typer.echo(str(output))
