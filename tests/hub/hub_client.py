"""The real client of the Hub, pointed at the stand-in."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

TOKEN = "hf_secretsecretsecretsecretsecretsecr"


def online(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path) -> None:
    """Point the client at `address`, and at a cache of its own."""
    place = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + place)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    # large files go by LFS: the storage behind Xet is no part of the stand-in
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
