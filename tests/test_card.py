"""The card is read back by what will read it: a YAML parser, the Hub's card class, a table."""

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from memretrofit.card import render_card
from memretrofit.evaluation import Scores, summarise

CONFIG = {
    "method": "ahn",
    "schema_version": 1,
    "rule": "gated_delta",
    "sliding_window": 60,
    "num_sink_tokens": 4,
    "layers_to_transform": (0, 2),
}
BASE = {"model": "owner/base-135M", "revision": "abc123", "fingerprint": "f" * 16}
RECIPE = {"train": {"steps": 60, "learning_rate": 3e-3}, "data": ["kjv", "shakespeare"]}
HOSTILE = 'a: "b" # | c\n--- `d` *e* [f](g) <h> {i}'


def summary():
    levels = {"full": 2.0, "window": 3.0, "trained": 2.5, "shuffled": 2.7}
    offset = torch.linspace(0, 1, 5)[:, None].expand(5, 8)
    scores = {name: Scores(offset + level, offset * 0) for name, level in levels.items()}
    return summarise(scores, first_position=2, samples=50).to_dict()


def card(**change):
    arguments = {
        "name": "owner/base-135M-ahn-gdn",
        "config": CONFIG,
        "base": BASE,
        "recipe": RECIPE,
        "results": {
            "texts": {"held-out drama": summary()},
            "cost": {"full": {"cache_bytes": 1234567, "ms_per_token": 3.14159}},
            "cost_tokens": 2048,
        },
        "paper": "arXiv:2510.07318",
        "limits": "It copies nothing *exactly*.",
        "hashes": {"memory.safetensors": "0" * 64},
        **change,
    }
    return render_card(**arguments)


def front(text):
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))


def test_the_front_matter_reads_back():
    found = front(card(tags=["drama", "memory"]))
    assert found["base_model"] == "owner/base-135M"
    assert found["base_model_relation"] == "adapter"
    assert found["library_name"] == "memretrofit"
    assert found["license"] == "apache-2.0"
    assert found["tags"] == ["memretrofit", "memory", "long-context", "ahn", "drama"]
    (entry,) = found["model-index"]
    (result,) = entry["results"]
    metrics = {metric["type"]: metric["value"] for metric in result["metrics"]}
    assert metrics["memory_gain"] == pytest.approx(0.2, abs=1e-5)
    assert metrics["memory_gain_share"] == pytest.approx(0.2, abs=1e-5)
    assert metrics["nll"] == pytest.approx(3.0, abs=1e-5)


def test_the_hub_reads_the_card():
    data = ModelCard(card()).data
    assert data.base_model == "owner/base-135M"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results["memory_gain"] == pytest.approx(0.2, abs=1e-5)
    assert {result.dataset_name for result in data.eval_results} == {"held-out drama"}


def test_every_section_is_there():
    text = card()
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == [
        "Use",
        "Results",
        "Configuration",
        "How it was trained",
        "Limits and negative results",
        "Provenance",
    ]
    assert "**Memory gain on held-out drama: 0.2000 (0.2000 to 0.2000) nats per token" in text
    assert "20.0 % of what the window loses" in text
    assert "| patched, trained | 3.0000 (" in text
    assert "gap closure: 50.0 % (" in text
    assert "| full attention | 1,234,567 | 3.14 |" in text
    assert "It copies nothing *exactly*." in text
    assert "| SHA-256 of `memory.safetensors` | `" + "0" * 64 in text
    assert "arXiv:2510.07318" in text


def blocks(text, language):
    return re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)


def test_config_and_recipe_read_back_from_their_blocks():
    config, recipe = (yaml.safe_load(body) for _, body in blocks(card(), "yaml"))
    assert config == {**CONFIG, "layers_to_transform": [0, 2]}
    assert recipe == RECIPE


def test_the_use_block_is_python():
    ((_, code),) = blocks(card(name="o'wner/x"), "python")
    compile(code, "card", "exec")
    assert 'memretrofit.from_pretrained("o\'wner/x")' in code


def test_a_recipe_in_text_is_printed_as_it_stands_and_cannot_end_its_block():
    recipe = "# why\na: 1\n```\n## not a section\n```"
    text = card(recipe=recipe)
    assert (("````", recipe)) in blocks(text, "yaml")


def test_the_same_inputs_give_the_same_card():
    assert card() == card()
    assert card(hashes={"b": "1", "a": "2"}) == card(hashes={"a": "2", "b": "1"})


def test_hostile_words_stay_words():
    text = card(
        name=HOSTILE,
        base={"model": HOSTILE, "revision": HOSTILE},
        results={"texts": {HOSTILE: summary()}},
        hashes={HOSTILE: "1"},
        tags=[HOSTILE],
        licence=HOSTILE,
    )
    found = front(text)
    assert found["license"] == HOSTILE
    assert found["tags"][-1] == HOSTILE
    assert found["model-index"][0]["results"][0]["dataset"]["name"] == HOSTILE
    assert "base_model" not in found
    body = text.split("\n---\n", 1)[1]
    for table in re.findall(r"(?:^\|.*\n?)+", body, re.MULTILINE):
        columns = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(columns) == 1
    assert len(re.findall(r"^# ", body, re.MULTILINE)) == 1
    prose = re.sub(
        r"`[^`\n]*`", "", re.sub(r"^```.*?^```", "", body, flags=re.DOTALL | re.MULTILINE)
    )
    assert "<h\\>" in prose
    assert not re.search(r"(?<!\\)[<\[]", prose)


@pytest.mark.parametrize(
    ("base", "named"),
    [("owner/x", True), ("gpt2", True), ("/tmp/x", False), ("./x", False), ("a/b/c", False)],
)
def test_only_a_hub_id_is_named_as_base_model(base, named):
    found = front(card(base={"model": base}))
    assert ("base_model" in found) is named
    assert ("base_model_relation" in found) is named


def test_an_untrained_card_without_results_says_so():
    text = card(recipe=None, results=None, limits="")
    assert "model-index" not in front(text)
    assert "## Results" not in text
    assert "The memory was not trained." in text
    assert "None were recorded." in text


def test_a_gain_that_is_not_above_zero_is_not_sold():
    doubtful = {**summary(), "memory_gain": {"mean": 0.01, "low": -0.01, "high": 0.03}}
    assert "no memory is shown" in card(results={"texts": {"x": doubtful}})
    assert "no memory is shown" not in card()


def test_missing_and_infinite_numbers_are_not_printed_as_numbers():
    broken = {**summary(), "memory_gain": None, "memory_gain_share": None}
    broken["nll"] = {"trained": {"mean": float("nan"), "low": 0.0, "high": 1.0}}
    text = card(results={"texts": {"x": broken}, "cost": {"full": {"cache_bytes": None}}})
    assert "| patched, trained | n/a | 0.0000" in text
    assert "The memory gain was not measured." in text
    assert "| full attention | n/a | n/a |" in text
    assert "model-index" not in front(text)
