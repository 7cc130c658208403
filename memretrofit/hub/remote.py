"""The Hub: fetch a saved memory from a repository, publish one in a repository."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import nn

from memretrofit.card import HUB_ID
from memretrofit.errors import CheckpointError, ConfigError
from memretrofit.hub.base import PACKAGE
from memretrofit.hub.record import CARD, CONFIG, NAMED, REPORT, BaseRecord, read_record
from memretrofit.hub.saving import write_files

PATTERNS = [CONFIG, *NAMED, CARD, REPORT]
"""What is fetched: our files by name, nothing else that a repository may hold."""

# The Hub's own errors, those of its HTTP client (another in each of its major versions), of the
# disk, and of large uploads.
_FAILURES: tuple[Any, ...] = (
    *HfHubHTTPError.__bases__,
    HfHubHTTPError,
    OSError,
    ValueError,
    RuntimeError,
)


def download(
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    *,
    patterns: Sequence[str] = PATTERNS,
    **options: Any,
) -> Path:
    """The local copy of a repository's memory; `options` are those of `snapshot_download`.

    Raises:
        CheckpointError: not a folder and not a repository that can be read, or no connection.
    """
    with _explained(
        f"load {repo_id!r}, which is no folder here and was looked for on the Hub", token
    ):
        return Path(
            snapshot_download(
                repo_id, revision=revision, token=token, allow_patterns=list(patterns), **options
            )
        )


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload memory with memretrofit",
    recipe: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    base_model: str | None = None,
) -> str:
    """Publish what `save_pretrained` would save, in one commit; return its address.

    Large files are sent before the commit and named by their hash: after an interruption push
    again, and what has arrived is not sent twice.

    Args:
        model: a patched model, or the PeftModel around one.
        repo_id: `owner/name`; made where it is missing.
        private: visibility of a repository that is made here; None takes the owner's default.
        token: for the Hub; None takes the one that `hf auth login` stored.
        commit_message: of the commit.
        recipe, results, tokenizer: see `save_pretrained`.
        base_model: Hub id of the base model, for one that was loaded from a folder or built. The
            base is loaded from there, and its weights are compared.

    Raises:
        StateError: see `save_pretrained`; nothing was sent.
        ConfigError: others cannot load the base model by the name that it has; nothing was sent.
        CheckpointError: the Hub refused or was not reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_files(
            model,
            Path(folder),
            name=repo_id,
            recipe=recipe,
            results=results,
            tokenizer=tokenizer,
            base_model=base_model,
        )
        _check_named(read_record(folder).base, repo_id)
        with _explained(f"push to {repo_id!r}", token):
            hub = HfApi(token=token, library_name="memretrofit")
            hub.create_repo(repo_id, private=private, exist_ok=True)
            commit = hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                delete_patterns=[*NAMED],  # of an earlier version; files of this one stay
            )
    return commit.commit_url


def _check_named(base: BaseRecord, repo_id: str) -> None:
    """Refuse a base model that is on this machine alone: nobody could load the memory."""
    if not base.model.startswith(PACKAGE) and not HUB_ID.fullmatch(base.model):
        what = f"the folder {base.model}" if base.model else "one that was built, not loaded"
        raise ConfigError(
            f"push to {repo_id!r}: the base model is {what}, which others do not "
            "have, so that the card could name none. Pass base_model= with its id on the Hub."
        )


@contextmanager
def _explained(what: str, token: str | bool | None) -> Iterator[None]:
    """Turn the Hub's errors into ours: what was asked, what came back, what to do; no token."""
    try:
        yield
    except _FAILURES as error:
        text = _first_lines(error)
        if isinstance(error, RuntimeError) and error.__cause__ is not None:
            text += f" {_first_lines(error.__cause__)}"
        for secret in {token, get_token()} - {None, True, False, ""}:
            text = text.replace(str(secret), "***")
        # no chained cause: it holds the request, and with it the token
        raise CheckpointError(f"Cannot {what}: {text.rstrip('.')}. {_remedy(error)}") from None


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _remedy(error: BaseException) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, GatedRepoError):
        return "Ask for access on the repository's page, then log in with `hf auth login`."
    if isinstance(error, RevisionNotFoundError):
        return "Check the revision; revision=None takes the main branch."
    if isinstance(error, RepositoryNotFoundError):
        return "Check the name; a private repository needs `hf auth login` or token=."
    if status in (401, 403):
        return "Log in with `hf auth login`, or pass token= with write access to that owner."
    if status is not None:
        return "See the status page of the Hub, and try again."
    if isinstance(error, RuntimeError):
        return "Call it again: what has arrived is not sent twice."
    if isinstance(error, ValueError):
        return "Pass a folder that save_pretrained wrote, or a repository as owner/name."
    return (
        "Check the connection and HF_HUB_OFFLINE; without one, pass a folder that save_pretrained "
        "wrote."
    )
