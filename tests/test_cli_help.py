"""`--help` of every command: examples that parse, and one word for one thing."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from memretrofit.cli import app

ROOT = Path(__file__).parent.parent
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands  # type: ignore[attr-defined]
MOST_COLUMNS = 80


def examples(text: str) -> list[str]:
    """The lines under Examples."""
    _, _, after = text.partition("Examples:\n")
    return [line.strip() for line in after.partition("\n\n")[0].splitlines() if line.strip()]


HELP = {"": GROUP.help or ""} | {name: command.help or "" for name, command in COMMANDS.items()}
EXAMPLES = [
    pytest.param(line, id=f"{name or 'memretrofit'}-{place}")
    for name, text in HELP.items()
    for place, line in enumerate(examples(text))
]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_has_an_example_of_itself(name):
    own = [line for line in examples(HELP[name]) if re.search(rf"\bmemretrofit {name}\b", line)]
    assert own
    shown = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "100"}).stdout
    for line in examples(HELP[name]):
        assert line in shown  # rich would take [x] for markup and drop it
        assert len(line) < MOST_COLUMNS - 2


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_parse(line):
    """The command, its options and their values are legal, and recipes exist."""
    line = line.rpartition(" | ")[2]
    program, *words = shlex.split(line)
    if program == "hf":
        return
    assert program == "memretrofit"
    name, *arguments = words
    parsed = COMMANDS[name].make_context(name, arguments).params
    recipe = parsed.get("recipe")
    assert recipe is None or (ROOT / recipe).is_file()


def test_an_example_with_a_wrong_option_is_seen():
    with pytest.raises(Exception, match="No such option: --steps"):
        test_examples_parse("memretrofit train recipes/lolcats.yaml --steps 3")


@pytest.mark.parametrize("name", list(COMMANDS))
def test_options_have_one_spelling(name):
    """Every parameter is explained, ends as a sentence does, and `--output` is `-o` everywhere."""
    for parameter in COMMANDS[name].params:
        if parameter.name == "help":
            continue
        told = parameter.help
        assert told, parameter.name
        assert not re.search(r"\bDefault\b|\bdefault [^:]", told), told
        if parameter.name == "output":
            assert parameter.opts == ["--output", "-o"]
        if parameter.name == "device":
            assert told.endswith("cpu or cuda; default: cuda where there is one.")
