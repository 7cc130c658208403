"""The Hub, through its real client: what is sent, and how a refusal reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub_client import TOKEN, online
from hub_server import hub
from huggingface_hub import constants
from saved_models import llama, memory_for, randomise

from memretrofit import from_pretrained, patch, push_to_hub
from memretrofit.errors import CheckpointError, StateError
from memretrofit.hub import load_base, read_record
from memretrofit.retrofit import memory_parameters


@pytest.fixture
def model(base: Path) -> Any:
    return randomise(patch(load_base(base), memory_for()), seed=1)


# huggingface_hub sends large files by an argument that httpx is about to rename
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_push_sends_one_commit(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stale = {"adapter_model.safetensors": b"old", "delta.safetensors": b"old", "notes.md": b"mine"}
    with hub() as server:
        repo = server.add("owner/name", stale)
        online(monkeypatch, server.address, tmp_path)
        address = push_to_hub(
            model, "owner/name", token=TOKEN, recipe={"steps": 3}, base_model="owner/base"
        )
    assert address == f"{server.address}/owner/name/commit/{repo.refs['main']}"
    assert server.count("/commit/") == 1
    # files of an earlier version must not stay beside a memory that has none
    assert {*repo.files} == {"memory_config.json", "memory.safetensors", "README.md", "notes.md"}
    assert "from_pretrained('owner/name')" in repo.files["README.md"].decode()
    folder = tmp_path / "sent"
    folder.mkdir()
    for name, content in repo.files.items():
        (folder / name).write_bytes(content)
    assert read_record(folder).recipe == {"steps": 3}
    assert read_record(folder).base.model == "owner/base"
    loaded = memory_parameters(from_pretrained(folder, base=llama()))
    assert all(loaded[name].equal(x) for name, x in memory_parameters(model).items())


@pytest.mark.parametrize(
    ("status", "remedy"), [(401, "hf auth login"), (403, "write access"), (404, "Check the name")]
)
def test_a_refusal_says_what_to_do_and_keeps_the_token(
    status: int, remedy: str, model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with hub(status) as server:
        online(monkeypatch, server.address, tmp_path)
        with pytest.raises(CheckpointError, match=remedy) as pushed:
            push_to_hub(model, "owner/name", token=TOKEN, base_model="owner/base")
        with pytest.raises(CheckpointError) as pulled:
            from_pretrained("owner/name", token=TOKEN)
    assert server.requests
    for error in (pushed.value, pulled.value):
        assert "owner/name" in str(error)
        assert TOKEN not in str(error)
        # nor in a traceback: the client's own error would carry the request
        assert error.__cause__ is None
        assert error.__suppress_context__


def test_no_connection(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online(monkeypatch, "http://127.0.0.1:9", tmp_path)
    with pytest.raises(CheckpointError, match=r"Cannot push to 'owner/name'.*Check the connection"):
        push_to_hub(model, "owner/name", token=TOKEN, base_model="owner/base")
    with pytest.raises(CheckpointError, match=r"'owner/name'.*looked for on the Hub.*connection"):
        from_pretrained("owner/name")


def test_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    online(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE"):
        from_pretrained("owner/name")


@pytest.mark.parametrize("name", ["/no/such/folder", "../no/such", "a/b/c", ""])
def test_neither_a_folder_nor_a_repository(name: str) -> None:
    with pytest.raises(CheckpointError, match="Pass a folder that save_pretrained wrote"):
        from_pretrained(name)


def test_nothing_is_sent_of_a_model_that_cannot_be_saved(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    next(iter(memory_parameters(model).values())).data.fill_(float("nan"))
    with hub() as server:
        online(monkeypatch, server.address, tmp_path)
        with pytest.raises(StateError, match="nan"):
            push_to_hub(model, "owner/name", token=TOKEN, base_model="owner/base")
    assert not server.requests


def test_storage_that_does_not_answer(
    model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the way that the client prefers for large files, which the stand-in does not have."""
    with hub() as server:
        online(monkeypatch, server.address, tmp_path)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        with pytest.raises(CheckpointError, match="Cannot push to 'owner/name'") as caught:
            push_to_hub(model, "owner/name", token=TOKEN, base_model="owner/base")
    assert server.count("/xet-write-token/") == 1
    assert not server.count("/commit/")
    assert TOKEN not in str(caught.value)
    assert caught.value.__cause__ is None
