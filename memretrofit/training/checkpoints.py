"""One file that a training loop of our own goes on from: step, settings, parameters, optimisers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memretrofit.errors import CheckpointError
from memretrofit.files import replacing
from memretrofit.training.trainable import fill_parameters

Parameters = Mapping[str, nn.Parameter]
Optimizers = Sequence[torch.optim.Optimizer]


def save_checkpoint(
    path: Path, step: int, parameters: Parameters, optimizers: Optimizers, settings: Any
) -> None:
    """Write what `load_checkpoint` reads; a kill leaves the checkpoint before it, or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "step": step,
        "settings": asdict(settings),
        "parameters": {name: p.detach().cpu() for name, p in parameters.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    with replacing(path) as part:
        torch.save(values, part)


def load_checkpoint(
    path: Path, parameters: Parameters, optimizers: Optimizers, settings: Any
) -> int:
    """Fill parameters and optimisers, and return the number of steps done.

    Raises:
        CheckpointError: damaged, or of other parameters or settings (how often it is saved apart).
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        step, found, wanted = saved["step"], saved["settings"], asdict(settings)
    except (
        *(OSError, RuntimeError, KeyError, EOFError, pickle.UnpicklingError),
        *(TypeError, ValueError, AttributeError),
    ) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; delete it to start afresh"
        ) from error
    differ = sorted(k for k in wanted if k != "save_steps" and found.get(k) != wanted[k])
    if differ:
        changes = ", ".join(f"{k}: {found.get(k)!r} -> {wanted[k]!r}" for k in differ)
        raise CheckpointError(
            f"{path} belongs to a run with other settings ({changes}); resume with those, or "
            "delete it to start afresh"
        )
    fill_parameters(parameters, saved["parameters"], path)
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    return step
