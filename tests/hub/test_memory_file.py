"""A saved conversation goes on as the one that was saved, and is refused where it would not."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.arms import ARMS, every_arm, patched
from contract.families import build, tokens
from contract.runs import apart
from safetensors import safe_open
from saved_conversations import FILLED, LENGTH, asked, filled
from tolerances import REORDERED, WRONG
from transformers import DynamicCache

from memretrofit import load_memory, patch, save_memory
from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.hub import read_remembered, remembered_ids, verify_memory
from memretrofit.hub.mapped import Written, map_tensors, write_pieces
from memretrofit.hub.tensors import read_header


@every_arm
def test_going_on_after_loading_is_going_on(arm: str, tmp_path: Path) -> None:
    """Twice, on copies, and saved again from what was loaded, into the folder it is mapped from."""
    model, other = patched("llama", arm), patched("llama", arm)
    cache = filled(model)
    save_memory(cache, model, tmp_path)
    loaded = load_memory(other, tmp_path)
    twin = copy.deepcopy(loaded)
    expected = asked(model, copy.deepcopy(cache))
    assert torch.equal(asked(other, loaded), expected)
    save_memory(twin, other, tmp_path)
    assert torch.equal(asked(other, twin), expected)
    assert torch.equal(asked(model, load_memory(model, tmp_path)), expected)
    # the witness: another text is another answer
    foreign = filled(model, cache=filled(model, length=1))
    assert not torch.equal(asked(model, foreign), expected)


@every_arm
def test_one_row_answers_a_batch_of_questions(arm: str, tmp_path: Path) -> None:
    model = patched("llama", arm)
    save_memory(filled(model, rows=1), model, tmp_path)
    questions = tokens(3, 9, seed=5)
    together = load_memory(model, tmp_path)
    together.batch_repeat_interleave(3)
    found = asked(model, together, questions)
    for row in range(3):
        alone = asked(model, load_memory(model, tmp_path), questions[row : row + 1])
        assert (found[row] - alone[0]).abs().max() < 2e-4
        assert (found[row] - found[row - 1]).abs().max() > 5e-3


@every_arm
def test_generate_goes_on(arm: str, tmp_path: Path) -> None:
    model = patched("llama", arm)
    ids = tokens(2, LENGTH)
    cache = filled(model)
    save_memory(cache, model, tmp_path, input_ids=ids[:, :FILLED])
    full = torch.cat([remembered_ids(tmp_path), ids[:, FILLED:]], dim=1)
    assert torch.equal(full, ids)
    options = {"max_new_tokens": 6, "do_sample": False}
    found = model.generate(full, past_key_values=load_memory(model, tmp_path), **options)
    assert torch.equal(found, model.generate(full, past_key_values=cache, **options))


@pytest.mark.parametrize("length", [1, 8, 11, 12])
@every_arm
def test_a_short_text(arm: str, length: int, tmp_path: Path) -> None:
    """Nothing has left the window yet, or just one token."""
    model = patched("llama", arm)
    cache = filled(model, length=length)
    save_memory(cache, model, tmp_path)
    question = tokens(2, LENGTH)[:, length:]
    loaded = load_memory(model, tmp_path)
    assert torch.equal(asked(model, loaded, question), asked(model, cache, question))


@pytest.mark.parametrize("configured", [True, False], ids=["configured", "plain"])
@pytest.mark.parametrize("layers", [None, (2,)], ids=["full layers", "one layer"])
def test_layers_that_the_model_has_anyway(
    layers: tuple[int, ...] | None, configured: bool, tmp_path: Path
) -> None:
    """Sliding layers, and full ones that were not patched."""
    model = build("gemma3", layers=3)
    patch(model, replace(ARMS["infllm"], layers_to_transform=layers))
    cache = filled(model, cache=DynamicCache(**({"config": model.config} if configured else {})))
    save_memory(cache, model, tmp_path)
    loaded = load_memory(model, tmp_path)
    assert [type(x) for x in loaded.layers] == [type(x) for x in cache.layers]
    assert torch.equal(asked(model, loaded), asked(model, cache))


def test_rows_of_different_lengths(tmp_path: Path) -> None:
    model = patched("llama", "infllm")
    ids = tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def read(low: int, high: int, cache: Any) -> Any:
        with torch.no_grad():
            return model(
                ids[:, low:high],
                attention_mask=mask[:, :high],
                position_ids=positions[:, low:high],
                past_key_values=cache,
                use_cache=True,
            )

    cache = read(0, FILLED, None).past_key_values
    save_memory(cache, model, tmp_path)
    loaded = load_memory(model, tmp_path)
    expected = read(FILLED, LENGTH, cache).logits
    assert torch.equal(read(FILLED, LENGTH, loaded).logits, expected)


def test_what_a_draft_may_take_back_is_kept(tmp_path: Path) -> None:
    model = patched("llama", "infllm")
    cache = DynamicCache(config=model.config)
    filled(model, length=20, cache=cache)
    cache.activate_past_recording()
    asked(model, cache, tokens(2, 30)[:, 20:])
    save_memory(cache, model, tmp_path)
    loaded = load_memory(model, tmp_path)
    for each in (cache, loaded):
        each.crop(-7)
    question = tokens(2, 9, seed=3)
    assert torch.equal(asked(model, loaded, question), asked(model, cache, question))


OTHER_PROCESS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from contract.arms import patched
from contract.families import tokens
from memretrofit import load_memory
for arm in ("ahn", "infllm"):
    model = patched("llama", arm)
    with torch.no_grad():
        cache = load_memory(model, f"{sys.argv[2]}/{arm}")
        torch.save(model(tokens(2, 60)[:, 37:], past_key_values=cache).logits,
                   f"{sys.argv[2]}/{arm}.pt")
"""


