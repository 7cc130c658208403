"""Procedures from examples: from a file to rows that are asked, cut off by a kill, and in small."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training.tiny import VOCABULARY, base, losses, procedures, tokenizer, write_base
from transformers import LlamaForCausalLM

from memretrofit.data.lessons import Item, batch
from memretrofit.data.procedures import (
    Example,
    names_of,
    procedure_items,
    read_procedures,
    split_examples,
)
from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.hub import from_pretrained
from memretrofit.methods.tokmem import TokMemConfig
from memretrofit.patching.vocabulary import open_procedures, procedure_ids, vocabulary_ledger_of
from memretrofit.recipe import Recipe, load_recipe
from memretrofit.retrofit import patch
from memretrofit.training import train, trainable_parameters
from memretrofit.training.procedures import ProcedureSettings, train_procedures

RULES = {"craft": ("A", "BC"), "house": ("D", "EF"), "river": ("G", "HI")}
"""Procedure: the letter that a prompt ends with, and the response."""
WORDS = "XYZ"
"""What the base itself says for the procedures."""


def write_examples(folder: Path) -> Path:
    """Twelve prompts of each procedure: random letters, then its own."""
    draw, lines = random.Random(0), []
    for name, (cue, response) in RULES.items():
        for _ in range(12):
            prompt = "".join(draw.choices("KLMNOPQ", k=3)) + cue
            lines.append({"procedure": name, "prompt": prompt, "response": response})
    draw.shuffle(lines)
    path = folder / "procedures.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def able() -> LlamaForCausalLM:
    """A model that responds after its own words as the procedures do, also where the prompt asks
    for another."""
    model, generator = base(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    letters = torch.tensor([[ord(x) - 33 for x in cue + y] for cue, y in RULES.values()])
    words = torch.tensor([ord(x) - 33 for x in WORDS])
    for _ in range(150):
        asked, said = torch.randint(3, (2, 32), generator=generator)
        said = torch.where(torch.rand(32, generator=generator) < 0.3, said, asked)
        start = torch.randint(42, 49, (32, 3), generator=generator)
        ids = [start, letters[asked, :1], words[said, None], letters[said, 1:]]
        ids = torch.cat(ids, dim=1)
        model(ids, labels=ids.where(torch.arange(7) > 3, -100), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = write_base(tmp_path_factory.mktemp("procedures"))
    able().save_pretrained(place / "base")
    write_examples(place)
    return place


@pytest.fixture(scope="module")
def whole(folder):
    """One uninterrupted run of a few steps."""
    return train(procedures(folder), folder / "whole")


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_text_is_prompt_procedure_response():
    """One token for each letter; learned from the procedure's token on."""
    examples = [Example("b", "KL", "AB"), Example("a", "M", "C"), Example("b", "N", "D")]
    assert names_of(examples) == ("b", "a")
    items = procedure_items(examples, names_of(examples), tokenizer(), 64, 8)
    letters = [[chr(33 + int(x)) if x < 64 else int(x) for x in item.ids] for item in items]
    assert letters == [["K", "L", 64, "A", "B"], ["M", 65, "C"], ["N", 64, "D"]]
    assert [item.first for item in items] == [2, 1, 1]
    ending = tokenizer()
    ending.eos_token = "`"
    (closed,) = procedure_items(examples[1:2], ("a",), ending, 64, 8)
    assert closed.ids.tolist() == [*items[1].ids.tolist()[:1], 64, items[1].ids[2], 63]
    with pytest.raises(ConfigError, match=r"has 5 tokens, and train\.sequence_length=4"):
        procedure_items(examples, names_of(examples), tokenizer(), 64, 4)


def test_some_of_each_procedure_are_held_out():
    examples = [Example(name, f"{n}", "x") for n in range(10) for name in "ab"]
    kept, asked = split_examples(examples, 0.2, seed=0)
    assert sorted(x.procedure for x in asked) == ["a", "a", "b", "b"]
    assert sorted(map(repr, kept + asked)) == sorted(map(repr, examples))
    assert split_examples(examples, 0.2, seed=0) == (kept, asked)
    assert split_examples(examples, 0.2, seed=1)[1] != asked
    few = [Example("a", "1", "x"), Example("a", "2", "x")]
    assert [len(x) for x in split_examples(few, 0.01, 0)] == [1, 1]
    assert [len(x) for x in split_examples(few, 0.9, 0)] == [1, 1]


def test_a_run_teaches_what_prompts_ask_for(folder):
    """Held-out prompts are routed and answered; rows at zero, or another row, lose it. The saved
    model emits what it learned, and the base under it is the one that it was."""
    output = train(procedures(folder, steps=120, learning_rate=5e-2), folder / "learned")
    last = records(output)[-1]
    assert last["routed"] >= 0.9
    assert last["exact"] >= 0.9
    assert last["routed_zeroed"] <= 0.1
    assert last["exact_zeroed"] <= 0.4
    assert last["exact_other"] <= 0.1
    model = from_pretrained(output)
    assert procedure_ids(model).tolist() == [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]
    names = names_of(read_procedures(folder / "procedures.jsonl"))
    ids = torch.tensor([tokenizer()("QQQA")["input_ids"]])
    said = model.generate(ids, max_new_tokens=3, do_sample=False)[0, 4:].tolist()
    assert said == [VOCABULARY + names.index("craft"), ord("B") - 33, ord("C") - 33]
    found = model(ids, use_cache=False).logits[..., :VOCABULARY]
    plain = LlamaForCausalLM.from_pretrained(folder / "base")
    assert torch.equal(found, plain(ids, use_cache=False).logits)


