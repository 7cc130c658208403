"""A saved conversation of a model that reads in segments goes on as the one that was saved."""

from __future__ import annotations

import copy
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.families import build, tokens
from contract.runs import in_pieces, left_padded
from contract.segment_arms import (
    ARMS,
    every_arm,
    every_live,
    every_method,
    held,
    reading,
    segment_of,
    session,
    text,
)
from safetensors import safe_open
from safetensors.torch import save_file

from memretrofit import load_memory, patch, save_memory
from memretrofit.errors import CheckpointError, StateError
from memretrofit.hub import read_remembered, remembered_ids, verify_memory
from memretrofit.hub.mapped import sample_sha256
from memretrofit.hub.tensors import sha256


@torch.no_grad()
def asked(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return model(ids, past_key_values=cache, **options).logits


@every_live
def test_going_on_after_loading_is_going_on(family: str, arm: str, tmp_path: Path) -> None:
    """To the bit, wherever in a segment it was saved: just begun, in a span, at a border."""
    model, other, ids = reading(family, arm), reading(family, arm), text(arm)
    size = segment_of(arm)
    cuts = {1, size, 2 * size + size // 2, 3 * size + 1} if family == "llama" else {3 * size - 1}
    for cut in sorted(cuts):
        _, cache = in_pieces(model, ids[:, :cut], [2])
        save_memory(cache, model, tmp_path)
        loaded = load_memory(other, tmp_path)
        twin = copy.deepcopy(loaded)
        expected = asked(model, copy.deepcopy(cache), ids[:, cut:])
        assert torch.equal(asked(other, loaded, ids[:, cut:]), expected)
        assert loaded.layers[0].nbytes() > 0
        save_memory(twin, other, tmp_path)  # into the folder that it came from
        again = load_memory(model, tmp_path)
        assert all(torch.equal(x, held(again)[n]) for n, x in held(cache).items())
        assert torch.equal(asked(model, again, ids[:, cut:]), expected)


@every_arm
def test_the_witness_another_text_is_another_answer(arm: str, tmp_path: Path) -> None:
    model, cut = reading("llama", arm), 2 * segment_of(arm)
    _, cache = in_pieces(model, text(arm, seed=1)[:, :cut], [])
    save_memory(cache, model, tmp_path)
    _, own = in_pieces(model, text(arm)[:, :cut], [])
    more = text(arm)[:, cut:]
    found = asked(model, load_memory(model, tmp_path), more)
    assert (found - asked(model, own, more)).abs().max() > 5e-3


@every_arm
def test_rows_of_different_lengths(arm: str, tmp_path: Path) -> None:
    """Rows at different places in their segments: which columns are whose is saved too."""
    model, size = reading("llama", arm), segment_of(arm)
    ids, mask = left_padded([tokens(1, n)[0] for n in (4 * size, 3 * size + 1, 2)], extra=1)
    for cut in range(ids.shape[1] - size, ids.shape[1]):
        _, cache = in_pieces(model, ids[:, :cut], [], mask=mask[:, :cut])
        save_memory(cache, model, tmp_path)
        loaded = load_memory(model, tmp_path)
        expected = asked(model, cache, ids[:, cut:], attention_mask=mask)
        assert torch.equal(asked(model, loaded, ids[:, cut:], attention_mask=mask), expected)


@every_arm
def test_half_precision(arm: str, tmp_path: Path) -> None:
    """The span in bfloat16, the state in float32."""
    model, ids = reading("llama", arm, dtype=torch.bfloat16), text(arm)
    _, cache = in_pieces(model, ids[:, :-3], [])
    save_memory(cache, model, tmp_path)
    loaded = load_memory(model, tmp_path)
    assert torch.equal(asked(model, loaded, ids[:, -3:]), asked(model, cache, ids[:, -3:]))


@every_method
def test_generate_and_beams_go_on_from_one_row(arm: str, tmp_path: Path) -> None:
    """With copies of the row; without them they are refused, by name."""
    model, ids = reading("llama", arm), text(arm, rows=1)
    cut = ids.shape[1] - 3
    _, cache = in_pieces(model, ids[:, :cut], [])
    save_memory(cache, model, tmp_path, input_ids=ids[:, :cut])
    full = torch.cat([remembered_ids(tmp_path), ids[:, cut:]], dim=1)
    for options in ({}, {"num_beams": 3, "num_return_sequences": 3}):
        rows = options.get("num_beams", 1)
        loaded = load_memory(model, tmp_path, repeats=rows)
        options = options | {"max_new_tokens": 10, "do_sample": False}
        found = model.generate(full, past_key_values=loaded, **options)
        assert torch.equal(found, model.generate(ids, **options))
    loaded = load_memory(model, tmp_path)
    with pytest.raises(StateError, match=r"holds 1 rows, and 3 were passed.*repeats=n"):
        asked(model, loaded, ids[:, cut:].repeat(3, 1))
    assert torch.equal(asked(model, loaded, ids[:, cut:]), asked(model, cache, ids[:, cut:]))


@every_method
def test_a_recording_cache_is_cropped_in_its_open_span(arm: str, tmp_path: Path) -> None:
    """What a crop across a border needs is not in a file: it is refused after loading."""
    model, ids = reading("llama", arm), text(arm)
    _, cache = in_pieces(model, ids[:, :3], [])
    cache.activate_past_recording()
    in_pieces(model, ids[:, 3:], [], cache=cache)
    save_memory(cache, model, tmp_path)
    loaded = load_memory(model, tmp_path)
    assert session(loaded).record_past
    with pytest.raises(StateError, match="cannot be undone"):
        loaded.crop(-3 * segment_of(arm))
    question = tokens(2, 9, seed=3)
    for each in (cache, loaded):
        each.crop(-1)
    assert torch.equal(asked(model, loaded, question), asked(model, cache, question))


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A saved conversation of two rows of different lengths."""
    model = reading("llama", "armt")
    ids, mask = left_padded([tokens(1, n)[0] for n in (21, 14)])
    _, cache = in_pieces(model, ids, [], mask=mask)
    save_memory(cache, model, tmp_path / "book.mem", input_ids=ids)
    return tmp_path / "book.mem"


def other_parameters() -> Any:
    model = reading("llama", "armt")
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".memory." in n).add_(1e-3)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: patch(build("mixtral"), ARMS["armt"]), "another model.*model type mixtral"),
        (lambda: patch(build("llama", layers=3), ARMS["armt"]), "another model"),
        (lambda: reading("llama", "armt", dtype=torch.bfloat16), "in float32; .* in bfloat16"),
        (lambda: reading("llama", "armt-late"), r"layers_to_transform: \[1\], recorded None"),
        (lambda: reading("llama", "rmt"), "method: 'rmt', recorded 'armt'"),
        (
            lambda: patch(build("llama"), replace(ARMS["armt"], segment_length=9)),
            "segment_length: 9, recorded 8",
        ),
        (other_parameters, "other parameters of .*from_pretrained"),
    ],
    ids=["architecture", "layers", "dtype", "some layers", "method", "segment", "parameters"],
)
def test_another_model_is_refused(make: Callable[[], Any], words: str, book: Path) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        load_memory(make(), book)


def rewrite(
    book: Path,
    change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None],
) -> None:
    """Change tensors and numbers, and let the record tell the file's new hashes: what is left to
    find them is whether they belong together."""
    record = read_remembered(book)
    path = record.path("layer-000.safetensors")
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers = json.loads(file.metadata()["layer"])
    change(tensors, numbers)
    save_file(tensors, path, {"layer": json.dumps(numbers)})
    found = json.loads((book / "remembered.json").read_text())
    entry = found["files"][path.name]
    entry |= {"bytes": path.stat().st_size, "sha256": sha256(path), "sample": sample_sha256(path)}
    (book / "remembered.json").write_text(json.dumps(found))


def without(name: str) -> Callable[[dict, dict], None]:
    def change(tensors: dict, numbers: dict) -> None:
        del tensors[name]

    return change


def instead(
    name: str, make: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[dict, dict], None]:
    def change(tensors: dict, numbers: dict) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


EDITS = {
    "no counts": (without("counts"), "counts"),
    "no state": (without("state.0.matrix"), "state.0.matrix"),
    "no key": (without("key.1"), "key.1"),
    "a layer more": (lambda t, n: t.update({"key.2": t["key.1"].clone()}), "key.2"),
    "rows": (lambda t, n: t.update({k: x[:1].clone() for k, x in t.items()}), "expected 2 rows"),
    "columns": (instead("value.0", lambda x: x[:, :, 1:]), "value.0"),
    "valid": (instead("valid", lambda x: x[:, 1:]), "valid"),
    "width": (instead("embeds", lambda x: x[..., 1:]), "embeds"),
    "state's size": (instead("state.1.norm", lambda x: x[:, 1:]), "state.1.norm"),
    "state's type": (instead("state.1.norm", lambda x: x.half()), "state.1.norm"),
    "more tokens than were read": (instead("counts", lambda x: x + 99), "damaged: rows of"),
    "numbers": (lambda t, n: n.update(open=99), "do not belong together"),
    "no number": (lambda t, n: n.pop("seen") and None, "no number seen"),
    "another kind": (lambda t, n: n.update(kind="full"), "expected a session layer"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_does_not_belong_together_is_refused(edit: str, book: Path) -> None:
    change, words = EDITS[edit]
    rewrite(book, change)
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        load_memory(reading("llama", "armt"), book)


def test_an_edit_that_changes_nothing_is_loaded(book: Path) -> None:
    """Witness of the test above."""
    rewrite(book, lambda tensors, numbers: None)
    assert load_memory(reading("llama", "armt"), book).get_seq_length() == 21


def test_a_truncated_file_is_refused(book: Path) -> None:
    path = read_remembered(book).path("layer-000.safetensors")
    os.truncate(path, path.stat().st_size - 10)
    for reads in (verify_memory, lambda book: load_memory(reading("llama", "armt"), book)):
        with pytest.raises(CheckpointError, match="bytes, and"):
            reads(book)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model, ids = reading("llama", "armt"), tokens(2, 12)
    _, foreign = in_pieces(reading("llama", "armt"), ids, [])
    plain = build("llama")(ids, use_cache=True).past_key_values
    empty = copy.deepcopy(foreign)
    empty.reset()
    for cache, words in ((foreign, "a Session"), (plain, "a DynamicLayer")):
        with pytest.raises(StateError, match=f"{words} that this patched model did not fill"):
            save_memory(cache, model, tmp_path / "x")
    _, own = in_pieces(model, ids, [])
    own.reset()
    with pytest.raises(StateError, match="holds no token"):
        save_memory(own, model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_size_does_not_grow_with_the_text(tmp_path: Path) -> None:
    model, found = reading("llama", "mplus"), []
    for segments in (12, 20):
        _, cache = in_pieces(model, tokens(1, segments * 8 + 1), [])
        found.append(save_memory(cache, model, tmp_path).nbytes())
    assert [b - a for a, b in itertools.pairwise(found)] == [0]
