"""`memretrofit card | push`: a saved memory for others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from memretrofit.errors import ConfigError

Directory = Annotated[
    Path, typer.Argument(help="Folder that save_pretrained or train wrote.", show_default=False)
]


def card(directory: Directory) -> None:
    """Render the model card again, from config, recipe and report."""
    from memretrofit.hub import write_card

    typer.echo(str(write_card(directory)))


def push(
    directory: Directory,
    repo: Annotated[
        str | None, typer.Argument(help="owner/name on the Hub; default: hub.repo of its recipe.")
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Default: hub.private of its recipe.")
    ] = None,
) -> None:
    """Publish a saved model: memory, adapter and card; never the base weights."""
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
    )
    typer.echo(url)
