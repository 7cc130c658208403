"""A standalone checkpoint: the same model through Transformers' own call, or an error; never the
base alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # tests/contract, as the contract tests see it

from contract import segment_arms
from contract.bank_arms import ARMS as BANKS
from contract.bank_arms import banked
from hub_client import online
from hub_server import hub
from peft import LoraConfig, get_peft_model
from saved_models import is_untouched, llama, logits, memory_for, randomise
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from memretrofit import export_standalone, patch, save_pretrained
from memretrofit.errors import CheckpointError, StateError
from memretrofit.hub import load_base
from memretrofit.hub.base import ORIGIN
from memretrofit.patching.wrapping import unwrapped

# peft asks Transformers by a name that Transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is depr:FutureWarning")


@torch.no_grad()
def with_lora(seed: int) -> Any:
    model = randomise(patch(llama(tie_word_embeddings=True), memory_for()), seed)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_()
    return model


MODELS = {
    "attention": lambda: randomise(patch(llama(), memory_for()), 1),
    "adapter": lambda: with_lora(1),
    "ffn": lambda: banked("llama", next(iter(BANKS))),
    "sequence": lambda: segment_arms.reading("llama", next(iter(segment_arms.ARMS))),
}

READ = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from saved_models import logits
from transformers import AutoConfig, AutoModelForCausalLM
for folder in sys.argv[2:]:
    for asked in ({}, {"trust_remote_code": False}):
        for auto in (AutoConfig, AutoModelForCausalLM):
            try:
                auto.from_pretrained(folder, **asked)
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
            else:
                raise SystemExit(f"{folder} was loaded without its code")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert config.model_type == "memretrofit"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    torch.save(logits(model), Path(folder) / "found.pt")
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape == (1, 5)
"""


def test_a_new_process_reads_the_same_model(tmp_path: Path) -> None:
    """Each family; with remote code off, or not asked for, it is refused."""
    expected = {}
    for name, make in MODELS.items():
        model = make()
        expected[name] = logits(model)
        export_standalone(model, tmp_path / name, recipe={"steps": 3})
        assert torch.equal(logits(model), expected[name])  # exporting changes nothing
    command = [sys.executable, "-c", READ, str(Path(__file__).parent)]
    done = subprocess.run(
        [*command, *(str(tmp_path / name) for name in MODELS)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for name, logits_before in expected.items():
        assert torch.equal(torch.load(tmp_path / name / "found.pt"), logits_before), name


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter and a memory, as a standalone checkpoint."""
    folder = tmp_path_factory.mktemp("standalone") / "model"
    export_standalone(with_lora(1), folder)
    return folder


def test_its_base_is_the_base(exported: Path, tmp_path: Path) -> None:
    """Weights, config and generation config, as Transformers saves the model alone."""
    base = llama(tie_word_embeddings=True)
    base.save_pretrained(tmp_path)
    assert {x.name for x in tmp_path.iterdir()} == {x.name for x in (exported / "base").iterdir()}
    for path in tmp_path.iterdir():
        assert (exported / "base" / path.name).read_bytes() == path.read_bytes(), path.name
    alone = AutoModelForCausalLM.from_pretrained(exported / "base")
    assert is_untouched(alone)
    assert torch.equal(logits(alone), logits(base))


def test_a_class_that_ignores_the_config_finds_no_weights(exported: Path) -> None:
    """Neither does PEFT find an adapter to put onto a base."""
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        LlamaForCausalLM.from_pretrained(exported)
    assert not [*exported.glob("*.safetensors"), *exported.glob("adapter*")]


def test_the_card_and_the_origin(base: Path, tmp_path: Path) -> None:
    """What is loaded from a checkpoint is still a memory for the base that it was made for."""
    model = randomise(patch(load_base(base), memory_for()), 1)
    export_standalone(model, tmp_path / "one")
    text = (tmp_path / "one" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained('one', trust_remote_code=True)" in text
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True)
    assert getattr(unwrapped(loaded), ORIGIN)["model"] == str(base)
    save_pretrained(loaded, tmp_path / "two")
    records = [
        json.loads((folder / "memory_config.json").read_text())
        for folder in (tmp_path / "one" / "memory", tmp_path / "two")
    ]
    assert records[0] == records[1]


def test_from_the_hub(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = {
        str(path.relative_to(exported)): path.read_bytes()
        for path in exported.rglob("*")
        if path.is_file()
    }
    with hub() as server:
        first = server.add("owner/name", {**files, "base/pytorch_model.bin": b"pickle"})
        sha = first.refs["main"]
        first.commit({"README.md": b"gone"})
        online(monkeypatch, server.address, tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(
            "owner/name", revision=sha, trust_remote_code=True
        )
        assert torch.equal(logits(loaded), logits(with_lora(1)))
        assert not server.count("pytorch_model.bin")


def test_what_cannot_be_exported(base: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="not patched"):
        export_standalone(llama(), tmp_path / "model")
    model = patch(llama(), memory_for())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="Cannot write to"):
        export_standalone(model, tmp_path / "file")
    with pytest.raises(CheckpointError, match="holds a checkpoint already"):
        export_standalone(model, base)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("file", ["memory/memory.safetensors", "base/model.safetensors"])
def test_a_file_that_was_changed(file: str, tmp_path: Path) -> None:
    export_standalone(randomise(patch(llama(), memory_for()), 1), tmp_path / "model")
    content = bytearray((tmp_path / "model" / file).read_bytes())
    content[-5:] = bytes(x ^ 0x55 for x in content[-5:])
    (tmp_path / "model" / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not the file that was saved|weight fingerprint"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model", trust_remote_code=True)
