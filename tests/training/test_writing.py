"""Sparse memory finetuning by a recipe: what is learned, and which bits stay."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training.tiny import (
    SLOTS,
    base,
    injection,
    losses,
    sparse_writing,
    tokenizer,
    write_base,
    write_lessons,
)

from memretrofit.data.lessons import drawn
from memretrofit.errors import ConfigError
from memretrofit.evaluation.bank_report import evaluate_bank
from memretrofit.hub import from_pretrained
from memretrofit.modules.product_key import SHARED
from memretrofit.patching.ffn import bank_of
from memretrofit.patching.row_counts import row_counts
from memretrofit.retrofit import memory_parameters, patch
from memretrofit.training import train
from memretrofit.training.inject import InjectSettings, inject
from memretrofit.training.injection import Inject
from memretrofit.training.sparse_rows import choose_rows
from memretrofit.training.writing import joined


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = write_base(tmp_path_factory.mktemp("writing"))
    write_lessons(place)
    return place


@pytest.fixture(scope="module")
def learned(folder):
    return train(sparse_writing(folder, steps=100), folder / "learned")


@pytest.fixture(scope="module")
def prepared(folder):
    """A model, and what the recipe's stage made of the lessons."""
    recipe = sparse_writing(folder)
    model = patch(base(), recipe.method)
    return model, Inject(recipe).prepare(model, tokenizer())


def test_lessons_are_learned_in_their_own_rows_alone(folder, learned):
    """And no dense parameter moves: all are those of a fresh patch."""
    recipe = sparse_writing(folder, steps=100)
    results = evaluate_bank(learned, recipe, learned / "report.json")
    assert results["recall"]["trained"]["trained"]["mean"] >= 0.9
    assert results["recall"]["trained"]["base"]["mean"] <= 0.2
    assert results["sizes"]["dense_parameters"] == 0
    model, other = from_pretrained(learned), base()
    torch.manual_seed(recipe.train.seed)
    fresh = memory_parameters(patch(other, recipe.method))
    saved = memory_parameters(model)
    assert set(fresh) == {name for name in saved if not name.endswith(".delta")}
    assert all(torch.equal(saved[name], fresh[name]) for name in fresh)
    bank = bank_of(model)
    assert int(bank.background_batches) == 400
    assert 0 < bank.table(SHARED).opened < bank.table(SHARED).rows


def test_each_text_has_the_rows_that_are_its_own(prepared):
    model, material = prepared
    assert len(material.writing.rows) == len(material.items) == 40
    for item, rows in zip(material.items[:4], material.writing.rows, strict=False):
        found = choose_rows(model, {"input_ids": item.ids[None]}, top_t=40)
        assert torch.equal(rows[SHARED], found[SHARED])
        assert 0 < len(rows[SHARED]) <= 40
    union = joined(material.writing.rows)[SHARED]
    assert torch.equal(bank_of(model).table(SHARED).delta_index, union)


def stepped(
    prepared, *, guarded: bool = True, **values: int
) -> tuple[set[int], set[int], set[int]]:
    """Rows that moved, rows that may, and open rows that the texts of these steps read."""
    model, material = prepared
    settings = InjectSettings(learning_rate=100.0 if guarded else 1e-2, **values)
    numbers = {
        number
        for step in range(settings.steps)
        for number in drawn(40, settings.seed, step, settings.batch_size)
    }
    table = bank_of(model).table(SHARED)
    with torch.no_grad():
        table.delta.zero_()
    reads = [row_counts(model, {"input_ids": material.items[n].ids[None]})[SHARED] for n in numbers]
    inject(
        model,
        material.writing.parameters(model),
        material.items,
        settings,
        writing=material.writing if guarded else None,
    )
    moved = table.delta_index[(table.delta != 0).any(-1)]
    allowed = joined([material.writing.rows[n] for n in numbers])[SHARED]
    open_reads = table.delta_index[sum(reads)[table.delta_index] > 0]
    return set(moved.tolist()), set(allowed.tolist()), set(open_reads.tolist())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("steps", "batch_size"), [(1, 1), (1, 4), (3, 2)])
def test_rows_outside_the_mask_keep_every_bit(prepared, seed, steps, batch_size):
    """Zeros at the start, of which one that moves is told by any bit; also open rows that these
    texts read, which another text owns."""
    moved, allowed, read = stepped(prepared, seed=seed, steps=steps, batch_size=batch_size)
    assert moved
    assert moved <= allowed
    assert read - allowed or batch_size > 1


def test_without_the_mask_other_rows_would_move(prepared):
    """The witness: all that is open and read learns."""
    moved, allowed, _ = stepped(prepared, guarded=False, seed=0, steps=1, batch_size=1)
    assert moved - allowed


def test_a_killed_run_goes_on_with_the_same_losses(folder, learned, tmp_path):
    """The rows are chosen again, and are the same: another choice would not fit its checkpoint."""
    for name in ("base", "text", "lessons.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    script = [sys.executable, str(Path(__file__).with_name("tiny.py")), "writing", str(tmp_path)]
    done = subprocess.run([*script, "18"], capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    killed = tmp_path / "killed"
    assert losses(killed)[-1][1] == 18
    train(sparse_writing(tmp_path, steps=100), killed, resume=True)
    assert losses(killed) == losses(learned)
    found, expected = (load_file(x / "delta.safetensors") for x in (killed, learned))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_dry_run_says_that_rows_alone_learn(folder, tmp_path, capsys):
    train(sparse_writing(folder), tmp_path / "none", dry_run=True)
    assert "learn, and 0 dense parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "hierarchical_ffn"}, "hierarchical_ffn has no slots"),
        ({"name": "token_lookup"}, "token_lookup has no slots"),
        (SLOTS | {"starts_at_zero": "projection"}, "Set method.starts_at_zero=rows"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_method_without_slots_is_refused_before_anything_is_loaded(
    folder, tmp_path, method, words, dry_run
):
    with pytest.raises(ConfigError, match=words):
        train(sparse_writing(folder, method=method), tmp_path / "none", dry_run=dry_run)
    assert not (tmp_path / "none").exists()


def test_bad_values_are_refused_together(folder):
    with pytest.raises(ConfigError) as caught:
        injection(folder, rows="some", top_t=0, sgd_learning_rate=0.0)
    told = "\n".join(caught.value.problems)
    for key in ("rows='some'", "top_t=0", "sgd_learning_rate=0.0"):
        assert f"train.inject.{key}" in told
