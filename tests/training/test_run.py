"""A recipe from its file to a saved memory: all of it, cut off by a kill, and in small."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from training.tiny import losses, recipe, tokenizer, write_base
from transformers import LlamaConfig, Qwen3Config

from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.files import held
from memretrofit.hub import from_pretrained
from memretrofit.recipe import Recipe, load_recipe
from memretrofit.retrofit import memory_parameters
from memretrofit.training import load_base, train
from memretrofit.training.rehearsal import rehearse, run_small
from memretrofit.training.run import DRAFT, prepare_folder
from memretrofit.training.small import tiny_model

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.name != "_base.yaml")
SMOLLM2 = LlamaConfig(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)


def test_there_are_recipes():
    names = {path.name for path in RECIPES}
    assert {"ahn_gdn.yaml", "ahn_gdn_transfer.yaml", "lolcats.yaml", "demo.yaml"} <= names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_how_to_run_it_and_runs_in_small(path, tmp_path):
    head = path.read_text().split("extends:")[0]
    for label in ("try it:", "run it:", "needs:"):
        assert label in head
    loaded = load_recipe(path)
    run_small(loaded, SMOLLM2, tmp_path)
    stages = [(stage, step) for stage in loaded.train.stages for step in (1, 2)]
    assert (tmp_path / "log.jsonl").is_file() == bool(stages)
    assert not stages or [(stage, step) for stage, step, _ in losses(tmp_path)] == stages
    assert (tmp_path / "memory.safetensors").is_file()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def whole(folder):
    """One uninterrupted run."""
    return train(recipe(folder), folder / "whole")


def test_a_run_leaves_all_that_made_it(folder, whole):
    assert load_recipe(whole / "recipe.yaml") == recipe(folder)
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in records] == [
        (stage, step) for stage in ("transfer", "distill") for step in range(1, 7)
    ]
    for record in records:
        assert record["tokens"] == record["step"] * 2 * 48
        assert record["window"] in (8, 16, 24)
        assert record["sinks"] == 2
        assert record["seconds"] > 0 < record["tokens_per_second"]
        assert 0 < record["learning_rate"] <= 1e-2
    assert len(records[0]["r2_by_layer"]) == 2


def test_the_result_loads(whole):
    model = from_pretrained(whole)
    saved = load_file(whole / "memory.safetensors")
    found = memory_parameters(model)
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    assert any(value.count_nonzero() for name, value in saved.items() if "out_map" in name)


@pytest.mark.parametrize("place", [("transfer", 5), ("distill", 5)])
def test_a_killed_run_goes_on_with_the_same_losses(folder, whole, tmp_path, place):
    """Both stages save at step 4: a kill at step 5 loses what the log already tells."""
    for name in ("base", "text"):
        (tmp_path / name).symlink_to(folder / name)
    script = [sys.executable, str(Path(__file__).with_name("tiny.py")), "killed", str(tmp_path)]
    done = subprocess.run(
        [*script, *map(str, place), "start"], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    killed = tmp_path / "killed"
    assert losses(killed)[-1][:2] == place
    with (killed / "log.jsonl").open("a") as log:
        log.write('{"stage": "distill", "st')  # as a kill leaves it
    train(recipe(tmp_path), killed, resume=True)
    assert losses(killed) == losses(whole)
    found, expected = (load_file(x / "memory.safetensors") for x in (killed, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lora_is_saved_beside_the_memory(folder, tmp_path):
    stages = {"stages": ["distill"], "trainable": "memory+lora", "max_steps": 2, "lora_rank": 2}
    output = train(recipe(folder, **stages), tmp_path / "lora")
    adapter = load_file(output / "adapter_model.safetensors")
    assert adapter
    assert all(".lora_" in name and ".memory." not in name for name in adapter)
    assert all(value.count_nonzero() for name, value in adapter.items() if "lora_B" in name)
    assert set(load_file(output / "memory.safetensors")) == set(
        memory_parameters(from_pretrained(output))
    )


def test_a_folder_belongs_to_one_run(folder, whole, tmp_path):
    with pytest.raises(ConfigError, match="holds a run already; pass --resume"):
        train(recipe(folder), whole)
    with pytest.raises(ConfigError, match="holds no run"):
        train(recipe(folder), tmp_path / "none", resume=True)
    with pytest.raises(ConfigError, match=r"differs from .* in train"):
        train(recipe(folder, max_steps=7), whole, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        train(recipe(folder), tmp_path / "file" / "run")


def test_of_runs_at_once_one_gets_the_folder(folder, whole, tmp_path):
    """Of those that start, and of those that go on; another process frees it by its end."""
    shutil.copytree(whole, tmp_path / "run")
    with held(tmp_path / "run"), pytest.raises(StateError, match="another process is writing"):
        train(recipe(folder), tmp_path / "run", resume=True)
    train(recipe(folder), tmp_path / "run", resume=True)
    with held(tmp_path / "new"), pytest.raises(StateError, match="another process is writing"):
        train(recipe(folder), tmp_path / "new")
    assert not (tmp_path / "new" / DRAFT).exists()

    started = Barrier(4)

    def start(number: int) -> str:
        started.wait()
        try:
            with held(tmp_path / "four"):
                prepare_folder(recipe(folder), tmp_path / "four")
                started.wait()
        except StateError as error:
            started.wait()
            return str(error)
        return ""

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(start, range(4))).count("") == 1


def test_a_start_that_failed_can_be_made_again(folder, tmp_path):
    values = recipe(folder, stages=["distill"], max_steps=1).to_dict()
    values["data"]["sources"] = [str(tmp_path / "text")]
    with pytest.raises(ConfigError, match="text"):
        train(Recipe.from_dict(values), tmp_path / "run")
    assert not [path for path in (tmp_path / "run").iterdir() if path.name != ".lock"]
    (tmp_path / "text").symlink_to(folder / "text")
    train(Recipe.from_dict(values), tmp_path / "run")
    assert not (tmp_path / "run" / DRAFT).exists()


def test_a_start_that_died_does_not_hold_the_folder(folder, whole, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / DRAFT).write_text("half of a")
    train(recipe(folder), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole)


def test_a_run_of_an_earlier_release_goes_on(folder, whole, tmp_path):
    """Its recipe lacks a field that has come since, and means the default."""
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "recipe.yaml"
    values = yaml.safe_load(path.read_text())
    del values["train"]["inject"]["rows"]
    path.write_text(yaml.safe_dump(values))
    train(recipe(folder), tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == losses(whole)


def test_a_dry_run_tells_sizes_and_writes_nothing(folder, tmp_path, capsys):
    output = tmp_path / "none"
    assert train(recipe(folder), output, dry_run=True) == output
    assert not output.exists()
    told = capsys.readouterr().out
    for part in ("memory ahn: ", "transfer: 576 tokens", "distill: 576 tokens", "4 documents"):
        assert part in told


def test_a_dry_run_names_text_that_is_missing(folder, tmp_path):
    values = recipe(folder).to_dict()
    values["data"]["sources"] = [str(tmp_path / "absent")]
    with (tmp_path / "told").open("w") as file:
        rehearse(Recipe.from_dict(values), Console(file=file))
    assert "MISSING" in (tmp_path / "told").read_text()


def test_a_tiny_model_keeps_its_kinds_of_layers():
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    model = tiny_model(
        Qwen3Config(
            num_hidden_layers=6, layer_types=kinds, sliding_window=8, use_sliding_window=True
        )
    )
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.config.layer_types == ["sliding_attention", "full_attention"]


def test_the_base_comes_with_its_tokenizer(folder, tmp_path):
    model, loaded = load_base(str(folder / "base"), dtype="bfloat16")
    assert model.dtype is torch.bfloat16
    assert not model.training
    assert loaded.padding_side == "left"
    assert loaded("AB!C")["input_ids"] == tokenizer()("AB!C")["input_ids"]
    with pytest.raises(CheckpointError, match="no-such-package"):
        load_base("package:no-such-package")


def test_a_resolved_recipe_is_plain_yaml(whole):
    assert set(yaml.safe_load((whole / "recipe.yaml").read_text())) >= {"base", "method", "train"}
