"""Lessons into a bank: from a file to a report, cut off by a kill, and in small."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.tiny import base, injection, losses, write_base, write_lessons

from memretrofit.data.lessons import Item
from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.evaluation.bank_baselines import add_baselines
from memretrofit.evaluation.bank_report import evaluate_bank
from memretrofit.hub import from_pretrained
from memretrofit.methods.hierarchical_ffn import HierarchicalFFNConfig
from memretrofit.modules.bank import Tokens
from memretrofit.patching.ffn import bank_of
from memretrofit.recipe import Recipe, load_recipe
from memretrofit.retrofit import memory_parameters, patch, unpatch
from memretrofit.training import train
from memretrofit.training.inject import InjectSettings, inject
from memretrofit.training.injection import fit_bank
from memretrofit.training.writing import ReadRows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = write_base(tmp_path_factory.mktemp("injection"))
    write_lessons(place)
    return place


@pytest.fixture(scope="module")
def whole(folder):
    """One uninterrupted run of a few steps."""
    return train(injection(folder), folder / "whole")


@pytest.fixture(scope="module")
def learned(folder):
    """A run that is long enough to know its lessons."""
    return train(injection(folder, steps=150, learning_rate=3e-2), folder / "learned")


def test_a_run_leaves_all_that_made_it(folder, whole):
    assert load_recipe(whole / "recipe.yaml") == injection(folder)
    assert [(stage, step) for stage, step, _ in losses(whole)] == [
        ("inject", step) for step in range(1, 7)
    ]
    assert (whole / "delta.safetensors").is_file()
    assert (whole / "loss.png").is_file()
    records = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert all(record["tokens_per_second"] > 0 for record in records)


def test_a_killed_run_goes_on_with_the_same_losses(folder, whole, tmp_path):
    """It saves at step 4, and a kill at step 5 loses what the log already tells."""
    for name in ("base", "text", "lessons.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    script = [sys.executable, str(Path(__file__).with_name("tiny.py")), "injection", str(tmp_path)]
    done = subprocess.run([*script, "5"], capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    killed = tmp_path / "killed"
    assert losses(killed)[-1][1] == 5
    train(injection(tmp_path), killed, resume=True)
    assert losses(killed) == losses(whole)
    found, expected = (load_file(x / "delta.safetensors") for x in (killed, whole))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(ConfigError, match="differs from"):
        train(injection(tmp_path, steps=7), killed, resume=True)


def test_what_was_learned_is_in_the_rows(folder, learned):
    """Recall of the bank, and of the same bank with nothing read, and read elsewhere; prose that
    belongs to no lesson keeps its bits."""
    results = evaluate_bank(learned, injection(folder), learned / "report.json")
    recall, prose = results["recall"], results["prose"]
    assert recall["trained"]["trained"]["mean"] >= 0.9
    assert recall["trained"]["zeroed"]["mean"] <= 0.4
    assert recall["trained"]["misrouted"]["mean"] <= 0.6
    assert recall["trained"]["zeroed"] == recall["trained"]["base"]
    assert prose["trained"]["untouched_sequences"] > 0
    assert prose["misrouted"]["perplexity"] > prose["trained"]["perplexity"]
    assert set(recall) == {"trained", "held_out", "held_out_questions"}
    saved = json.loads((learned / "report.json").read_text())
    assert saved["recall"] == recall
    card = (learned / "README.md").read_text()
    assert "Recall by generation" in card
    assert "Prose that nothing was trained on" in card
    assert "held-out questions" in (learned / "report.md").read_text()


def test_lora_stands_beside_the_bank(folder, learned):
    """Of both sizes, on the same lessons; the report gets their columns, and the rest stays."""
    recipe = injection(folder, steps=4)
    before = evaluate_bank(learned, recipe, learned / "compared.json")
    results = add_baselines(learned, recipe, learned / "compared.json")
    assert results["recall"] == before["recall"]
    ranks = {name: entry["rank"] for name, entry in results["baselines"].items()}
    assert ranks["lora_trainable"] > ranks["lora_active"] >= 1
    # two layers of three maps, 32 to 48 wide
    assert results["baselines"]["lora_active"]["parameters"] == 6 * 80 * ranks["lora_active"]
    trained = results["sizes"]["row_parameters"]
    assert abs(results["baselines"]["lora_trainable"]["parameters"] - trained) <= 6 * 80 / 2
    assert "LoRA, as many active parameters" in (learned / "compared.md").read_text()


def test_the_base_is_untouched(learned):
    model = from_pretrained(learned)
    ids = torch.arange(1, 40)[None]
    expected = base()(ids, use_cache=False).logits
    assert torch.equal(unpatch(model)(ids, use_cache=False).logits, expected)


def test_a_dry_run_tells_sizes_and_writes_nothing(folder, tmp_path, capsys):
    output = tmp_path / "none"
    assert train(injection(folder), output, dry_run=True) == output
    assert not output.exists()
    told = capsys.readouterr().out
    for part in ("lessons: 40 texts", "bank hierarchical_ffn: ", "inject: 6 steps", "4 documents"):
        assert part in told


def test_a_run_does_not_go_on_with_other_lessons(folder, tmp_path):
    """An edited line leads to other rows: what was learned must not end up under their numbers."""
    for name in ("base", "text"):
        (tmp_path / name).symlink_to(folder / name)
    path = write_lessons(tmp_path)
    train(injection(tmp_path), tmp_path / "run")
    path.write_text(path.read_text().replace("QWX", "QXX"))
    with pytest.raises(CheckpointError, match="fingerprint"):
        train(injection(tmp_path), tmp_path / "run", resume=True)


def test_broken_lessons_stop_a_run_before_it_begins(folder, tmp_path):
    for name in ("base", "text"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / "lessons.jsonl").write_text('{"text": "A"}\n{"oops": 1}\n')
    with pytest.raises(ConfigError, match="1 of 2 lines are broken"):
        train(injection(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_lessons_and_the_stage_go_together(folder):
    values = injection(folder).to_dict()
    values["data"]["lessons"] = None
    with pytest.raises(ConfigError, match="go together"):
        Recipe.from_dict(values)


def opened():
    """A tiny model with a bank that is open for two texts."""
    torch.manual_seed(0)
    model = patch(base(), HierarchicalFFNConfig(branching=(2,), block_sizes=(4,)))
    items = [Item(torch.arange(n, n + 9), 5) for n in (1, 31)]
    generator = torch.Generator().manual_seed(0)
    generic = list(torch.randint(45, 60, (4, 64), generator=generator))
    fit_bank(model, items, generic, None)
    ReadRows().open(model, items, generic)
    return model, items


def test_only_what_was_promised_changes():
    model, items = opened()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    inject(model, memory_parameters(model), items, InjectSettings(steps=3, batch_size=2))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert moved <= set(memory_parameters(model))


def test_rows_that_a_step_did_not_read_do_not_move():
    """Bit for bit, also with the momentum of earlier steps: a dense Adam would move them."""
    model, items = opened()
    settings = InjectSettings(steps=2, batch_size=2)
    inject(model, memory_parameters(model), items, settings)
    table = bank_of(model).table("level_1")
    assert table.opened == 2
    read = int(next(iter(bank_of(model).addresses(Tokens.of(items[0].ids))["level_1"])))
    before = table.delta.detach().clone()
    inject(model, memory_parameters(model), items[:1], settings)
    same = [torch.equal(x, y) for x, y in zip(table.delta, before, strict=True)]
    assert same == [int(row) != read for row in table.delta_index]


def test_bad_input_is_refused(tmp_path):
    model, items = opened()
    parameters = memory_parameters(model)
    with pytest.raises(ConfigError, match="nothing to train"):
        inject(model, {}, items, InjectSettings())
    with pytest.raises(ConfigError, match="nothing to train"):
        inject(model, parameters, [], InjectSettings())
    strange = [Item(torch.full((9,), 60), 3)]
    with pytest.raises(StateError, match="no parameter received a gradient"):
        inject(model, parameters, strange, InjectSettings(batch_size=1))
    checkpoint = tmp_path / "inject.pt"
    checkpoint.write_bytes(b"no checkpoint")
    with pytest.raises(CheckpointError, match="cannot be read"):
        inject(model, parameters, items, InjectSettings(), checkpoint=checkpoint)
