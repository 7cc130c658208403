"""`memretrofit push` and `export`: what a folder holds, for others."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from hub_client import TOKEN, online
from hub_server import hub
from saved_models import logits, memory_for, randomise
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from memretrofit import from_pretrained, patch, save_pretrained
from memretrofit.cli import app
from memretrofit.hub import load_base, read_record

RECIPE = {"seed": 0, "hub": {"repo": "owner/named", "private": True}}


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    """A saved memory of a base that has a tokenizer."""
    words = {f"w{number}": number for number in range(61)}
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")))
    tokenizer.save_pretrained(folder)
    model = randomise(patch(load_base(folder), memory_for()), seed=1)
    save_pretrained(model, tmp_path / "run", recipe=RECIPE, tokenizer=tokenizer)
    return tmp_path / "run"


# huggingface_hub sends large files by an argument that httpx is about to rename
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_push(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the recipe's repository, as private as it says; a base in a folder needs its name."""
    with hub() as server:
        server.tokens = {TOKEN: "owner"}
        server.add("owner/base", {x.name: x.read_bytes() for x in (tmp_path / "base").iterdir()})
        online(monkeypatch, server.address, tmp_path / "cache")
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "token").write_text(TOKEN)  # as `hf auth login` stores it
        refused = CliRunner().invoke(app, ["push", str(run)])
        assert refused.exit_code == 2
        assert "others do not have" in refused.stderr
        done = CliRunner().invoke(app, ["push", str(run), "--base", "owner/base"])
        assert done.exit_code == 0, done.output
        assert "owner/named/commit/" in done.stdout
        assert TOKEN not in done.output
        assert server.repos["owner/named"].private
        assert torch.equal(logits(from_pretrained("owner/named")), logits(from_pretrained(run)))
    assert TOKEN.encode() not in b"".join(server.repos["owner/named"].files.values())


def test_export(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "standalone"
    done = CliRunner().invoke(app, ["export", str(run), "-o", str(output)])
    assert done.exit_code == 0, done.output
    model = AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    assert torch.equal(logits(model), logits(from_pretrained(run)))
    assert AutoTokenizer.from_pretrained(output).get_vocab()["w7"] == 7
    assert read_record(output / "memory").recipe == RECIPE
    again = CliRunner().invoke(app, ["export", str(run), "-o", str(output)])
    assert again.exit_code == 2
    assert "holds a checkpoint already" in again.stderr
