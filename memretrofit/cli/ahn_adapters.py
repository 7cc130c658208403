"""`memretrofit import-ahn | export-ahn`: adapters in the layout of AHN's authors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_ahn(
    release: Annotated[
        Path,
        typer.Argument(
            metavar="RELEASE",
            help="Folder with config.json and model.safetensors, as `hf download` leaves it.",
            show_default=False,
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Base model: Hub id, folder or package: name.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIRECTORY", help="Folder to write.", show_default=False
        ),
    ],
    revision: Annotated[
        str | None, typer.Option(help="With a Hub id: the commit of the base.")
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens attended exactly, sinks not counted; default: what the release says, "
            "mostly a value of its training.",
        ),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(min=0, help="First tokens that stay; default: what the release says, or 0."),
    ] = None,
) -> None:
    """Turn an adapter that AHN's authors published into a saved memory.

    \b
    Examples:
      hf download ByteDance-Seed/AHN-GDN-for-Qwen-2.5-Instruct-3B --local-dir ahn
      memretrofit import-ahn ahn --base Qwen/Qwen2.5-3B-Instruct -o ahn_gdn
      memretrofit generate ahn_gdn --prompt "In the beginning"
    """
    from memretrofit.hub import load_base, load_tokenizer, save_pretrained
    from memretrofit.hub.ahn_release import import_ahn

    tokenizer = load_tokenizer(base, revision=revision)
    model = import_ahn(
        load_base(base, revision=revision), release, sliding_window=window, num_sink_tokens=sinks
    )
    save_pretrained(model, output, tokenizer=tokenizer)
    typer.echo(str(output))


def export_ahn(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIRECTORY",
            help="Folder that save_pretrained or train wrote.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIRECTORY", help="Folder to write.", show_default=False
        ),
    ],
) -> None:
    """Write a saved AHN memory in the layout that its authors' merge_weights.py reads.

    \b
    Examples:
      memretrofit export-ahn runs/ahn_qwen -o release
    """
    from memretrofit.hub import from_pretrained
    from memretrofit.hub.ahn_release import export_ahn

    export_ahn(from_pretrained(directory), output)
    typer.echo(str(output))
