"""Published, deleted here and loaded again: the same model, or an error that says what is wrong."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_client import TOKEN, online
from hub_server import FRESH, Repo, Server, hub
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from saved_models import llama, logits, memory_for, randomise

from memretrofit import from_pretrained, patch, push_to_hub
from memretrofit.errors import CheckpointError, ConfigError
from memretrofit.hub import load_base
from memretrofit.hub.tensors import sha256

pytestmark = [
    # peft asks Transformers by a name that Transformers is about to drop
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is depr:FutureWarning"),
    # huggingface_hub sends large files by an argument that httpx is about to rename
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]

STRANGER = "hf_anotheranotheranotheranotheranother"
RECIPE = {"name": "tiny", "train": {"steps": 3, "learning_rate": 1e-3}, "seed": 0}
GAIN = {"mean": 0.25, "low": 0.125, "high": 0.5}
RESULTS = {"texts": {"a book": {"memory_gain": GAIN, "nll": {"trained": GAIN, "full": GAIN}}}}


@pytest.fixture
def server(base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    """A Hub with a public base model, on which two people have tokens."""
    with hub() as running:
        running.add("owner/base", {x.name: x.read_bytes() for x in base.iterdir()})
        running.tokens = {TOKEN: "owner", STRANGER: "stranger"}
        online(monkeypatch, running.address, tmp_path / "cache")
        yield running


def memory(seed: int) -> Any:
    return randomise(patch(load_base("owner/base"), memory_for()), seed)


@torch.no_grad()
def adapted(seed: int) -> Any:
    model = get_peft_model(memory(seed), LoraConfig(r=2, target_modules=["q_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_()
    return model


def publish(model: Any, **changes: Any) -> None:
    told = {"private": True, "token": TOKEN, "recipe": RECIPE, "results": RESULTS}
    push_to_hub(model, "owner/memory", **{**told, **changes})


READ = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from saved_models import logits
from memretrofit import from_pretrained
torch.save(logits(from_pretrained("owner/memory", revision=sys.argv[2])), sys.argv[3])
"""


def test_published_and_read_by_a_new_process(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any
) -> None:
    """The first of two versions, by its commit; and nothing that is left behind holds the token."""
    model = adapted(1)
    with caplog.at_level(logging.DEBUG):
        publish(model)
        first = server.repos["owner/memory"].refs["main"]
        publish(memory(2))
        from_pretrained("owner/memory", token=TOKEN)
    assert server.repos["owner/memory"].private
    shutil.rmtree(tmp_path / "cache")

    out, home = tmp_path / "logits.pt", tmp_path / "home"
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("HF_")},
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "HF_DEBUG": "1",  # the client prints every request that it makes
    }
    command = [sys.executable, "-c", READ, str(Path(__file__).parent), first, str(out)]
    done = subprocess.run(
        command, env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = logits(model)
    assert torch.equal(torch.load(out), expected)
    assert not torch.equal(logits(memory(2)), expected)  # the other version would have been seen

    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    sent = [*server.repos["owner/memory"].commits[first].values()]
    assert not any(TOKEN.encode() in x for x in [*sent, *(path.read_bytes() for path in written)])
    assert "owner/memory" in done.stderr + caplog.text
    assert TOKEN not in done.stderr + done.stdout + caplog.text + "".join(capfd.readouterr())


def test_the_card_says_what_the_hub_shows(server: Server) -> None:
    publish(adapted(1))
    files = server.repos["owner/memory"].files
    text = files["README.md"].decode()
    card: Any = ModelCard(text).data
    assert (card.base_model, card.base_model_relation) == ("owner/base", "adapter")
    assert card.library_name == "memretrofit"
    assert {"memretrofit", "ahn"} <= {*card.tags}
    # the Hub's own reading of model-index
    (gain, nll) = card.eval_results
    assert (gain.dataset_name, gain.metric_type, gain.metric_value) == (
        "a book",
        "memory_gain",
        0.25,
    )
    assert nll.metric_type == "nll"
    found = re.search(r"The exact recipe:\n\n```yaml\n(.*?)```", text, re.S)
    assert found is not None
    assert yaml.safe_load(found[1]) == RECIPE
    record = json.loads(files["memory_config.json"])
    assert record["recipe"] == RECIPE
    assert record["base"]["revision"] == server.repos["owner/base"].refs["main"]
    assert {*record["files"]} == {*files} - {*FRESH, "README.md", "memory_config.json"}
    for digest in record["files"].values():
        assert digest in text


def test_offline_after_a_first_load(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(memory(1))
    expected = logits(from_pretrained("owner/memory", token=TOKEN))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(server.requests)
    assert torch.equal(logits(from_pretrained("owner/memory")), expected)
    assert len(server.requests) == asked
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE"):
        from_pretrained("owner/memory", revision="another")


def test_the_same_memory_is_the_same_files(server: Server) -> None:
    """To the byte, so that a hash tells what has arrived."""
    publish(memory(1))
    first = server.repos["owner/memory"].files
    for _ in range(4):
        publish(memory(1))
    assert server.repos["owner/memory"].files == first
    assert server.count("PUT") == 1


def test_an_interrupted_upload_goes_on(server: Server, tmp_path: Path) -> None:
    """What has arrived is not sent twice, and nobody sees half of it."""
    model = adapted(1)
    publish(model)
    sent = server.repos.pop("owner/memory").files
    hashes = {}
    for name in ("memory.safetensors", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(sent[name])
        hashes[name] = sha256(tmp_path / name)
    server.objects.clear()
    server.refused_objects = {hashes["adapter_model.safetensors"]}
    with pytest.raises(CheckpointError, match=r"'adapter_model\.safetensors'.*403.*Call it again"):
        publish(model)
    assert server.repos["owner/memory"].files == FRESH
    server.objects.setdefault(hashes["memory.safetensors"], sent["memory.safetensors"])
    server.refused_objects, server.requests = set(), []
    publish(model)
    assert [x for x in server.requests if x.startswith("PUT")] == [
        f"PUT /lfs/{hashes['adapter_model.safetensors']}"
    ]
    assert torch.equal(logits(from_pretrained("owner/memory", token=TOKEN)), logits(model))


@pytest.fixture
def published(server: Server) -> Repo:
    """A private repository with a memory."""
    publish(memory(1))
    return server.repos["owner/memory"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"token": "hf_wrong"}, "401.*hf auth login"),
        ({"token": STRANGER}, "Repository Not Found.*Check the name"),
        ({"token": False}, "Repository Not Found.*Check the name.*hf auth login"),
        ({"token": TOKEN, "revision": "v9"}, "Revision Not Found.*Check the revision"),
    ],
)
def test_a_load_that_is_refused(published: Repo, asked: dict[str, Any], words: str) -> None:
    assert published.private
    with pytest.raises(CheckpointError, match=f"(?s){words}"):
        from_pretrained("owner/memory", **asked)