def test_another_process(tmp_path: Path) -> None:
    expected = {}
    for arm in ("ahn", "infllm"):
        model = patched("llama", arm)
        save_memory(filled(model), model, tmp_path / arm)
        expected[arm] = asked(model, filled(model))
    paths = [str(Path(__file__).parents[1]), str(tmp_path)]
    command = [sys.executable, "-c", OTHER_PROCESS, *paths]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    for arm, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{arm}.pt"), logits)


def test_a_large_file_is_sampled_and_can_be_verified(tmp_path: Path) -> None:
    """An edit between the samples is found by `verify_memory`; one of the header at once."""
    model = patch(build("llama"), replace(ARMS["infllm"], sliding_window=8))
    ids = tokens(40, 240)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    save_memory(cache, model, tmp_path)
    path = read_remembered(tmp_path).path("layer-000.safetensors")
    assert path.stat().st_size > 1 << 20
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 126)  # between the first page and the second sample
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    load_memory(model, tmp_path)
    with pytest.raises(CheckpointError, match="is not the file that was saved"):
        verify_memory(tmp_path)


def test_pieces_are_one_tensor(tmp_path: Path) -> None:
    """Any cut along the first axis gives the same file, which safetensors reads."""
    long = torch.randn(37, 3, 5)
    parts = {"a": Written.joined(list(long.split(5))), "b": Written.whole(torch.tensor(3))}
    odd = {"c": Written.whole(torch.ones(3, dtype=torch.bool))}
    digest = write_pieces(tmp_path / "cut", parts | odd, {"x": "y"})
    whole = {"a": Written.whole(long), "b": Written.whole(torch.tensor(3))}
    assert write_pieces(tmp_path / "whole", whole | odd, {"x": "y"}) == digest
    mapped = map_tensors(tmp_path / "cut", read_header(tmp_path / "cut"))
    with safe_open(tmp_path / "cut", "pt") as file:
        assert file.metadata()["x"] == "y"
        for name in ("a", "b", "c"):
            assert torch.equal(mapped[name], file.get_tensor(name))
    mapped["a"].zero_()
    again = map_tensors(tmp_path / "cut", read_header(tmp_path / "cut"))
    assert torch.equal(again["a"], long)


@pytest.mark.parametrize("layers", [None, (1,)], ids=["all layers", "one layer"])
def test_latents_are_saved(layers: tuple[int, ...] | None, tmp_path: Path) -> None:
    """MLA: what the cache keeps is not what attention sees."""

    def latent(**changes: Any) -> Any:
        return patch(build("deepseek_v3"), replace(ARMS["window_sinks"], **changes))

    model = latent(layers_to_transform=layers)
    cache = filled(model)
    assert cache.layers[1].keys.shape[1] == 1  # of four heads
    save_memory(cache, model, tmp_path)
    other = latent(layers_to_transform=layers)
    assert torch.equal(asked(other, load_memory(other, tmp_path)), asked(model, cache))


def test_beams_go_on_from_one_row(tmp_path: Path) -> None:
    """As they do from the text itself; without copies of the row they are refused."""
    model, ids = patched("llama", "infllm"), tokens(1, LENGTH)
    save_memory(filled(model, rows=1), model, tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "num_return_sequences": 3}
    loaded = load_memory(model, tmp_path, repeats=3)
    found = model.generate(ids, past_key_values=loaded, **options)
    assert torch.equal(found, model.generate(ids, **options))
    assert len(found.unique(dim=0)) == 3  # witness: they did part
    with pytest.raises(StateError, match=r"holds 1 rows, and 3 were passed.*repeats=n"):
        model.generate(ids, past_key_values=load_memory(model, tmp_path), **options)
    with pytest.raises(ConfigError, match="repeats=0"):
        load_memory(model, tmp_path, repeats=0)


@pytest.mark.parametrize("scorer", ["snapkv", "h2o"])
@pytest.mark.parametrize("budget", [999, 0.6], ids=["tokens", "share"])
def test_empty_places_are_not_saved(scorer: str, budget: float, tmp_path: Path) -> None:
    """A budget of tokens has its room from the start; a file has what is held in some row."""
    model = patch(build("llama"), replace(ARMS["eviction"], scorer=scorer, budget=budget))
    cache = filled(model)
    save_memory(cache, model, tmp_path)
    record = read_remembered(tmp_path)
    specs = read_header(record.path("layer-000.safetensors")).specs
    kept, new, left = (int(n) for n in cache.layers[0].state[4][0])
    assert 0 < new < ARMS["eviction"].interval
    assert kept + new <= left == FILLED - 8 - 3  # beyond window and sinks
    found = [specs[f"state.{n}"].shape[2] for n in range(4)]
    assert found == [kept, kept, new, new]
    assert ("state.7" in specs) == (scorer == "h2o")
    if scorer == "h2o":
        assert specs["state.7"].shape[2] == kept + new
    loaded = load_memory(model, tmp_path)
    expected = asked(model, cache)
    assert apart(asked(model, loaded), expected) < REORDERED
    lost = load_memory(model, tmp_path)
    for layer in lost.layers:
        layer.state[3].zero_()
    assert apart(asked(model, lost), expected) > WRONG