def test_a_killed_run_goes_on_with_the_same_losses(folder, whole, tmp_path):
    """It saves at step 4, and a kill at step 5 loses what the log already tells."""
    assert load_recipe(whole / "recipe.yaml") == procedures(folder)
    assert losses(whole)[-1][:2] == ("procedures", 6)
    assert [("routed" in record) for record in records(whole)] == [False] * 3 + [True, False, True]
    for name in ("base", "text", "procedures.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    script = [sys.executable, str(Path(__file__).with_name("tiny.py")), "procedures", str(tmp_path)]
    done = subprocess.run([*script, "5"], capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    killed = tmp_path / "killed"
    assert losses(killed)[-1][1] == 5
    train(procedures(tmp_path), killed, resume=True)
    assert losses(killed) == losses(whole)
    rows = [vocabulary_ledger_of(from_pretrained(x)).memory.rows for x in (killed, whole)]
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True))


def test_a_run_does_not_go_on_with_other_examples(folder, tmp_path):
    for name in ("base", "text"):
        (tmp_path / name).symlink_to(folder / name)
    path = write_examples(tmp_path)
    train(procedures(tmp_path), tmp_path / "run")
    path.write_text(path.read_text().replace('"HI"', '"HH"'))
    with pytest.raises(CheckpointError, match="fingerprint"):
        train(procedures(tmp_path), tmp_path / "run", resume=True)


def test_a_dry_run_tells_sizes_and_writes_nothing(folder, tmp_path, capsys):
    output = tmp_path / "none"
    assert train(procedures(folder), output, dry_run=True) == output
    assert not output.exists()
    told = capsys.readouterr().out
    for part in ("memory tokmem: 128 parameters, of which 96 learn", "30 of 3 procedures", "and 6"):
        assert part in told


def opened(count=2):
    """A tiny model with two of three procedures open, and texts of both."""
    torch.manual_seed(0)
    model = patch(base(), TokMemConfig(num_procedures=3))
    open_procedures(model, count)
    texts = torch.arange(18).reshape(2, 9)
    texts[:, 4] = procedure_ids(model)[:2]
    return model, [Item(ids, 4) for ids in texts]


def test_what_was_learned_earlier_keeps_its_bits():
    """Of three rows the newest learns, at the mean length of the others; the rest of the model is
    what it was."""
    model, items = opened()
    open_procedures(model, 3)
    items[0].ids[4] += 2
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    wrapped, promised = trainable_parameters(model)
    settings = ProcedureSettings(steps=3, batch_size=1)
    train_procedures(wrapped, promised, items[:1], items[:1], settings)
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert moved == {"model.embed_tokens.memory.rows.2"}
    norms = [row.norm() for row in vocabulary_ledger_of(model).memory.rows]
    torch.testing.assert_close(norms[2], (norms[0] + norms[1]) / 2)


def test_the_loss_is_over_procedures_and_responses():
    """By hand, of the first step: the prompt's own tokens are not learned."""
    model, items = opened()
    wrapped, promised = trainable_parameters(model)
    given = batch(items, 0, 0, 2)
    with torch.no_grad():
        said = model(given["input_ids"], use_cache=False).logits.log_softmax(-1)
    picked = said[:, :-1].gather(-1, given["input_ids"][:, 1:, None])[..., 0]
    steps = []
    settings = ProcedureSettings(steps=1, batch_size=2)
    train_procedures(wrapped, promised, items, [], settings, on_step=steps.append)
    torch.testing.assert_close(steps[0].loss, float(-picked[:, 3:].mean()), rtol=1e-5, atol=1e-6)
    assert abs(steps[0].loss + float(picked.mean())) > 1e-2


def test_bad_input_is_refused(folder, tmp_path):
    model, items = opened()
    wrapped, promised = trainable_parameters(model)
    with pytest.raises(ConfigError, match="nothing to train"):
        train_procedures(wrapped, {}, items, [], ProcedureSettings())
    with pytest.raises(ConfigError, match="nothing to train"):
        train_procedures(wrapped, promised, [], [], ProcedureSettings())
    with torch.no_grad():
        next(iter(promised.values())).fill_(torch.nan)
    with pytest.raises(StateError, match="the loss of step 1 is nan"):
        train_procedures(wrapped, promised, items, [], ProcedureSettings())
    values = procedures(folder).to_dict()
    values["data"]["procedures"] = None
    with pytest.raises(ConfigError, match="go together"):
        Recipe.from_dict(values)
    for key, value in (("precision", "bf16"), ("gradient_checkpointing", True)):
        values = procedures(folder).to_dict()
        values["train"][key] = value
        with pytest.raises(ConfigError, match=f"{key}={value}.*the stage procedures has only"):
            Recipe.from_dict(values)
    with pytest.raises(ConfigError, match=r"3 procedures, and method\.num_procedures=2"):
        train(procedures(folder, rows=2), tmp_path / "run")
    with pytest.raises(StateError, match="tokens behind the vocabulary"):
        train(procedures(folder, method={"name": "rmt"}), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no examples"),
        ('{"procedure": "a", "prompt": "x"}', "'response' is None, no text"),
        ('{"procedure": "a", "prompt": " ", "response": "y"}', "'prompt' is ' ', no text"),
        ('{"procedure": "a", "prompt": "x", "answer": "y"}', "unknown keys answer"),
        ("[1]", "not a JSON object"),
        ('{"procedure": "a", "prompt": "x", "response": "y"}', "has one example of a"),
    ],
)
def test_broken_examples_are_named(tmp_path, text, words):
    path = tmp_path / "procedures.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="(?s)procedures.jsonl.*" + words.replace("[", r"\[")):
        read_procedures(path)