def test_a_missing_repository(server: Server) -> None:
    with pytest.raises(CheckpointError, match=r"'owner/nothing'.*Check the name"):
        from_pretrained("owner/nothing", token=TOKEN)


@pytest.mark.parametrize(
    ("token", "words"), [("hf_wrong", "401.*hf auth login"), (STRANGER, "write access")]
)
def test_a_push_that_is_refused(server: Server, token: str, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        publish(memory(1), token=token)
    assert "owner/memory" not in server.repos


def test_a_file_that_was_changed_on_the_server(published: Repo) -> None:
    files = dict(published.files)
    changed = bytearray(files["memory.safetensors"])
    changed[-1] ^= 1
    published.commit({**files, "memory.safetensors": bytes(changed)})
    with pytest.raises(
        CheckpointError, match=r"memory\.safetensors is not the file that was saved"
    ):
        from_pretrained("owner/memory", token=TOKEN)


def test_a_repository_that_names_no_base(published: Repo) -> None:
    """Neither its card nor its record; with the base at hand it can be loaded."""
    record = json.loads(published.files["memory_config.json"])
    record["base"]["model"] = ""
    told = {"memory_config.json": json.dumps(record).encode(), "README.md": b"# nothing\n"}
    published.commit({**published.files, **told})
    with pytest.raises(CheckpointError, match=r"built and not loaded.*Pass it: .*base=model"):
        from_pretrained("owner/memory", token=TOKEN)
    loaded = from_pretrained("owner/memory", token=TOKEN, base=llama())
    assert torch.equal(logits(loaded), logits(memory(1)))


@pytest.mark.parametrize("kind", ["folder", "built"])
def test_a_base_that_others_do_not_have_is_not_published(
    kind: str, base: Path, server: Server
) -> None:
    model = patch(load_base(base) if kind == "folder" else llama(), memory_for())
    with pytest.raises(ConfigError, match=r"others do not have.*base_model="):
        publish(model)
    with pytest.raises(ConfigError, match=r"others do not have"):
        publish(model, base_model="../elsewhere")
    assert not any("POST" in request for request in server.requests)
    publish(randomise(model, 1), base_model="owner/base")
    card: Any = ModelCard(server.repos["owner/memory"].files["README.md"].decode()).data
    assert card.base_model == "owner/base"
    assert torch.equal(logits(from_pretrained("owner/memory", token=TOKEN)), logits(model))


def test_a_repository_without_a_memory(server: Server) -> None:
    with pytest.raises(CheckpointError, match=r"No memory_config\.json.*push_to_hub made"):
        from_pretrained("owner/base")
