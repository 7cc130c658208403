"""A tiny base model on disk, and a saved memory for it whose values are no fresh patch's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from saved_models import llama, memory_for, randomise

from memretrofit import patch, save_pretrained
from memretrofit.hub import load_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the base model."""
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def _saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "memory"
    model = patch(load_base(base), memory_for())
    save_pretrained(randomise(model, seed=1), folder)
    return folder


@pytest.fixture
def saved(_saved: Path, tmp_path: Path) -> Path:
    """Folder of a saved memory, to be damaged freely."""
    return Path(shutil.copytree(_saved, tmp_path / "memory"))
