"""The stage that teaches a memory between segments: curriculum, log, watch, and a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training.recurring import SEGMENT, recipe, with_segment, word_tokenizer, write_base
from training.tiny import base, losses
from typer.testing import CliRunner

from memretrofit.cli import app
from memretrofit.data.recall_items import RecallItems
from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.hub import from_pretrained
from memretrofit.methods.armt import ARMTConfig
from memretrofit.methods.hmt import HMTConfig
from memretrofit.methods.rmt import RMTConfig
from memretrofit.recipe import RecurrenceSection, load_recipe
from memretrofit.retrofit import memory_parameters, patch
from memretrofit.training import train, trainable_parameters
from memretrofit.training.credit import SegmentedText
from memretrofit.training.recurrence import (
    RecurrenceSettings,
    RecurrenceStep,
    train_recurrence,
)
from memretrofit.training.recurrence_stage import TEXTS, recurrence_texts
from memretrofit.training.rehearsal import rehearse
from memretrofit.training.run import stages_of

TOKENIZER = word_tokenizer()
TEXT = RecallItems(TOKENIZER, SEGMENT, 1)
SHORT = RecurrenceSettings(
    steps=6, batch_size=2, learning_rate=1e-2, segments=(2,), held_out_texts=4, save_steps=4
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("recurrence"))


@pytest.fixture(scope="module")
def whole(folder):
    """One uninterrupted run, as a user starts it."""
    (folder / "recipe.yaml").write_text(recipe(folder).to_yaml())
    output = folder / "whole"
    done = CliRunner().invoke(app, ["train", str(folder / "recipe.yaml"), "-o", str(output)])
    assert done.exit_code == 0, done.output
    return output


def patched(method):
    small = base().config
    small.vocab_size = len(TOKENIZER)
    torch.manual_seed(0)
    return patch(type(base())(small).eval(), method)


def trained(method, settings: RecurrenceSettings = SHORT):
    model, promised = trainable_parameters(patched(method))
    steps: list[RecurrenceStep] = []
    train_recurrence(model, promised, TEXT, settings, on_step=steps.append)
    return promised, steps


def test_a_curriculum_adds_lengths_and_keeps_the_old_ones() -> None:
    settings = replace(SHORT, steps=400, segments=(1, 2, 5), shares=(1.0, 1.0, 2.0))
    drawn = [settings.segments_at(step) for step in range(400)]
    assert set(drawn[:100]) == {1}
    assert set(drawn[100:200]) == {1, 2}
    assert all(50 < drawn[200:].count(n) < 90 for n in (1, 2, 5))
    assert [settings.stage_at(step) for step in (0, 99, 100, 199, 200, 399)] == [0, 0, 1, 1, 2, 2]
    even = replace(settings, shares=())
    assert [even.stage_at(step) for step in (0, 133, 134, 266, 267, 399)] == [0, 0, 1, 1, 2, 2]
    assert drawn != [replace(settings, seed=1).segments_at(step) for step in range(400)]


def test_a_run_leaves_all_that_made_it(folder, whole) -> None:
    assert load_recipe(whole / "recipe.yaml") == recipe(folder)
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in records] == [("recurrence", n) for n in range(1, 11)]
    assert {r["segments"] for r in records[:5]} == {1}
    assert {r["segments"] for r in records} == {1, 2}
    for record in records:
        assert record["right"] in (0.0, 0.5, 1.0)
        assert record["grad_norm"] > 0
        assert 0 < record["learning_rate"] <= 1e-2
        assert record["tokens_per_second"] > 0
    looks = {r["step"]: r["held_out"] for r in records if "held_out" in r}
    assert list(looks) == [4, 8, 10]
    assert [set(look) for look in looks.values()] == [{"1"}, {"1", "2"}, {"1", "2"}]
    assert all(0 <= share <= 1 for look in looks.values() for share in look.values())


def test_the_result_loads(whole) -> None:
    model = from_pretrained(whole)
    saved = load_file(whole / "memory.safetensors")
    found = memory_parameters(model)
    assert all(torch.equal(saved[name], found[name]) for name in found)
    fresh = memory_parameters(patched(RMTConfig(segment_length=SEGMENT, num_memory_tokens=2)))
    assert not any(torch.equal(saved[name], fresh[name]) for name in fresh)
    assert (whole / "adapter_model.safetensors").is_file()


def test_a_killed_run_goes_on_with_the_same_losses(folder, whole, tmp_path) -> None:
    """It saves at step 4, and a kill at step 7 loses what the log already tells."""
    for name in ("base", "prose"):
        (tmp_path / name).symlink_to(folder / name)
    script = [sys.executable, str(Path(__file__).with_name("recurring.py")), str(tmp_path), "7"]
    tests = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(script, capture_output=True, timeout=120, check=False, env=tests)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    killed = tmp_path / "killed"
    assert losses(killed)[-1][1] == 7
    train(recipe(tmp_path), killed, resume=True)
    assert losses(killed) == losses(whole)
    for name in ("memory.safetensors", "adapter_model.safetensors"):
        found, expected = load_file(killed / name), load_file(whole / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    with pytest.raises(ConfigError, match="differs from"):
        train(recipe(tmp_path, steps=11), killed, resume=True)


def test_a_checkpoint_is_of_its_texts(tmp_path) -> None:
    """The same recipe, and other prose in the files that it names."""
    write_base(tmp_path)
    story = with_segment(recipe(tmp_path, texts="babilong_qa1", segments=[2], steps=4), 96)
    output = train(story, tmp_path / "stories")
    for path in (tmp_path / "prose").iterdir():
        path.write_text(path.read_text().replace("the", "my"))
    with pytest.raises(CheckpointError, match="fingerprint"):
        train(story, output, resume=True)


def test_replay_learns_what_full_does() -> None:
    settings = replace(SHORT, segments=(3,))
    full, steps = trained(RMTConfig(segment_length=SEGMENT, num_memory_tokens=2), settings)
    replayed, again = trained(
        RMTConfig(segment_length=SEGMENT, num_memory_tokens=2), replace(settings, credit="replay")
    )
    assert [x.loss for x in again] == pytest.approx([x.loss for x in steps], rel=1e-3)
    for name in full:
        torch.testing.assert_close(replayed[name], full[name], rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        # what wrote is cut off from what is asked
        (ARMTConfig(segment_length=SEGMENT), replace(SHORT, credit="truncated")),
        # one memory in the queue: there is nothing to choose among
        (HMTConfig(segment_length=SEGMENT, num_sensory_tokens=2, key_dim=8), SHORT),
    ],
    ids=["truncated", "one memory"],
)
def test_a_parameter_that_gets_no_gradient_is_named(method, settings) -> None:
    with pytest.raises(StateError, match="were promised to train and received no gradient"):
        trained(method, settings)


def test_with_more_segments_a_recall_learns() -> None:
    method = HMTConfig(segment_length=SEGMENT, num_sensory_tokens=2, key_dim=8)
    promised, steps = trained(method, replace(SHORT, segments=(2, 3)))
    assert len(steps) == 6
    assert any("recall" in name for name in promised)


def test_a_frozen_parameter_is_noticed() -> None:
    model, promised = trainable_parameters(patched(RMTConfig(segment_length=SEGMENT)))
    promised["elsewhere"] = nn.Parameter(torch.ones(2))
    with pytest.raises(StateError, match=r"in 3 steps: elsewhere\."):
        train_recurrence(model, promised, TEXT, SHORT)
    with pytest.raises(ConfigError, match="nothing to train"):
        train_recurrence(model, {}, TEXT, SHORT)


def test_a_loss_that_is_not_finite_ends_the_run() -> None:
    model, promised = trainable_parameters(patched(RMTConfig(segment_length=SEGMENT)))
    with torch.no_grad():
        next(iter(promised.values())).fill_(float("inf"))
    with pytest.raises(StateError, match="the loss of step 1 is nan"):
        train_recurrence(model, promised, TEXT, SHORT)


def test_every_kind_of_text_can_be_read(folder) -> None:
    assert set(TEXTS) == set(get_args(get_type_hints(RecurrenceSection)["texts"]))
    for name in TEXTS:
        texts = recurrence_texts(
            recipe(folder, texts=name, segments=[1, 3], batch_size=2), 200, TOKENIZER
        )
        given = texts.batch(3, 2, "key")
        model = patched(RMTConfig(segment_length=200, num_memory_tokens=2))
        text = SegmentedText(model, given.ids, given.labels)
        text.measure()
        assert len(text) == 3
        assert text.loss > 0


def test_what_does_not_fit_is_told_before_the_run(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match="raise it, or tell less"):
        train(recipe(folder, facts=9), tmp_path / "none")
    assert not (tmp_path / "none" / "recipe.yaml").exists()
    with pytest.raises(ConfigError, match="trains in one process, and 2 were launched"):
        stages_of(recipe(folder), 2)
    with pytest.raises(ConfigError, match="has as many as it needs"):
        recipe(folder, texts="babilong_qa1", facts=2)


def test_a_dry_run_tells_sizes(folder, tmp_path, capsys) -> None:
    train(recipe(folder, segments=[1, 4]), tmp_path / "none", dry_run=True)
    told = capsys.readouterr().out
    for part in ("memory rmt: ", "recurrence: 10 steps, up to 1, 4 segments of 32 tokens"):
        assert part in told
    assert not (tmp_path / "none").exists()
    few = replace(
        recipe(folder, segments=[1, 2]),
        method=HMTConfig(segment_length=SEGMENT, num_sensory_tokens=2, key_dim=8),
    )
    with pytest.raises(StateError, match="received no gradient in 2 steps"):
        rehearse(few)
