"""Another model, a damaged folder, a full disk, a kill: nothing is read wrong, nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from contract.arms import ARMS, patched
from contract.families import build, tokens
from safetensors import safe_open
from safetensors.torch import save_file
from saved_conversations import FILLED, filled, reader
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer

from memretrofit import load_memory, patch, save_memory, unpatch
from memretrofit.errors import CheckpointError, ConfigError, StateError, UnsupportedModelError
from memretrofit.hub import read_remembered, remembered_ids, verify_memory


def layer(book: Path) -> Path:
    return read_remembered(book).path("layer-000.safetensors")


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A saved conversation of `reader()`."""
    model, folder = reader(), tmp_path / "book.mem"
    save_memory(filled(model), model, folder, text="What was read.", text_name="book.txt")
    return folder


def test_the_record_says_what_it_is(book: Path) -> None:
    record = read_remembered(book)
    assert (record.tokens, record.rows, record.text_name) == (FILLED, 2, "book.txt")
    assert record.text_sha256 is not None
    files = [path for path in book.rglob("*") if path.is_file()]
    assert (
        record.nbytes()
        == sum(x.stat().st_size for x in files) - (book / "remembered.json").stat().st_size
    )
    assert verify_memory(book) == record
    with pytest.raises(CheckpointError, match=r"without its token ids.*input_ids="):
        remembered_ids(book)


def other_weights() -> Any:
    model = reader()
    with torch.no_grad():
        model.lm_head.weight[3] += 1
    return model


def other_parameters() -> Any:
    model = reader()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if ".memory." in n).add_(1e-3)
    return model


def other_window() -> Any:
    config = replace(reader().memretrofit_patch.config, sliding_window=9)
    return patch(build("llama"), config)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: patch(build("mixtral"), ARMS["infllm"]), "another model.*model type mixtral"),
        (other_weights, "another model.*weight fingerprint"),
        (lambda: reader().to(torch.bfloat16), "in float32; this model is in bfloat16.*dtype="),
        (other_window, "sliding_window: 9, recorded 8"),
        (lambda: patched("llama", "window_sinks"), "method: 'window_sinks', recorded"),
        (other_parameters, "other parameters of .*from_pretrained"),
    ],
    ids=["architecture", "weights", "dtype", "window", "method", "parameters"],
)
def test_another_model_is_refused(make: Callable[[], Any], words: str, book: Path) -> None:
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        load_memory(make(), book)


def change_record(**values: Any) -> Callable[[Path], None]:
    def change(book: Path) -> None:
        path = book / "remembered.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def truncate(book: Path) -> None:
    os.truncate(layer(book), layer(book).stat().st_size - 100)


