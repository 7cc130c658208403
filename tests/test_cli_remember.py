"""`remember` and `generate --memory`: a text is read by one process and asked about by another."""

from __future__ import annotations

import functools
import os
import signal
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract.families import build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from memretrofit import AHNConfig, RMTConfig, from_pretrained, patch, save_pretrained
from memretrofit.cli import app
from memretrofit.config import MethodConfig
from memretrofit.hub import load_base, read_remembered, remembered_ids

runner = CliRunner()
TEXT = "the name of the ship is argo and the name of the dog is argos. " * 12
QUESTION = "the name of "


def letters() -> PreTrainedTokenizerFast:
    """A token a character; `^` begins a text and `~` ends it."""
    characters = "?^~" + string.ascii_lowercase + " .\n"
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    from tokenizers.processors import TemplateProcessing

    inner.post_processor = TemplateProcessing(single="^ $A ~", special_tokens=[("^", 1), ("~", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="?", bos_token="^", eos_token="~"
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    build("llama").save_pretrained(folder)
    letters().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    return path


def run(*arguments: object, stdin: str | None = None):
    return runner.invoke(app, [str(x) for x in arguments], input=stdin)


@pytest.fixture(autouse=True)
def _small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets' windows are larger than a test's text."""
    from memretrofit.methods.infllm import InfLLMConfig

    small = InfLLMConfig(sliding_window=16, num_sink_tokens=2, block_size=8, top_k=4)
    monkeypatch.setattr("memretrofit.cli.inspection.preset_config", lambda method, preset: small)


def test_read_once_and_ask(base: Path, text: Path, tmp_path: Path) -> None:
    """The answer is the model's own after text and prompt, whatever the chunks."""
    out = tmp_path / "book.mem"
    done = run("remember", text, "-o", out, "--base", base, "--chunk-size", 100)
    assert done.exit_code == 0, done.output
    record = read_remembered(out)
    ids = remembered_ids(out)
    assert ids[0, 0] == 1  # begins as a text does
    assert ids[0, -1] != 2  # and goes on
    assert record.tokens == ids.shape[1] == len(TEXT) + 1
    assert record.text_name == "book.txt"
    for words in (f"{record.tokens} tokens remembered", "MB on disk", "MB on the device", "left"):
        assert words in done.stderr
    found = run("generate", base, "--memory", out, "--prompt", QUESTION, "--max-new-tokens", 9)
    assert found.exit_code == 0, found.output
    tokenizer, model = letters(), patch(load_base(base), record.method)
    question = tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt")["input_ids"]
    whole = torch.cat([ids, question], dim=1)
    expected = model.generate(whole, max_new_tokens=9, do_sample=False, eos_token_id=2)
    said = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert found.stdout.strip() == said.strip()
    assert "opened in" in found.stderr
    beams = ("--num-beams", 3, "--max-new-tokens", 9)
    found_beams = run("generate", base, "--memory", out, "--prompt", QUESTION, *beams)
    assert found_beams.exit_code == 0, found_beams.output
    expected = model.generate(whole, max_new_tokens=9, do_sample=False, eos_token_id=2, num_beams=3)
    said = tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert found_beams.stdout.strip() == said.strip()
    alone = run("generate", "--memory", out, "--prompt", QUESTION, "--max-new-tokens", 9)
    assert alone.stdout == found.stdout  # the recorded base


def test_stdin(base: Path, tmp_path: Path) -> None:
    done = run("remember", "-", "-o", tmp_path / "x", "--base", base, stdin=TEXT)
    assert done.exit_code == 0, done.output
    assert read_remembered(tmp_path / "x").text_name == "stdin"


AHN = AHNConfig(sliding_window=16, num_sink_tokens=2)
IN_SEGMENTS = RMTConfig(segment_length=50, num_memory_tokens=3)


def trained(base: Path, folder: Path, config: MethodConfig = AHN) -> Path:
    """A saved memory with parameters of its own."""
    model = patch(load_base(base), config)
    save_pretrained(model, folder, tokenizer=letters())
    return folder


@pytest.mark.parametrize("config", [AHN, IN_SEGMENTS], ids=["ahn", "rmt"])
def test_a_saved_memory_remembers_and_answers(
    config: MethodConfig, base: Path, text: Path, tmp_path: Path
) -> None:
    saved, out = trained(base, tmp_path / "saved", config), tmp_path / "book.mem"
    assert run("remember", text, "-o", out, "--base", saved).exit_code == 0
    assert read_remembered(out).method == from_pretrained(saved).memretrofit_patch.config
    asked = ("--memory", out, "--prompt", QUESTION, "--max-new-tokens", 3)
    assert run("generate", saved, *asked).exit_code == 0
    found = run("generate", base, *asked)  # without the trained parameters
    assert found.exit_code == 2
    assert f"StateError: {config.method} has" in found.stderr
    plain = [run("generate", saved, "--prompt", QUESTION, *x) for x in ((), ("--device", "cpu"))]
    assert [done.exit_code for done in plain] == [0, 0]
    assert plain[0].stdout == plain[1].stdout
    refused = run("remember", text, "-o", out, "--base", saved, "--method", "infllm")
    assert refused.exit_code == 2
    assert "leave out --method and --preset" in refused.stderr


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_text_is_refused(content: str, base: Path, text: Path, tmp_path: Path) -> None:
    text.write_text(content)
    done = run("remember", text, "-o", tmp_path / "out", "--base", base)
    assert done.exit_code == 2
    assert "ConfigError: remember: book.txt is empty" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_refused(base: Path, text: Path, tmp_path: Path) -> None:
    latin = text.with_name("latin")
    latin.write_bytes(b"caf\xe9")
    for arguments, words in (
        (("remember", tmp_path / "no", "-o", tmp_path, "--base", base), "cannot be read"),
        (
            ("remember", text.with_name("latin"), "-o", tmp_path, "--base", base),
            "not UTF-8 (byte 3)",
        ),
        (("remember", text, "-o", tmp_path, "--base", "./nowhere"), "CheckpointError"),
        (("generate", "--prompt", "x"), "give MODEL_OR_DIR, or --memory"),
        (("generate", base, "--prompt", "x", "--device", "nowhere"), "device='nowhere' cannot"),
        (("generate", base, "--memory", tmp_path, "--prompt", "x"), "No remembered.json"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert words in done.stderr
        assert "Traceback" not in done.output


def test_another_model_and_an_empty_prompt_are_refused(
    base: Path, text: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "book.mem", tmp_path / "other"
    assert run("remember", text, "-o", out, "--base", base).exit_code == 0
    build("llama", seed=1).save_pretrained(other)
    letters().save_pretrained(other)
    done = run("generate", other, "--memory", out, "--prompt", "x")
    assert done.exit_code == 2
    assert "another model" in done.stderr
    done = run("generate", base, "--memory", out, "--prompt", "")
    assert done.exit_code == 2
    assert "--prompt holds no token" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_ctrl_c_while_reading_leaves_the_old_conversation(base: Path, tmp_path: Path) -> None:
    out, long = tmp_path / "book.mem", tmp_path / "long.txt"
    assert run("remember", "-", "-o", out, "--base", base, stdin=TEXT).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    long.write_text(TEXT * 400)
    command = [sys.executable, "-m", "memretrofit", "remember", str(long), "-o", str(out)]
    command += ["--base", str(trained(base, tmp_path / "saved")), "--chunk-size", "16"]
    # a shell starts jobs in the background with SIGINT ignored, and children inherit that
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=heeding
    ) as process:
        assert process.stderr is not None
        try:
            while "tokens/s" not in (line := process.stderr.readline()):  # until it is reading
                assert line, "it ended before it read"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode != 0
    assert "Traceback" not in errors
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
