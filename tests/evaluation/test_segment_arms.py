"""Arms and runs of models that read in segments: what each is, and lengths beyond the positions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from contract.families import build
from reading_cases import letters, text
from task_run_small import PROSE, TASKS
from tolerances import REORDERED, WRONG

from memretrofit import patch
from memretrofit.errors import ConfigError
from memretrofit.evaluation.arms import arms_of, fresh_values
from memretrofit.evaluation.reader import Reading, read, read_prompts
from memretrofit.evaluation.report import measure
from memretrofit.evaluation.runs.arms import (
    answerers_of,
    kept_exactly,
    memory_state,
    same_computations,
    segment_length,
)
from memretrofit.evaluation.runs.evaluate import trained_tokens
from memretrofit.evaluation.runs.report import write_report
from memretrofit.evaluation.runs.runner import run_tasks
from memretrofit.evaluation.runs.saved import read_run
from memretrofit.methods.armt import ARMTConfig
from memretrofit.methods.rmt import RMTConfig
from memretrofit.patching.controls import (
    memory_silenced,
    state_carried,
    state_shuffled,
    writes_disabled,
)
from memretrofit.recipe import load_recipe
from memretrofit.retrofit import memory_parameters

SEGMENT = 8
CONFIGS = {
    "armt": ARMTConfig(segment_length=SEGMENT, num_memory_tokens=2, memory_dim=4),
    "rmt": RMTConfig(segment_length=SEGMENT, num_memory_tokens=2),
}
READINGS = [
    Reading(prompt=text(length, seed), candidates=(text(5, 9), text(3, 8)), max_new_tokens=4)
    for length, seed in ((20, 1), (17, 2), (19, 3))
]
every = pytest.mark.parametrize("name", CONFIGS)


def trained(name: str, seed: int = 0):
    """Patched, with every parameter moved, as training would."""
    torch.manual_seed(seed)
    model = patch(build("llama"), CONFIGS[name])
    with torch.no_grad():
        for parameter in memory_parameters(model).values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def answers(model):
    return read(model, letters(), READINGS)


def apart(a, b) -> float:
    """The largest difference of two lists of outcomes."""
    return max(
        abs(x - y)
        for one, other in zip(a, b, strict=True)
        for x, y in zip(one.log_likelihoods, other.log_likelihoods, strict=True)
    )


@every
def test_each_arm_is_what_its_name_says(name):
    model = trained(name)
    found = answerers_of(model, letters(), chunk_size=7)
    assert list(found) == [
        *("full", "untrained", "trained", "zeroed", "no_write", "shuffled", "stale"),
        *("bm25", "oprm"),
    ]
    assert same_computations(found) == {"no_write": "zeroed"}
    own = found["trained"](READINGS)
    assert apart(own, answers(model)) < REORDERED
    assert apart(found["full"](READINGS), answers(build("llama"))) < REORDERED
    with memory_silenced(model):
        assert apart(found["zeroed"](READINGS), answers(model)) < REORDERED
    for arm in ("full", "untrained", "zeroed", "shuffled"):
        assert apart(found[arm](READINGS), own) > WRONG, arm
    with writes_disabled(model):  # what nobody wrote and what nobody reads are the same
        assert apart(found["zeroed"](READINGS), answers(model)) < REORDERED
    assert found["trained"](READINGS) == own  # every switch is off again


@every
def test_shuffled_reads_what_the_next_row_wrote_before_its_last_segment(name):
    """And no more of its own text than that last segment. Witness: the exchange in all segments,
    which brings two rows their own text back."""
    model = trained(name)
    shuffled = answerers_of(model, letters(), chunk_size=7)["shuffled"]
    found = shuffled(READINGS)
    for row, reading in enumerate(READINGS):
        other = READINGS[(row + 1) % 3].prompt[: 2 * SEGMENT]
        left = read_prompts(model, letters(), [other])
        alone = replace(reading, prompt=reading.prompt[2 * SEGMENT :])
        with state_carried(model, left.cache):
            assert apart([found[row]], read(model, letters(), [alone])) < REORDERED
    two = READINGS[:2]
    changed = [replace(two[0], prompt=text(SEGMENT, 7) + two[0].prompt[SEGMENT:]), two[1]]
    assert apart(shuffled(two)[:1], shuffled(changed)[:1]) < REORDERED
    with state_shuffled(model):
        assert apart(read(model, letters(), two)[:1], read(model, letters(), changed)[:1]) > WRONG


def test_stale_begins_with_what_the_next_row_left():
    """Row b alone, after row b + 1 alone: as in the batch. Witness: after row b - 1."""
    model = trained("armt")
    batch = answerers_of(model, letters())["stale"](READINGS)

    def after(row: int, other: int):
        left = read_prompts(model, letters(), [READINGS[other].prompt])
        with state_carried(model, left.cache):
            return read(model, letters(), [READINGS[row]])

    for row in range(3):
        assert apart([batch[row]], after(row, (row + 1) % 3)) < REORDERED
        assert apart([batch[row]], after(row, (row + 2) % 3)) > WRONG


@every
def test_untrained_is_a_fresh_patch(name):
    """With the values that the seed gives it; and nothing about the model or the draws changes."""
    model = trained(name)
    before = torch.get_rng_state()
    values = fresh_values(model, 3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(3)
    fresh = patch(build("llama"), CONFIGS[name])
    own = memory_parameters(fresh)
    assert own.keys() == values.keys()
    assert all(torch.equal(values[key], own[key]) for key in own)
    found = answerers_of(model, letters(), seed=3)
    assert apart(found["untrained"](READINGS), answers(fresh)) < REORDERED
    assert (memory_state(model, 3), memory_state(fresh, 3)) == ("trained", "untrained")
    assert memory_state(fresh) == "untrained"  # whatever was drawn


def test_an_adapter_is_no_part_of_the_base_models_arms():
    from peft import LoraConfig

    from memretrofit.hub.adapter import add_adapter

    torch.manual_seed(3)
    fresh = answers(patch(build("llama"), CONFIGS["armt"]))
    adapted = add_adapter(trained("armt"), LoraConfig(target_modules=["v_proj"], r=2)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found = answerers_of(adapted, letters(), seed=3)
    assert apart(found["full"](READINGS), answers(build("llama"))) < REORDERED
    assert apart(found["untrained"](READINGS), fresh) < REORDERED
    assert apart(found["zeroed"](READINGS), fresh) > WRONG  # the adapter is a part of it
    memory = sum(parameter.numel() for parameter in memory_parameters(adapted).values())
    lora = 2 * (2 * 32 + 2 * 16)  # two layers, rank 2, 32 -> 2 heads of 8
    costs = {arm: found[arm].cost(READINGS[0])["trained_parameters"] for arm in found}
    assert costs["trained"] == costs["zeroed"] == memory + lora
    assert costs["full"] == costs["untrained"] == 0


@every
def test_cost_counts_the_session_and_does_not_grow(name):
    found = answerers_of(trained(name), letters(), arms=["full", "trained", "bm25", "oprm"])
    costs = []
    for words in (10, 50):
        context, question = "ab. " * words, "cd?"
        reading = Reading(prompt=context + question, context=(0, len(context)))
        costs.append({arm: answerer.cost(reading) for arm, answerer in found.items()})
    short, long = costs
    assert long["trained"]["cache_bytes"] == short["trained"]["cache_bytes"] > 0
    assert long["full"]["cache_bytes"] == short["full"]["cache_bytes"] * 203 / 43
    for arm in ("bm25", "oprm"):  # a segment's tokens at once, whatever the length
        assert long[arm]["tokens"] <= SEGMENT + len(question)


def test_arms_that_cannot_be_are_refused():
    model = trained("armt")
    with pytest.raises(ConfigError, match="'window' needs a memory beside a sliding window"):
        answerers_of(model, letters(), arms=["window"])
    with pytest.raises(ConfigError, match="Leave --window out"):
        answerers_of(model, letters(), window=8)
    assert (segment_length(model), kept_exactly(model)) == (SEGMENT, SEGMENT)
    assert segment_length(build("llama")) is None


def test_arms_of_the_report_on_text():
    """The floor of a model that has no window is each segment alone."""
    model = trained("armt")
    arms = arms_of(model, fresh_values(model, 0))
    assert list(arms) == ["full", "untrained", "trained", "zeroed", "no_write", "shuffled"]
    ids = torch.randint(3, 50, (2, 3 * SEGMENT))
    with torch.no_grad():
        logits = {}
        for name, arm in arms.items():
            with arm():
                logits[name] = model(ids).logits
        base = build("llama")
        alone = [base(part).logits for part in ids.split(SEGMENT, dim=1)]
    torch.testing.assert_close(logits["zeroed"], torch.cat(alone, dim=1), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits["untrained"], logits["zeroed"], atol=1e-5, rtol=0)
    assert (logits["trained"] - logits["zeroed"]).abs().max() > WRONG


def test_a_run_goes_beyond_the_positions_without_full_attention(tmp_path):
    """256 positions: full attention is left out at 300 tokens, and the report says so."""
    model = trained("armt")
    answerers = answerers_of(model, letters(), arms=["full", "trained", "shuffled", "bm25"])
    options = {
        "prose": PROSE,
        "number": 4,
        "batch_size": 2,
        "settings": {"model": "tiny", "segment_length": SEGMENT, "trained_tokens": 64},
    }
    run_tasks(
        model,
        letters(),
        TASKS[:1],
        (60, 300),
        answerers=answerers,
        output=tmp_path / "run",
        **options,
    )
    run = read_run(tmp_path / "run")
    measured = {place[1]: list(cell["scores"]) for place, cell in run.cells.items()}
    assert measured == {
        60: ["full", "trained", "shuffled", "bm25"],
        300: ["trained", "shuffled", "bm25"],
    }
    costs = json.loads((tmp_path / "run" / "cost.json").read_text())["arms"]
    assert costs["full"]["tokens"] <= 60 < costs["trained"]["tokens"]
    report = write_report(tmp_path / "run").read_text()
    assert "full was not measured at 300 tokens" in report
    assert (tmp_path / "run" / "length_letter_rank.png").is_file()
    with pytest.raises(ConfigError, match="lengths 300 are beyond the 256 positions"):
        run_tasks(
            model,
            letters(),
            TASKS[:1],
            (300,),
            answerers={"full": answerers["full"]},
            output=tmp_path / "other",
            **options,
        )


def test_tokens_of_the_longest_text_that_was_trained_on():
    of_recurrence = {"stages": ["recurrence"], "recurrence": {"segments": [1, 2, 4]}}
    assert trained_tokens({"train": of_recurrence}, 128) == 512
    assert trained_tokens({"train": {"stages": ["distill"], "sequence_length": 2048}}, None) == 2048
    assert trained_tokens({}, 128) is None


def test_the_report_on_text_has_the_segments_alone_as_its_floor(tmp_path):
    """Measured from the first token that lacks something; other windows mean nothing."""
    path = tmp_path / "recipe.yaml"
    method = f"{{name: armt, segment_length: {SEGMENT}, num_memory_tokens: 2}}"
    written = f"base: {{model: {tmp_path}}}\nmethod: {method}\n"
    path.write_text(written + "evaluate: {bootstrap_samples: 50}\n")
    model, rows = trained("armt"), torch.randint(3, 50, (4, 3 * SEGMENT))
    texts = {"held-out": (rows, torch.full((4,), 3 * SEGMENT))}
    results, scores = measure(model, texts, load_recipe(path))
    summary = results["texts"]["held-out"]
    assert list(summary["arms"]) == list(scores["held-out"]) == list(arms_of(model, {}))
    assert summary["positions"] == 4 * (3 * SEGMENT - 1 - SEGMENT)
    alone, full = (scores["held-out"][arm].nll[:, SEGMENT:].mean() for arm in ("zeroed", "full"))
    assert summary["window_loss"]["mean"] == pytest.approx(float(alone - full), abs=1e-5)
    inside = (scores["held-out"][arm].nll[:, :SEGMENT] for arm in ("trained", "full"))
    torch.testing.assert_close(*inside, atol=1e-5, rtol=0)
    path.write_text(written + "evaluate: {windows: [10]}\n")
    with pytest.raises(ConfigError, match="has no window; leave them out"):
        measure(model, texts, load_recipe(path))