def flip(book: Path) -> None:
    with layer(book).open("r+b") as file:
        file.seek(-40, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def without(book: Path) -> None:
    layer(book).unlink()


def exchange(book: Path) -> None:
    path, second = layer(book), read_remembered(book).path("layer-001.safetensors")
    spare = path.with_suffix(".x")
    path.rename(spare)
    second.rename(path)
    spare.rename(second)


def garbage(book: Path) -> None:
    (book / "remembered.json").write_text("{")


DAMAGE = {
    "truncated": (truncate, r"layer-000\.safetensors has \d+ bytes, and \d+ were saved"),
    "flipped": (flip, r"layer-000\.safetensors is not the file that was saved"),
    "missing": (without, r"layer-000\.safetensors is missing"),
    "exchanged": (exchange, "is not the file that was saved"),
    "no JSON": (garbage, r"remembered\.json is damaged"),
    "schema": (change_record(schema_version=9), "schema_version=9"),
    "tokens": (change_record(tokens=99), "tells of 2 rows of 99 tokens.*2 of 37"),
    "rows": (change_record(rows=3), r"expected 3 rows, found \(2,\)"),
    "many rows": (change_record(rows=10**12), "expected 10{12} rows"),
    "no rows": (change_record(rows=0), "rows: not a whole number above 0"),
    "layers": (change_record(layers=3), "expected 3 layers"),
    "a path": (change_record(data="../data-0123456789ab"), "data: not a folder"),
    "a file": (change_record(files={"../x": {}}), r"\.\./x: not a file entry"),
    "method": (change_record(method={"method": "ahn", "windw": 3}), r"method\.windw"),
    "base": (change_record(base=None), r"base\.weight_fingerprint"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_refused(kind: str, book: Path) -> None:
    damage, words = DAMAGE[kind]
    damage(book)
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        load_memory(reader(), book)


def rewritten(book: Path, place: int, change: Callable[[dict, dict], None]) -> None:
    """A layer's file with other content, of which the record knows: only its sizes tell."""
    path = read_remembered(book).path(f"layer-{place:03d}.safetensors")
    with safe_open(path, "pt") as file:
        content = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        numbers = json.loads(file.metadata()["layer"])
    change(content, numbers)
    save_file(content, path, metadata={"layer": json.dumps(numbers)})
    from memretrofit.hub.memory_record import file_entry

    record = json.loads((book / "remembered.json").read_text())
    record["files"][path.name] = file_entry(path, "0" * 64)
    change_record(files=record["files"])(book)


def resized(name: str, axis: int) -> Callable[[dict, dict], None]:
    def change(content: dict, numbers: dict) -> None:
        held = content[name]
        content[name] = held.narrow(axis, 0, held.shape[axis] - 1).clone()

    return change


LIES = {
    "fewer columns": (resized("key", 2), "key: expected F32"),
    "fewer heads": (resized("value", 1), "value: expected F32"),
    "narrower": (resized("unrotated", 3), "unrotated: expected F32"),
    "a smaller store": (resized("state.0.keys", 3), r"state\.0\.keys: expected F32"),
    "fewer blocks": (resized("state.0.values", 0), r"state\.0\.values: expected F32"),
    "one column more": (lambda c, n: n.update(seen=n["seen"] + 1), "key: expected F32"),
    "counters": (lambda c, n: n.update(first=50), "counters do not belong together"),
    "negative": (lambda c, n: n.update(first=-1), "names no layer"),
    "no counter": (lambda c, n: n.pop("folded"), "no number folded"),
    "another kind": (lambda c, n: n.update(kind="full"), "expected a memory layer, found a full"),
    "lengths": (lambda c, n: c["state.0.lengths"].add_(400), "lengths"),
    "negative lengths": (lambda c, n: c["state.0.lengths"][0].fill_(-1), "lengths"),
    "integers": (lambda c, n: c.update(key=c["key"].int()), "key: expected F32"),
    "an extra": (lambda c, n: c.update(extra=c["key"].clone()), "unexpected: extra"),
    "a missing": (lambda c, n: c.pop("state.0.slots"), r"missing: state\.0\.slots"),
}


EVICTION_LIES = {
    "no such count": (lambda c, n: c["state.4"].add_(1), "has .* places for .*expected"),
    "a fraction": (lambda c, n: c["state.4"][1].sub_(0.5), "has .* places for"),
    "fewer values": (resized("state.1", 2), "has .* places for .*expected"),
    "fewer heads": (resized("state.0", 1), r"state\.0: expected F32"),
}


@pytest.mark.parametrize("lie", EVICTION_LIES)
def test_counts_that_do_not_fit_are_refused(lie: str, tmp_path: Path) -> None:
    change, words = EVICTION_LIES[lie]
    model = patched("llama", "eviction")
    save_memory(filled(model), model, tmp_path)
    rewritten(tmp_path, 1, change)
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        load_memory(model, tmp_path)


@pytest.mark.parametrize("lie", LIES)
def test_sizes_that_do_not_fit_are_refused(lie: str, tmp_path: Path) -> None:
    change, words = LIES[lie]
    model = patched("llama", "infllm")
    save_memory(filled(model), model, tmp_path)
    rewritten(tmp_path, 1, change)
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        load_memory(model, tmp_path)


def test_a_folder_without_a_conversation(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"No remembered\.json in .*save_memory"):
        load_memory(reader(), tmp_path)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model, stranger = patched("llama", "infllm"), patched("llama", "infllm")
    cache = filled(model)
    with pytest.raises(StateError, match="this patched model did not fill"):
        save_memory(cache, stranger, tmp_path / "x")
    with pytest.raises(StateError, match="did not fill"):
        save_memory(DynamicCache(config=model.config), model, tmp_path / "x")
    with pytest.raises(UnsupportedModelError, match="A dict is no cache"):
        save_memory({}, model, tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"shape \(2, 5\), and the cache holds 2 rows of 37"):
        save_memory(cache, model, tmp_path / "x", input_ids=tokens(2, 5))
    cache.reset()
    with pytest.raises(StateError, match="holds no token"):
        save_memory(cache, model, tmp_path / "x")
    with pytest.raises(StateError, match="not patched"):
        save_memory(filled(model), unpatch(model), tmp_path / "x")
    with pytest.raises(StateError, match="not patched"):
        load_memory(model, tmp_path / "x")
    partly = patch(build("llama"), replace(ARMS["infllm"], layers_to_transform=(1,)))
    cache = filled(partly)
    cache.layers[0] = DynamicIndexedLayer()
    with pytest.raises(UnsupportedModelError, match="Layer 0 of the cache is a DynamicInd"):
        save_memory(cache, partly, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "book.mem").write_text("mine")
    model = reader()
    with pytest.raises(CheckpointError, match=r"Saving to .*book\.mem failed"):
        save_memory(filled(model), model, tmp_path / "book.mem")
    assert (tmp_path / "book.mem").read_text() == "mine"


WRITES = 5
"""Two layers, the record, the folder with them, and the folder in which the record then counts."""


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize("after", range(WRITES))
def test_a_full_disk_leaves_what_was_there(
    after: int, first: bool, book: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each write of the save in turn finds no room."""
    if first:
        shutil.rmtree(book)
    left, real = [after], os.fsync
    model = reader()
    cache = filled(model, length=20)

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*Make room"):
        save_memory(cache, model, book)
    done = after == WRITES - 1
    if first and not done:
        assert not book.exists()
        return
    assert load_memory(model, book).get_seq_length() == (20 if done else FILLED)
    assert len(list(book.glob("data-*"))) == (1 if first or not done else 2)


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[1:3]
from saved_conversations import filled, reader
from memretrofit import save_memory
from memretrofit.hub import memory_file
real, count = memory_file.write_pieces, [int(sys.argv[4])]
def write(*args):
    count[0] -= 1
    if count[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
memory_file.write_pieces = write
model = reader()
save_memory(filled(model, length=20), model, sys.argv[3])
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_real_kill(book: Path) -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(here.parent), str(here), str(book), "1"]
    done = subprocess.run(command, check=False, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len(list(book.glob("data-*"))) == 2  # it really died in the middle
    model = reader()
    assert load_memory(model, book).get_seq_length() == FILLED
    save_memory(filled(model, length=20), model, book)
    assert load_memory(model, book).get_seq_length() == 20
    assert len(list(book.glob("data-*"))) == 1
