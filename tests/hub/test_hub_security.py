"""Files of strangers: no code of theirs runs, nothing outside their folder is read, nothing is
allocated that they only claim, and whatever was changed is a typed error or makes no difference."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from saved_models import IDS, is_untouched, llama, logits, memory_for, randomise

from memretrofit import from_pretrained, load_memory, patch, save_memory, save_pretrained, unpatch
from memretrofit.errors import CheckpointError, MemretrofitError
from memretrofit.hub import load_base, open_bank, write_bank
from memretrofit.hub.mapped import sample_sha256
from memretrofit.hub.tensors import read_header, read_tensors, sha256
from memretrofit.modules.row_sources import HeldRows

pytestmark = [
    # peft asks Transformers by a name that Transformers is about to drop
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is depr:FutureWarning"),
    # peft warns of fields that it does not know, and of adapters that find no layer
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Payload:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_the_payload_runs_where_a_pickle_is_opened(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "mark")))
    assert (tmp_path / "mark").exists()


PICKLES = ("memory.bin", "memory.pt", "pytorch_model.bin", "adapter_model.bin", "training_args.bin")


@torch.no_grad()
def _adapted(model: Any) -> Any:
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_()
    return model


def _agree(folder: Path) -> None:
    """Record the hashes that the files have now, as a forger would."""
    path = folder / "memory_config.json"
    values = json.loads(path.read_text())
    for name in values["files"]:
        values["files"][name] = sha256(folder / name)
    path.write_text(json.dumps(values))


def test_no_pickle_is_opened(base: Path, tmp_path: Path) -> None:
    """Neither beside the memory, nor in its place, nor in that of the adapter or of the base."""
    mark, folder = tmp_path / "mark", tmp_path / "memory"
    save_pretrained(_adapted(patch(load_base(base), memory_for())), folder)
    payload = pickle.dumps(Payload(mark))
    for name in PICKLES:
        (folder / name).write_bytes(payload)
    from_pretrained(folder)
    for name in ("adapter_model.safetensors", "memory.safetensors"):
        genuine = (folder / name).read_bytes()
        (folder / name).write_bytes(payload)
        _agree(folder)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            from_pretrained(folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            from_pretrained(folder)
        (folder / name).write_bytes(genuine)
        _agree(folder)
    assert not mark.exists()


def test_a_recorded_base_is_read_from_safetensors(saved: Path, base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "base"))
    torch.save(load_base(base).state_dict(), other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    path = saved / "memory_config.json"
    values = json.loads(path.read_text())
    values["base"]["model"] = str(other)
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*safetensors"):
        from_pretrained(saved)
    # the witness: the user may say so
    assert torch.equal(
        logits(from_pretrained(saved, use_safetensors=False)),
        logits(from_pretrained(saved, base=base)),
    )


@pytest.mark.parametrize(
    "name", ["os.system", "antigravity", "../ahn", "__init__", "AHNConfig", "", None]
)
def test_a_method_is_one_of_ours(name: Any, saved: Path) -> None:
    path = saved / "memory_config.json"
    values = json.loads(path.read_text())
    values["method"]["method"] = name
    path.write_text(json.dumps(values))
    before = {*sys.modules}
    with pytest.raises(CheckpointError, match="method"):
        from_pretrained(saved, base=llama())
    assert {*sys.modules} == before


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "os.system"},
        {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "fly"}},
        {"r": 2**45},
        {"rank_pattern": {"q_proj": 2**45}},
        {"target_modules": "["},
    ],
    ids=str,
)
def test_an_adapters_config_names_no_code_and_no_room(
    change: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    save_pretrained(_adapted(patch(load_base(base), memory_for())), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    _agree(tmp_path)
    model = llama()
    if "auto_mapping" in change:
        from_pretrained(tmp_path, base=model)
        assert "antigravity" not in sys.modules
        return
    with pytest.raises(CheckpointError, match=r"adapter_config\.json does not fit"):
        from_pretrained(tmp_path, base=model)
    assert is_untouched(model)


@pytest.mark.parametrize("shape", [[2**62], [2**70], [0, 2**70], [2**40, 2**40], [1] * 1000])
def test_a_claim_is_not_allocated(shape: list[int], tmp_path: Path) -> None:
    """Also not one of no bytes at all, in a file that agrees."""
    size = 0 if 0 in shape else 4
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}
    text = json.dumps({"x": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(CheckpointError, match="damaged"):
        _checked(path)


def _checked(path: Path) -> Any:
    return read_header(path) and read_tensors(path)


OUTSIDE = ["../outside", "/etc/passwd", "data-0123456789ab/../../outside", "..", "", "a\0b"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_path_in_a_record_stays_inside(name: str, saved: Path, tmp_path: Path) -> None:
    """Of a memory, a conversation and a bank."""
    session, bank = _session(tmp_path), _bank(tmp_path)
    edits: list[tuple[Path, Callable[[Any], Any], Callable[[], Any]]] = [
        (
            saved / "memory_config.json",
            lambda v: v["files"].update({name: "0" * 64}),
            lambda: from_pretrained(saved, base=llama()),
        ),
        (
            session.folder / "remembered.json",
            lambda v: v.update(data=name),
            lambda: session.read(session.folder),
        ),
        (
            session.folder / "remembered.json",
            lambda v: v["files"].update({name: v["files"]["layer-000.safetensors"]}),
            lambda: session.read(session.folder),
        ),
        (
            bank.folder / "bank.safetensors.index.json",
            lambda v: v["weight_map"].update(dict.fromkeys(v["weight_map"], name)),
            lambda: bank.read(bank.folder),
        ),
    ]
    for path, change, read in edits:
        text = path.read_text()
        values = json.loads(text)
        change(values)
        path.write_text(json.dumps(values))
        with pytest.raises(CheckpointError):
            read()
        path.write_text(text)
        if path.parent != saved:
            read()  # the witness: it was that change


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["../x", "/etc/passwd", "os.system", "F32", "0" * 64, 0, -1]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def _json_mutant(draw: Any, content: bytes) -> bytes:
    values = json.loads(content)
    places = list(_places(values))
    for _ in range(draw(st.integers(1, 2))):
        container, key = places[draw(st.integers(0, len(places) - 1))]
        if draw(st.booleans()) or isinstance(container, list):
            container[key] = draw(VALUES)
        else:
            container.pop(key, None)
    return json.dumps(values).encode()


def _byte_mutant(draw: Any, content: bytes) -> bytes:
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        # the first bytes are lengths and structure
        place = draw(st.integers(0, min(len(found), 400)) | st.integers(0, len(found)))
        what = draw(st.binary(max_size=9))
        found[place : place + draw(st.integers(0, 9))] = what
    return bytes(found[: draw(st.sampled_from([None, None, None, len(found) // 2]))])


def _header_mutant(draw: Any, content: bytes) -> bytes:
    (length,) = struct.unpack("<Q", content[:8])
    text = _json_mutant(draw, content[8 : 8 + length])
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


@dataclass
class Target:
    """A folder of ours, and what is read of it."""

    folder: Path
    files: list[str]
    agree: Callable[[Path], None] | None
    read: Callable[[Path], Any]
    """Tensors to compare."""


def _mutate(draw: Any, target: Target, folder: Path) -> bool:
    """Change one file; whether the record was made to agree."""
    path = folder / draw(st.sampled_from(target.files))
    content = path.read_bytes()
    kinds = [_byte_mutant, _json_mutant if path.suffix == ".json" else _header_mutant]
    path.write_bytes(draw(st.sampled_from(kinds))(draw, content))
    if target.agree is None:
        return True  # nothing says what the rows of a bank are
    if not draw(st.booleans()):
        return False
    try:
        target.agree(folder)
    except Exception:  # the record itself is what was changed
        return False
    return True


def _memory(folder: Path) -> Target:
    base = llama()
    save_pretrained(_adapted(randomise(patch(llama(), memory_for()), 1)), folder / "memory")

    def read(place: Path) -> Any:
        try:
            loaded = from_pretrained(place, base=base)
        except MemretrofitError:
            assert is_untouched(base)
            raise
        found = [logits(loaded)]
        if loaded is not base:
            loaded.unload()
            vars(base).pop("peft_config", None)
        unpatch(base)
        for parameter in base.parameters():
            parameter.requires_grad_(True)
        return found

    names = [
        "memory_config.json",
        "memory.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    return Target(folder / "memory", names, _agree, read)


def _session(folder: Path) -> Target:
    model = randomise(patch(llama(), memory_for()), 1)
    with torch.no_grad():
        cache = model(IDS[:, :30], use_cache=True).past_key_values
    record = save_memory(cache, model, folder / "book.mem", input_ids=IDS[:, :30])

    def agree(place: Path) -> None:
        path = place / "remembered.json"
        values = json.loads(path.read_text())
        for name, entry in values["files"].items():
            file = place / values["data"] / name
            told = {"sha256": sha256(file), "sample": sample_sha256(file)}
            entry.update(told, bytes=file.stat().st_size)
        path.write_text(json.dumps(values))

    @torch.no_grad()
    def read(place: Path) -> Any:
        return [model(IDS[:, 30:], past_key_values=load_memory(model, place)).logits]

    names = ["remembered.json", *(f"{record.data}/{name}" for name in record.files)]
    return Target(folder / "book.mem", names, agree, read)


def _bank(folder: Path) -> Target:
    rows = torch.arange(6 * 4, dtype=torch.float32).view(6, 4)
    write_bank({"units": HeldRows(rows)}, folder / "bank", shard_bytes=64)

    def read(place: Path) -> Any:
        tables = open_bank(place)
        return [table.read(torch.arange(table.rows)) for table in tables.values()]

    names = sorted(path.name for path in (folder / "bank").iterdir())
    return Target(folder / "bank", names, None, read)


def _same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("make", "examples"), [(_memory, 200), (_session, 150), (_bank, 150)])
def test_mutants(make: Callable[[Path], Target], examples: int, tmp_path: Path) -> None:
    target = make(tmp_path)
    expected = target.read(target.folder)
    outcomes: set[str] = set()

    @settings(max_examples=examples)
    @given(st.data())
    def one(data: Any) -> None:
        folder = Path(shutil.copytree(target.folder, tmp_path / "mutant"))
        try:
            agreed = _mutate(data.draw, target, folder)
            found = target.read(folder)
        except MemretrofitError as error:
            outcomes.add(type(error).__name__)
        else:
            outcomes.add("loaded")
            # where hashes agree, other values are what was saved
            assert agreed or _same(found, expected)
        finally:
            shutil.rmtree(folder)

    one()
    assert {"loaded", "CheckpointError"} <= outcomes
    assert _same(target.read(target.folder), expected)
