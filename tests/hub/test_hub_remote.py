"""The Hub, through its real client: what is sent, and how a refusal reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hub_server import Server, hub
from huggingface_hub import constants
from saved_models import memory_for, randomise

from memretrofit import from_pretrained, patch, push_to_hub
from memretrofit.errors import CheckpointError, StateError
from memretrofit.hub import load_base, read_record
from memretrofit.retrofit import memory_parameters

TOKEN = "hf_secretsecretsecretsecretsecretsecr"


@pytest.fixture
def model(base: Path) -> Any:
    return randomise(patch(load_base(base), memory_for()), seed=1)


def online(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Point the client at `address`, and at a cache of its own."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def test_push_sends_one_commit(model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stale = {"adapter_model.safetensors": b"old", "notes.md": b"mine"}
    with hub(files=stale) as server:
        online(monkeypatch, server.address, tmp_path)
        address = push_to_hub(model, "owner/name", private=True, token=TOKEN, recipe={"steps": 3})
    assert address == f"{server.address}/owner/name/commit/{'0' * 40}"
    # the client says it in one of two ways, by its version
    assert server.created.get("private") or server.created.get("visibility") == "private"
    assert sum("/commit/" in request for request in server.requests) == 1
    # an adapter of an earlier version must not stay beside a memory that has none
    assert {*server.files} == {"memory_config.json", "memory.safetensors", "README.md", "notes.md"}
    _load_what_was_sent(server, model, tmp_path / "sent")


def _load_what_was_sent(server: Server, model: Any, folder: Path) -> None:
    folder.mkdir()
    for name, content in server.files.items():
        (folder / name).write_bytes(content)
    assert read_record(folder).recipe == {"steps": 3}
    assert "from_pretrained('owner/name')" in (folder / "README.md").read_text()
    loaded = memory_parameters(from_pretrained(folder))
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
            push_to_hub(model, "owner/name", token=TOKEN)
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
        push_to_hub(model, "owner/name", token=TOKEN)
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
            push_to_hub(model, "owner/name", token=TOKEN)
    assert not server.requests
