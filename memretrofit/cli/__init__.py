"""`memretrofit methods | tasks | describe | train | eval | report | heads | remember | ...`.

Every command imports what it needs when it runs, so that `--help` answers at once. An error that
memretrofit raises on purpose prints as its message, without a traceback, and exits with status 2.
"""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from memretrofit.cli.heads import heads
from memretrofit.cli.injecting import inject
from memretrofit.cli.inspection import describe, methods, tasks
from memretrofit.cli.remembering import generate, remember
from memretrofit.cli.runs import evaluate, report, train
from memretrofit.cli.sharing import card, push
from memretrofit.errors import MemretrofitError


class _Group(TyperGroup):
    """Turns our own errors into a message and status 2; any other is a bug and keeps its trace."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MemretrofitError as error:
            # No markup: messages quote values in brackets.
            Console(stderr=True, soft_wrap=True).print(
                f"{type(error).__name__}: {error}", markup=False, highlight=False
            )
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Give a pretrained Transformers model a memory.",
)
for command in (methods, tasks, describe, train, inject):
    app.command()(command)
app.command("eval")(evaluate)
for command in (report, heads, remember, generate, card, push):
    app.command()(command)


def main() -> None:
    """The console script."""
    app()
