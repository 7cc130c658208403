"""docs/publishing.md: what it shows is run, against the stand-in; what it quotes exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from hub_client import online
from hub_server import hub
from saved_models import logits

from memretrofit.cli import app

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "publishing.md").read_text(encoding="utf-8")
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


# huggingface_hub sends large files by an argument that httpx is about to rename
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_its_python_runs(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after another, as a reader would."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with hub() as server:
        server.add("owner/base", {path.name: path.read_bytes() for path in base.iterdir()})
        online(monkeypatch, server.address, tmp_path / "cache")
        found = []
        for block in blocks("python"):
            exec(compile(block, "docs/publishing.md", "exec"), names)
            found.append(logits(names["model"]))
        assert names["address"].startswith(f"{server.address}/owner/memory/commit/")
        assert server.repos["owner/memory"].private
    assert len(found) == 4
    assert all(torch.equal(x, found[0]) for x in found)


@pytest.mark.parametrize("line", "".join(blocks("bash")).splitlines())
def test_its_commands_parse(line: str) -> None:
    program, name, *arguments = shlex.split(line)
    assert program == "memretrofit"
    COMMANDS[name].make_context(name, arguments)


def test_its_messages_exist() -> None:
    hub_code = (ROOT / "memretrofit" / "hub").glob("*.py")
    texts = "".join(path.read_text(encoding="utf-8") for path in hub_code)
    code = re.sub(r'"\n\s+f?"', "", texts)  # messages are split over lines
    quoted = re.findall(r"^\| `(.*?)(?: \.\.\.)?`", PAGE, re.M)
    assert len(quoted) == 7
    for message in quoted:
        assert message in code, message
