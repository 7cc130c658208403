"""A bank that goes on learning: from a saved one, by another run, and what it still knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from training.tiny import base, injection, sparse_writing, tokenizer, write_base, write_lessons
from typer.testing import CliRunner

from memretrofit.cli import app
from memretrofit.errors import CheckpointError, ConfigError
from memretrofit.hub import from_pretrained
from memretrofit.modules.product_key import SHARED
from memretrofit.patching.ffn import bank_of
from memretrofit.recipe import Recipe
from memretrofit.retrofit import patch
from memretrofit.training import train
from memretrofit.training.injection import Inject, prepare_injection
from memretrofit.training.writing import joined

STEPS = 100
IDS = torch.arange(1, 40)[None]


def lines(folder: Path) -> list[str]:
    return write_lessons(folder).read_text().splitlines(keepends=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight lessons, in two files of four."""
    place = write_base(tmp_path_factory.mktemp("going-on"))
    each = lines(place)
    (place / "lessons.jsonl").write_text("".join(each[:4]))
    (place / "more.jsonl").write_text("".join(each[4:]))
    return place


def run(*arguments: object):
    return CliRunner().invoke(app, ["inject", *map(str, arguments)])


@pytest.fixture(scope="module")
def first(folder):
    """A recipe's run, and its report."""
    from memretrofit.evaluation.bank_report import evaluate_bank

    recipe = sparse_writing(folder, steps=STEPS)
    output = train(recipe, folder / "first")
    evaluate_bank(output, recipe, output / "report.json")
    return output


@pytest.fixture(scope="module")
def second(folder, first):
    """By the command alone: base, method and settings are those of the first."""
    done = run(folder / "more.jsonl", "--onto", first, "-o", folder / "second")
    assert done.exit_code == 0, done.output
    return folder / "second"


def going_on(folder: Path, first: Path, **inject: object) -> Recipe:
    values = sparse_writing(folder, steps=4, onto=str(first), **inject).to_dict()
    values["data"]["lessons"] = str(folder / "more.jsonl")
    return Recipe.from_dict(values)


def test_it_begins_as_the_saved_bank(folder, first):
    """The same logits, and the same count of ordinary text, which is not made again."""
    recipe = going_on(folder, first)
    model = patch(base(), recipe.method)
    prepare_injection(recipe, model, tokenizer())
    saved = from_pretrained(first)
    table, old = (bank_of(x).table(SHARED) for x in (model, saved))
    assert set(old.delta_index.tolist()) < set(table.delta_index.tolist())
    assert torch.equal(table(old.delta_index), old.delta)
    counts, before = (bank_of(x).background(SHARED) for x in (model, saved))
    assert torch.equal(counts, before)
    with torch.no_grad():
        expected = saved(IDS, use_cache=False).logits
        # rows that were opened since are zero
        assert torch.equal(model(IDS, use_cache=False).logits, expected)
        assert not torch.equal(base()(IDS, use_cache=False).logits, expected)


def test_rows_of_earlier_lessons_that_no_new_one_owns_keep_every_bit(folder, first, second):
    recipe = going_on(folder, first, top_t=40)
    model = patch(base(), recipe.method)
    material = Inject(recipe).prepare(model, tokenizer())
    owned = joined(material.writing.rows)[SHARED]
    before, after = (bank_of(from_pretrained(x)).table(SHARED) for x in (first, second))
    rows = before.delta_index[~torch.isin(before.delta_index, owned)]
    assert len(rows) > 20
    assert torch.equal(before(rows), after(rows))
    assert not torch.equal(before(owned), after(owned))


def test_the_report_says_what_is_retained(folder, first, second):
    results = json.loads((second / "report.json").read_text())
    assert results["recall"]["trained"]["trained"]["mean"] >= 0.9  # of the new ones
    (earlier,) = results["retention"]
    assert earlier["name"] == "lessons.jsonl"
    known = json.loads((first / "report.json").read_text())["recall"]
    for kind, entry in earlier["recall"].items():
        assert entry["written"] == known[kind]["trained"]
        if entry["written"]["mean"]:
            expected = entry["now"]["mean"] / entry["written"]["mean"]
            assert entry["retained"] == pytest.approx(expected)
        else:
            assert entry["retained"] is None
    told = (second / "report.md").read_text()
    assert "## Earlier lessons" in told
    assert "| when written | now | retained |" in told
    assert "Earlier lessons" in (second / "README.md").read_text()


