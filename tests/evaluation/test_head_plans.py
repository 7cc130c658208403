"""From a base model to a plan of its heads, by the command and by hand."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from probe_models import UNIFORM, VOCABULARY, built, looks_for
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from memretrofit import describe, patch
from memretrofit.cli import app
from memretrofit.config import MethodConfig
from memretrofit.errors import CheckpointError, ConfigError
from memretrofit.evaluation.probes import (
    RetrievalHeads,
    inverted_plan,
    plan_from_scores,
    random_plan,
)
from memretrofit.evaluation.runs.head_plan import plan_for_base, planned_config
from memretrofit.evaluation.task import Draft, Task
from memretrofit.hub import load_base
from memretrofit.methods.head_plan import HeadPlanConfig
from memretrofit.recipe import load_recipe

SCORES = RetrievalHeads(
    layers=(1, 4),
    scores=((0.0, 0.1, 0.6, 0.2), (0.5, 0.3, 0.0, 0.0)),
    active=((0.0, 0.1, 0.6, 0.2), (0.5, 0.3, 0.0, 0.0)),
    num_key_value_heads=(2, 2),
    trials=1,
    answered=1,
)
"""KV heads: (1, 0) 0.1, (1, 1) 0.6, (4, 0) 0.5, (4, 1) 0."""


def test_a_plan_is_the_best_heads_and_its_controls_are_as_large() -> None:
    assert plan_from_scores(SCORES, 0.25) == ((1, 1),)
    assert plan_from_scores(SCORES, 0.5) == ((1, 1), (4, 0))
    assert inverted_plan(SCORES, 0.25) == ((4, 1),)
    assert inverted_plan(SCORES, 0.5) == ((1, 0), (4, 1))
    for share, size in ((0.0, 0), (0.25, 1), (0.75, 3), (1.0, 4)):
        for plan in (plan_from_scores, inverted_plan, random_plan):
            assert len(set(plan(SCORES, share))) == size
    HeadPlanConfig(full_heads=inverted_plan(SCORES, 0.75))


def test_equal_scores_are_shared_out_from_both_ends() -> None:
    """Most heads of a model score 0: the plan and its inverse still have none in common."""
    flat = replace(SCORES, scores=((0.0,) * 4, (0.0,) * 4))
    assert plan_from_scores(flat, 0.5) == ((1, 0), (1, 1))
    assert inverted_plan(flat, 0.5) == ((4, 0), (4, 1))


def test_a_random_plan_is_a_fair_draw_of_its_seed() -> None:
    plans = [random_plan(SCORES, 0.5, seed) for seed in range(600)]
    assert plans == [random_plan(SCORES, 0.5, seed) for seed in range(600)]
    drawn = Counter(head for plan in plans for head in plan)
    assert set(drawn) == {(1, 0), (1, 1), (4, 0), (4, 1)}
    assert all(250 < count < 350 for count in drawn.values())  # 300 +- 4 deviations of 12.2


@pytest.mark.parametrize("plan", [plan_from_scores, inverted_plan, random_plan])
@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_a_share(plan, share) -> None:
    with pytest.raises(ConfigError, match="from 0 to 1"):
        plan(SCORES, share)


@dataclass(frozen=True, kw_only=True)
class Copy(Task):
    """w8 asks for w1 w2 w3."""

    name: str = "copy"
    answer_tokens: int = 4
    reads_prose: bool = False

    def draft(self, units, depth, draw, prose) -> Draft:
        noise = " w7" * (units + draw.randrange(3))
        return Draft(
            context=f"w9{noise} w1 w2 w3 w7",
            question=" w8",
            answers=(" w1 w2 w3",),
            candidates=(" w1 w2 w3", " w4"),
            evidence=("w1 w2 w3",),
        )


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The KV head 1 of layer 1 copies, through its second query head; no other does."""
    chain = looks_for({8: 1, 1: 2, 2: 3, 3: 9})
    heads = [chain, UNIFORM, UNIFORM, UNIFORM]
    built([UNIFORM] * 4, heads).save_pretrained(tmp_path / "base")
    words = {f"w{n}": n for n in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr("memretrofit.evaluation.runs.head_plan.get_tasks", lambda names: [Copy()])
    return str(tmp_path / "base")


def run(*arguments: object):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def test_the_command_finds_the_head_and_the_plan_is_accepted(base: str, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    asked = ("heads", "--base", base, "--lengths", "40", "--items", 3)
    done = run(*asked, "-o", out)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    assert "3 of 3 prompts answered; 1 of 8 query heads copy" in done.stderr
    assert "best: 1 KV heads, layer.head and score: 1.0 1.00" in done.stderr
    plan = json.loads(out.read_text())
    config = MethodConfig.from_dict(plan["method"])
    assert config == planned_config(out) == HeadPlanConfig(full_heads=((1, 0),))
    assert plan["plans"]["inverted"] == [[1, 1]]
    assert RetrievalHeads.from_dict(plan["scores"]).heads() == [(1, 0)]
    assert plan["base"]["model"] == base
    assert plan["measured"]["lengths"] == [40]
    # where a method goes
    found = run("describe", "--base", base, "--method", out)
    assert found.exit_code == 0, found.output
    assert "full_heads=((1, 0),)" in found.stdout
    assert "full_heads=((1, 0),)" in describe(patch(load_base(base), config))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base:\n  model: {base}\nmethod:\n  name: head_plan\n")
    said = done.stderr.split("in a recipe of head_plan: ")[1].strip().strip("'")
    assert load_recipe(recipe, [said]).method == config
    # the controls
    for choice in ("inverted", "random"):
        control = run(*asked, "-o", tmp_path / "x.json", "--choice", choice, "--share", 0.5)
        assert control.exit_code == 0, control.output
        full = planned_config(tmp_path / "x.json").full_heads
        assert full == tuple(
            map(tuple, json.loads((tmp_path / "x.json").read_text())["plans"][choice])
        )
        assert len(full) == 2
        assert (choice != "inverted") or ((1, 0) not in full)


def test_the_plan_keeps_what_the_copying_head_needs(base: str, tmp_path: Path) -> None:
    """The needle is beyond the window: with the plan the answer is the base model's, with the
    inverted plan it is not."""
    small = HeadPlanConfig(sliding_window=6, num_sink_tokens=1)
    ids = torch.tensor([[9, 1, 2, 3, *[7] * 30, 8]])
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    answers = {}
    for choice in ("best", "inverted"):
        plan_for_base(
            base, tmp_path / "x.json", choice=choice, config=small, lengths="40", number=2
        )
        model = patch(load_base(base), planned_config(tmp_path / "x.json"))
        answers[choice] = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    assert answers["best"] == [1, 2, 3]
    assert answers["inverted"] != [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--choice", "beast"), "did you mean 'best'"),
        (("--lengths", "x"), "no number of tokens"),
        (("--preset", "DUO"), "unknown preset"),
        (("--device", "nowhere"), "device='nowhere'"),
        (("--lengths", "3"), "its shortest item has"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, says, base: str, tmp_path: Path) -> None:
    done = run("heads", "--base", base, "-o", tmp_path / "plan.json", *options)
    assert done.exit_code == 2
    assert says in done.stderr
    assert not (tmp_path / "plan.json").exists()


def test_a_file_that_is_no_plan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(CheckpointError):
        planned_config(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="holds no method; pass a file that `memretrofit heads`"):
        planned_config(path)
    done = run("describe", "--base", "./nowhere", "--method", path, "--preset", "X")
    assert "leave out --preset" in done.stderr
