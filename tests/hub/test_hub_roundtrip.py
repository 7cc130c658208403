"""What is saved comes back, exactly, onto the base model that it was made for."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from saved_models import is_untouched, llama, logits, memory_for, randomise

from memretrofit import (
    AHNConfig,
    LoLCATsConfig,
    WindowSinksConfig,
    from_pretrained,
    patch,
    save_pretrained,
    unpatch,
)
from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.hub import (
    check_tokenizer,
    load_base,
    read_record,
    tokenizer_fingerprint,
    write_card,
)
from memretrofit.retrofit import memory_parameters, patched_config

CONFIGS = [
    AHNConfig(sliding_window=12, num_sink_tokens=2),
    AHNConfig(rule="ssd", sliding_window=12, layers_to_transform=(1,), center_keys=True),
    LoLCATsConfig(sliding_window=12, num_sink_tokens=0, key_space="pre_rope"),
    WindowSinksConfig(sliding_window=12),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}-{len(str(c))}")
def test_save_then_load_is_the_same_model(config, base: Path, tmp_path: Path) -> None:
    model = randomise(patch(load_base(base), config), seed=1)
    save_pretrained(model, tmp_path / "memory")
    loaded = from_pretrained(tmp_path / "memory")
    assert patched_config(loaded) == config
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    # the witness: a fresh patch, which a loader that forgot the tensors would give
    fresh = patch(load_base(base), config)
    assert torch.equal(logits(fresh), logits(model)) == (not memory_parameters(model))


def test_a_base_model_that_is_passed_in_is_patched_in_place(saved: Path, base: Path) -> None:
    model = load_base(base)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert from_pretrained(saved, base=model) is model
    assert all(p.requires_grad for p in memory_parameters(model).values())
    unpatch(model)
    assert is_untouched(model)
    assert all(torch.equal(state[name], x) for name, x in model.state_dict().items())


def test_the_memory_keeps_its_dtype(base: Path, tmp_path: Path) -> None:
    """A memory that was cast is saved as it is and comes back as it was."""
    model = randomise(patch(load_base(base), memory_for()), seed=1)
    for parameter in memory_parameters(model).values():
        parameter.data = parameter.data.bfloat16()
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    for name, parameter in memory_parameters(loaded).items():
        assert parameter.dtype is torch.bfloat16
        assert torch.equal(parameter, memory_parameters(model)[name])


def test_the_file_holds_the_memory_alone(saved: Path, base: Path) -> None:
    with safe_open(saved / "memory.safetensors", framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names
    assert all(".memory." in name for name in names)
    record = read_record(saved)
    assert set(record.tensors) == names
    assert metadata["method_sha256"]
    assert record.base.model == str(base)
    assert (record.base.model_type, record.base.vocab_size) == ("llama", 61)
    assert sorted(path.name for path in saved.iterdir()) == [
        "README.md",
        "memory.safetensors",
        "memory_config.json",
    ]
    assert str(record.base.weight_fingerprint) in (saved / "README.md").read_text()


def test_recipe_and_results_are_kept(base: Path, tmp_path: Path) -> None:
    recipe = {"train": {"max_steps": 3}, "base": {"model": "owner/name", "revision": "abc"}}
    model = patch(load_base(base), memory_for())
    save_pretrained(model, tmp_path, recipe=recipe, results={"texts": {}})
    record = read_record(tmp_path)
    assert (record.recipe, record.results) == (recipe, {"texts": {}})
    # what load_base noted is what was loaded; a recipe is believed where nothing was noted
    assert record.base.model == str(base)
    save_pretrained(patch(llama(), memory_for()), tmp_path, recipe=recipe)
    assert read_record(tmp_path).base.model == "owner/name"
    assert read_record(tmp_path).base.revision == "abc"


def test_what_is_not_json_is_refused_and_nothing_is_left(base: Path, tmp_path: Path) -> None:
    model = patch(load_base(base), memory_for())
    with pytest.raises(ConfigError, match="plain JSON"):
        save_pretrained(model, tmp_path / "memory", recipe={"model": object()})
    assert list((tmp_path / "memory").iterdir()) == []


def test_other_files_in_the_folder_stay(saved: Path, base: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "report.json").write_text("{}")
    save_pretrained(patch(load_base(base), memory_for()), saved)
    assert (saved / "notes.txt").read_text() == "mine"
    assert (saved / "report.json").exists()


def test_an_unnamed_base_must_be_passed(tmp_path: Path) -> None:
    """A model that was built from a config has no name to load it by."""
    save_pretrained(randomise(patch(llama(), memory_for()), seed=1), tmp_path)
    with pytest.raises(CheckpointError, match="base=model"):
        from_pretrained(tmp_path)
    assert torch.is_tensor(logits(from_pretrained(tmp_path, base=llama())))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_saved(value: float, saved: Path, base: Path) -> None:
    before = (saved / "memory.safetensors").read_bytes()
    model = patch(load_base(base), memory_for())
    next(iter(memory_parameters(model).values())).data.view(-1)[0] = value
    with pytest.raises(StateError, match=r"nan or infinity in 1 of .*layers\.0\.self_attn\.memory"):
        save_pretrained(model, saved)
    assert (saved / "memory.safetensors").read_bytes() == before
    with pytest.raises(StateError, match="nan"):
        save_pretrained(model, saved.parent / "new")
    assert not (saved.parent / "new").exists()


def test_a_model_without_a_memory_is_not_saved(base: Path, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="not patched"):
        save_pretrained(load_base(base), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(base: Path, tmp_path: Path) -> None:
    """A file in its place: permission bits would not stop a test that runs as root."""
    (tmp_path / "file").write_text("x")
    model = patch(load_base(base), memory_for())
    for target in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CheckpointError, match=r"Cannot write to .*file.*Nothing was saved"):
            save_pretrained(model, target)
    assert (tmp_path / "file").read_text() == "x"


def test_a_full_disk_is_reported(saved: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left.*still be loaded"):
        save_pretrained(patch(load_base(base), memory_for()), saved)
    assert not list(saved.glob(".saving-*"))


class Vocabulary(SimpleNamespace):
    """What is asked of a tokenizer."""

    def get_vocab(self) -> dict[str, int]:
        return self.tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def save_pretrained(self, folder: Path) -> None:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(self.tokens))


def test_tokenizers_are_told_apart(base: Path, tmp_path: Path) -> None:
    own = Vocabulary(tokens={"a": 0, "b": 1, "c": 60})
    save_pretrained(patch(load_base(base), memory_for()), tmp_path, tokenizer=own)
    assert (tmp_path / "tokenizer.json").exists()
    record = read_record(tmp_path).base
    assert record.tokenizer_fingerprint == tokenizer_fingerprint(own)
    check_tokenizer(
        Vocabulary(tokens={"c": 60, "b": 1, "a": 0}), record
    )  # the order is no part of it
    with pytest.raises(
        CheckpointError, match=r"not the one that the memory was saved with.*3 tokens"
    ):
        check_tokenizer(Vocabulary(tokens={"b": 0, "a": 1, "c": 60}), record)
    with pytest.raises(CheckpointError, match=r"ids up to 61; the base model, .*, knows 61"):
        check_tokenizer(Vocabulary(tokens={"a": 61}), record)


def test_without_a_recorded_tokenizer_only_the_range_of_ids_is_checked(saved: Path) -> None:
    record = read_record(saved).base
    check_tokenizer(Vocabulary(tokens={"anything": 60}), record)
    with pytest.raises(CheckpointError, match="knows 61"):
        check_tokenizer(Vocabulary(tokens={"a": 0, "b": 61}), record)


def test_nothing_is_logged_on_a_good_load(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="memretrofit"):
        from_pretrained(saved)
    assert not caplog.records


def test_the_card_is_rendered_again_with_a_report(saved: Path) -> None:
    before = (saved / "README.md").read_text()
    assert write_card(saved).read_text() == before
    interval = {"mean": 0.25, "low": 0.2, "high": 0.3}
    report = {"texts": {"prose": {"memory_gain": interval, "nll": {"trained": interval}}}}
    (saved / "report.json").write_text(json.dumps(report))
    write_card(saved, name="owner/name", limits="It cannot sing.")
    text = (saved / "README.md").read_text()
    assert "0.2500 (0.2000 to 0.3000)" in text
    assert "owner/name" in text
    assert "It cannot sing." in text
    (saved / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"report\.json is damaged"):
        write_card(saved)
    assert (saved / "README.md").read_text() == text