def test_a_third_run_knows_what_the_first_one_wrote(folder, first, second, tmp_path):
    """Found in the report of the second, wherever the file lies now."""
    from memretrofit.evaluation.bank_retention import written_recall

    known = json.loads((first / "report.json").read_text())
    found = written_recall(second)
    own = json.loads((second / "report.json").read_text())["lessons_file"]["sha256"]
    assert set(found) == {known["lessons_file"]["sha256"], own}
    assert found[known["lessons_file"]["sha256"]] == {
        kind: entry["trained"] for kind, entry in known["recall"].items()
    }
    assert written_recall(tmp_path) == {}


def test_a_tree_that_was_fitted_to_later_lessons_has_a_place_for_them(folder):
    """Its routes stay those that the first rows were learned under."""
    later = [str(folder / "more.jsonl")]
    start = train(injection(folder, steps=60, later=later), folder / "tree")
    values = injection(folder, steps=60, onto=str(start)).to_dict()
    values["data"]["lessons"] = later[0]
    end = train(Recipe.from_dict(values), folder / "tree_on")
    before, after = (bank_of(from_pretrained(x)) for x in (start, end))
    assert after.meaning() == before.meaning()
    losses = [json.loads(line)["loss"] for line in (end / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.7 * losses[0]


def test_a_bank_that_changed_since_is_not_resumed_onto(folder, first, tmp_path):
    copied = tmp_path / "first"
    shutil.copytree(first, copied)
    recipe = going_on(folder, copied)
    output = train(recipe, tmp_path / "on")
    shutil.rmtree(copied)
    train(sparse_writing(folder, steps=3), copied)
    with pytest.raises(CheckpointError, match="fingerprint"):
        train(recipe, output, resume=True)


def test_another_base_is_refused(folder, first, tmp_path):
    base(seed=1).save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    values = going_on(folder, first).to_dict()
    values["base"]["model"] = str(tmp_path / "other")
    with pytest.raises(CheckpointError, match="This is another model"):
        train(Recipe.from_dict(values), tmp_path / "on")
    assert not (tmp_path / "on" / "recipe.yaml").exists()
    assert not (tmp_path / "on" / "recipe.yaml.draft").exists()


def test_another_method_or_no_bank_is_refused_before_anything_is_loaded(folder, first, tmp_path):
    values = going_on(folder, first).to_dict()
    values["method"]["num_slots"] = 400
    with pytest.raises(ConfigError, match=r"another method \(other: num_slots\)"):
        train(Recipe.from_dict(values), tmp_path / "on")
    with pytest.raises(CheckpointError, match="no memory to load"):
        train(going_on(folder, tmp_path / "absent"), tmp_path / "on")
    with pytest.raises(CheckpointError, match="no memory to load"):
        train(going_on(folder, tmp_path / "absent"), tmp_path / "on", dry_run=True)
    gone = going_on(folder, first, earlier=[str(tmp_path / "gone.jsonl")])
    with pytest.raises(ConfigError, match=r"gone\.jsonl cannot be read"):
        train(gone, tmp_path / "on")
    assert not (tmp_path / "on").exists()


def test_the_command_says_what_is_missing(folder, first, tmp_path):
    lessons = folder / "more.jsonl"
    for arguments, words in (
        ((lessons,), "--base is missing"),
        ((lessons, "--onto", first, "--compare-lora"), "leave one out"),
        ((lessons, "--onto", tmp_path), "no memory to load"),
        ((lessons, "--onto", first, "method.num_heads=1"), "another method"),
        ((lessons, "--onto", first, "train.inject.earlier=[gone.jsonl]"), "gone.jsonl; name"),
        ((lessons, "--onto", first, f"train.inject.later=[{lessons}]"), "is fitted already"),
        ((lessons, "--base", folder / "base", f"train.inject.earlier=[{lessons}]"), "name onto"),
    ):
        done = run(*arguments, "-o", tmp_path / "on")
        assert done.exit_code == 2, done.output
        assert words in done.output
    assert not (tmp_path / "on").exists()
