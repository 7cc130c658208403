"""Every method that reads in segments with every preset, found in the folder of methods."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from contract.arms import activate
from contract.families import FAMILIES, build, tokens
from transformers import Cache, PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.methods import available_methods, get_method
from memretrofit.patching.segment_visit import SegmentLedger
from memretrofit.patching.session import Session
from memretrofit.retrofit import patch

SEGMENT = 8
LENGTH = 37
"""Tokens of a text: four segments, and some of the fifth (`text`)."""

SMALL = {
    "segment_length": SEGMENT,
    "num_memory_tokens": 3,
    "memory_dim": 32,  # with few features a query meets one that only rounding wrote to the norm
    "num_shifts": 2,
    "queue_length": 4,  # what one segment of `rmt` writes and a third more; half a text of `hmt`
    "num_sensory_tokens": 2,
    "num_blocks": 3,
    "query_length": 3,
    "top_k": 4,
    "long_term_size": 7,
    "key_dim": 6,
}
"""Sizes that a test can fill, for the fields of these names."""

VARIANTS = {
    "short": {
        "segment_length": 2,
        "num_memory_tokens": 1,
        "query_length": 1,
        "num_sensory_tokens": 5,
        "queue_length": 3,
    },
    "late": {"layers_to_transform": (1,)},
    "bare": {"num_sink_tokens": 0, "num_sensory_tokens": 0},
    "rescaled": {"carry": "rescaled"},
}
"""What no preset sets: segments shorter than what is read again, some layers, nothing in front."""


def _changed(config: MethodConfig, changes: dict[str, object]) -> MethodConfig:
    """`config` with those of the changes that the method has."""
    names = {field.name for field in fields(config)}
    return replace(config, **{n: value for n, value in changes.items() if n in names})


def _discover() -> dict[str, MethodConfig]:
    arms: dict[str, MethodConfig] = {}
    for name, info in available_methods().items():
        names = {field.name for field in fields(info.config_class)}
        if info.family != "tokens" or "segment_length" not in names:
            continue
        found = {name: _changed(info.config_class(), SMALL)}
        found |= {f"{name}-{preset}": _changed(c, SMALL) for preset, c in info.presets.items()}
        found |= {f"{name}-{v}": _changed(found[name], x) for v, x in VARIANTS.items()}
        for arm, config in found.items():
            if config not in arms.values():
                arms[arm] = config
    return arms


ARMS = _discover()
LIVE = [
    (family, arm)
    for family in FAMILIES
    for arm in ARMS
    if family == "llama" or arm == ARMS[arm].method
]
every_live = pytest.mark.parametrize(("family", "arm"), LIVE, ids=["-".join(x) for x in LIVE])
every_arm = pytest.mark.parametrize("arm", list(ARMS))
every_method = pytest.mark.parametrize("arm", [arm for arm in ARMS if arm == ARMS[arm].method])
"""Where neither sizes nor parts can matter."""


def segment_of(arm: str) -> int:
    """T of an arm."""
    return ARMS[arm].segment_length  # type: ignore[attr-defined]


def text(arm: str, rows: int = 2, seed: int = 0) -> torch.Tensor:
    """A text [rows, n] of four segments of the arm and five tokens."""
    return tokens(rows, LENGTH, seed=seed)[:, : 4 * segment_of(arm) + 5]


def identity(arm: str) -> str:
    """What a fresh patch equals, as the method file declares it."""
    return get_method(ARMS[arm].method).identity


def reading(
    family: str, arm: str, *, live: bool = True, dtype: torch.dtype = torch.float32, **options
) -> PreTrainedModel:
    """A tiny model that reads in segments, always with the same parameters; `live` moves them away
    from where they start."""
    model: PreTrainedModel = build(family, **options).to(dtype)  # type: ignore[arg-type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        patch(model, ARMS[arm])
    return activate(model) if live else model


def ledger(model: PreTrainedModel) -> SegmentLedger:
    """What was added to a model."""
    return model.memretrofit_patch  # type: ignore[attr-defined]


def session(cache: Cache) -> Session:
    """The layer of a cache of such a model."""
    (layer,) = cache.layers
    assert isinstance(layer, Session)
    return layer


def held(cache: Cache) -> dict[str, torch.Tensor]:
    """What a cache carries, by name: the state, and how far each row is."""
    layer = session(cache)
    assert layer.counts is not None
    return dict(layer.state) | {"counts": layer.counts.double()}


def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two states, relative to each tensor's largest entry above 1:
    a state may be many times what a logit is."""
    assert one.keys() == other.keys()
    return max(
        (((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for a, b in pairs(one, other)),
        default=0.0,
    )


def pairs(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    """The tensors of two states side by side, those with entries."""
    return [(one[name], other[name]) for name in one if one[name].numel()]
