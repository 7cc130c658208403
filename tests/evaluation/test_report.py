"""A saved model is measured on held-out text, and the report holds every arm."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from memretrofit.evaluation import ARMS, evaluate
from memretrofit.evaluation.report import held_out_rows
from memretrofit.recipe import load_recipe
from memretrofit.training import train

WORDS = [f"w{number}" for number in range(60)]
RECIPE = """
base: {{model: {base}}}
method: {{name: lolcats, sliding_window: 8, num_sink_tokens: 2}}
train:
  stages: [transfer]
  transfer: {{steps: 3, batch_size: 2}}
  window_range: [6, 8]
  sink_range: [2]
  sequence_length: 48
data:
  sources: [{train}]
  held_out_sources: [{other}]
  held_out: 0.3
evaluate: {{rows: 4, windows: [10], bootstrap_samples: 50}}
"""


def write_text(folder, seed):
    folder.mkdir()
    random = torch.Generator().manual_seed(seed)
    for number in range(6):
        words = torch.randint(0, len(WORDS), (200,), generator=random)
        (folder / f"{number}.txt").write_text(" ".join(WORDS[i] for i in words))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny model, trained for three steps, and its recipe."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, "?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(
        folder / "base"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(WORDS) + 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    text = RECIPE.format(
        base=folder / "base",
        train=write_text(folder / "text", 1),
        other=write_text(folder / "other", 2),
    )
    (folder / "recipe.yaml").write_text(text)
    recipe = load_recipe(folder / "recipe.yaml")
    train(recipe, folder / "out")
    return folder / "out", recipe


def test_the_report_has_every_arm_on_every_text(run):
    output, recipe = run
    results, scores = evaluate(output, recipe)
    saved = json.loads((output / "report.json").read_text())
    assert set(saved["texts"]) == {
        "held-out",
        "held-out, passage repeated",
        "other domain",
        "other domain, passage repeated",
    }
    for summary in saved["texts"].values():
        assert set(summary["nll"]) == set(ARMS) - {"zeroed"}  # it has a window
        assert summary["nll"]["untrained"]["mean"] == pytest.approx(
            summary["nll"]["window"]["mean"], abs=1e-4
        )
        assert summary["memory_gain"]["mean"] == pytest.approx(
            summary["nll"]["shuffled"]["mean"] - summary["nll"]["trained"]["mean"], abs=1e-6
        )
    assert saved["windows"]["10"]["memory_gain"] is not None
    assert saved["cost"]["trained"]["cache_bytes"] > 0
    assert saved["trained_parameters"] == results["trained_parameters"] > 0
    for picture in ("nll.png", "cache.png", "loss.png"):
        assert (output / picture).read_bytes().startswith(b"\x89PNG")
    assert (
        "Memory gain" in (output / "README.md").read_text()
        or "memory gain" in (output / "README.md").read_text()
    )

    again, _ = evaluate(output, recipe, output / "beside" / "report.json", known=scores)
    for text, summary in again["texts"].items():
        assert summary["nll"]["trained"] == results["texts"][text]["nll"]["trained"]
        assert summary["nll"]["full"] == results["texts"][text]["nll"]["full"]
        assert "untrained" not in summary["nll"]


def test_held_out_rows_share_no_document_with_training(run):
    from memretrofit.data import load_documents, split_documents
    from memretrofit.training.row_stages import training_rows

    _, recipe = run
    tokenizer = PreTrainedTokenizerFast.from_pretrained(recipe.base.model)
    texts = held_out_rows(recipe, tokenizer)
    documents = [d for source in recipe.data.sources for d in load_documents(source)]
    kept, held = split_documents(documents, recipe.data.held_out, recipe.train.seed)
    assert {d.title for d in kept}.isdisjoint({d.title for d in held})
    seen = {tuple(row["input_ids"].tolist()) for row in training_rows(recipe, tokenizer)}
    assert seen
    assert all(tuple(row.tolist()) not in seen for rows, _ in texts.values() for row in rows)
