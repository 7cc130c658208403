"""A kill at any moment of a save leaves the old memory or the new one, never a mixture or none."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from saved_models import llama, logits, memory_for, randomise

from memretrofit import from_pretrained, patch, save_pretrained
from memretrofit.errors import CheckpointError
from memretrofit.hub import load_base

# peft asks Transformers by a name that Transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is depr:FutureWarning")

CALLS = [
    (os, "replace"),
    (os, "link"),
    (os, "unlink"),
    (os, "mkdir"),
    (os, "rmdir"),
    (shutil, "rmtree"),
]
"""Everything by which a save changes names in a folder."""


class Killed(BaseException):
    """The process is dead."""


@contextmanager
def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The process dies after `steps` calls: none of the later ones happens, clean-up included."""
    count = [0]

    def limited(real: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] > steps:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        for module, name in CALLS:
            patched.setattr(module, name, functools.partial(limited, getattr(module, name)))
        with suppress(Killed):
            yield count


@torch.no_grad()
def model_with(base: Path, seed: int, lora: int | None = None) -> Any:
    model = randomise(patch(load_base(base), memory_for()), seed)
    if lora is not None:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
        torch.manual_seed(lora)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


def same(loaded: Any, model: Any) -> bool:
    return torch.equal(logits(loaded), logits(model))


SEQUENCES = {
    "memory": [(0, None), (1, None), (2, None), (3, None)],
    "adapter comes and goes": [(0, None), (1, 1), (2, None), (3, 3)],
    "adapter goes and comes": [(0, 0), (1, None), (2, 2), (3, None)],
    "adapter alone comes and goes": [(0, None), (0, 1), (0, None), (0, 3)],
    "adapter alone changes": [(0, 0), (0, 1), (0, 2), (0, 3)],
}
"""(seed of the memory, seed of the adapter) of four saves in a row."""


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_killed_at_every_step(
    sequence: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two saves in a row are killed, the first at every step; the third one is not."""
    models = [model_with(base, *seeds) for seeds in SEQUENCES[sequence]]
    folder, kept, outcomes = tmp_path / "memory", tmp_path / "kept", []
    save_pretrained(models[0], folder)
    folder.rename(kept)
    for step in range(100):
        shutil.copytree(kept, folder)
        with killed_after(step, monkeypatch) as count:
            save_pretrained(models[1], folder)
        loaded = from_pretrained(folder, base=llama())
        outcomes.append([same(loaded, model) for model in models[:2]].index(True))
        with killed_after((7 * step) % 13, monkeypatch):
            save_pretrained(models[2], folder)
        loaded = from_pretrained(folder, base=llama())
        assert same(loaded, models[outcomes[-1]]) or same(loaded, models[2])
        save_pretrained(models[3], folder)
        assert same(from_pretrained(folder, base=llama()), models[3])
        assert not list(folder.glob(".*"))
        assert (folder / "adapter_config.json").exists() == (SEQUENCES[sequence][3][1] is not None)
        shutil.rmtree(folder)
        if count[0] <= step:
            break
    # killed before the new one counted, and after; once it counts it stays
    assert {*outcomes} == {0, 1}
    assert outcomes == sorted(outcomes)
    assert len(outcomes) >= 8


@pytest.mark.parametrize("step", range(1, 9))
def test_remains_of_a_first_save_are_not_taken_for_an_adapter(
    step: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with killed_after(step, monkeypatch):
        save_pretrained(model_with(base, 0, lora=0), tmp_path)
    model = model_with(base, 1)
    save_pretrained(model, tmp_path)
    assert same(from_pretrained(tmp_path, base=llama()), model)


def test_without_the_old_set_a_kill_would_mix(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The witness: new tensors under the old record, and no `.previous`, is refused."""
    save_pretrained(model_with(base, 0), tmp_path)
    save_pretrained(model_with(base, 1), tmp_path / "new")
    os.replace(tmp_path / "new" / "memory.safetensors", tmp_path / "memory.safetensors")
    with pytest.raises(CheckpointError, match="interrupted save, or edited"):
        from_pretrained(tmp_path, base=llama())


def test_the_first_save_killed_leaves_no_memory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(2, 5):
        with killed_after(step, monkeypatch):
            save_pretrained(model_with(base, 0), tmp_path / "memory")
        if not (tmp_path / "memory" / "memory_config.json").exists():
            with pytest.raises(CheckpointError, match=r"No memory_config\.json"):
                from_pretrained(tmp_path / "memory", base=llama())
    save_pretrained(model_with(base, 1), tmp_path / "memory")
    assert same(from_pretrained(tmp_path / "memory", base=llama()), model_with(base, 1))


def test_the_old_set_is_named_when_it_is_loaded(
    saved: Path, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = os.replace

    def until_the_record(source: Any, target: Any) -> None:
        if Path(target).name == "memory_config.json":
            raise Killed
        real(source, target)

    model = model_with(base, 5)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", until_the_record)
        with pytest.raises(Killed):
            save_pretrained(model, saved)
    assert same(from_pretrained(saved, base=llama()), model_with(base, 1))
    assert "interrupted" in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from saved_models import llama, memory_for, randomise
from memretrofit import patch, save_pretrained
real = os.replace
def replace(source, target):
    if Path(target).name == "memory_config.json":
        os.kill(os.getpid(), signal.SIGKILL)
    real(source, target)
os.replace = replace
save_pretrained(randomise(patch(llama(), memory_for()), 2), sys.argv[2])
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_real_kill(saved: Path, base: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(saved)]
    result = subprocess.run(command, check=False, capture_output=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert list(saved.glob(".saving-*"))  # it really died in the middle
    assert same(from_pretrained(saved, base=llama()), model_with(base, 1))
    save_pretrained(model_with(base, 3), saved)
    assert not list(saved.glob(".*"))
