"""Every method with every preset, found in the folder of methods: a new method file is covered
by being there."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import fields, replace

import pytest
import torch
from contract.families import FAMILIES, build
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.errors import ConfigError
from memretrofit.methods import available_methods, get_method
from memretrofit.methods.streaming_llm import StreamingLLMConfig
from memretrofit.methods.window_sinks import WindowSinksConfig
from memretrofit.modules.memory import AttentionMemory
from memretrofit.patching.ledger import ledger_of
from memretrofit.retrofit import memory_parameters, patch

WINDOW, SINKS = 8, 3
EXACT = WINDOW + SINKS
"""Tokens after which something has left the window."""

VARIANTS = {
    "variant": {
        "state_heads": "key_value",
        "key_space": "pre_rope",
        "center_keys": True,
        "granularity": "kv_head",
        "positions": "reindexed",
    },
    "host": {"placement": "host", "granularity": "layer", "positions": "grouped"},
    "disk": {"placement": "disk", "hot_bytes": 0, "granularity": "layer", "positions": "absolute"},
}
"""The other choices of each field that methods share, some at once."""


SMALL = {
    "sliding_window": WINDOW,
    "num_sink_tokens": SINKS,
    "block_size": 4,
    "top_k": 2,
    "num_modes": 6,
    "min_event_size": 2,
    "max_event_size": 4,
    "recalled_tokens": 8,
    "budget": EXACT + 5,
    "interval": 4,
    "observation_window": 5,
    "pyramid_beta": 2,
    "position_group": 3,
    "hot_bytes": 1000,
}
"""Sizes that a test can fill, for the fields of these names."""


def small(config: MethodConfig) -> MethodConfig:
    """The same preset at sizes that a test can fill."""
    names = {field.name for field in fields(config)}
    return replace(config, **{name: size for name, size in SMALL.items() if name in names})


def _varied(config: MethodConfig, choices: dict[str, object]) -> MethodConfig:
    """`config` with those of the choices that the method has."""
    for name, value in choices.items():
        if name in {field.name for field in fields(config)}:
            with contextlib.suppress(ConfigError):
                config = replace(config, **{name: value})
    return config


def _discover() -> dict[str, MethodConfig]:
    arms: dict[str, MethodConfig] = {}
    for name, info in available_methods().items():
        names = {field.name for field in fields(info.config_class)}
        if not {"sliding_window", "num_sink_tokens"} <= names:
            continue  # not an attention method
        found = {name: small(info.config_class())}
        found |= {f"{name}-{preset}": small(c) for preset, c in info.presets.items()}
        for variant, choices in VARIANTS.items():
            found[f"{name}-{variant}"] = _varied(found[name], choices)
        for arm, config in found.items():
            if config not in arms.values():
                arms[arm] = config
    return arms


ARMS = _discover()
EVERYTHING = {
    "budget": 999,
    "top_k": 99,
    "num_modes": 99,
    "similarity_threshold": 2.0,
    "recalled_tokens": 999,
}
"""Sizes with which a memory that chooses what it reads leaves nothing out."""

METHODS_WITH_MEMORY = {
    arm for arm, c in ARMS.items() if c.method not in ("window_sinks", "streaming_llm")
}


def refuses(family: str, arm: str) -> bool:
    """Whether the method cannot serve the family: MLA rotates a part of its keys that is not a
    slice of whole heads."""
    return family == "deepseek_v3" and _moves_rotations(arm)


def grows(arm: str) -> bool:
    """Whether the state grows with the text."""
    return _memory(arm).state_nbytes(10_000) > _memory(arm).state_nbytes(5_000)


@functools.cache
def _memory(arm: str) -> AttentionMemory:
    (seam,) = ledger_of(patch(build("llama", layers=1), ARMS[arm])).seams.values()
    return seam.memory


def sinks_move(arm: str) -> bool:
    """Whether sinks stand at their place in the cache."""
    return _memory(arm).sink_positions == "slot"


def _moves_rotations(arm: str) -> bool:
    """Whether the memory asks for keys before their rotary embedding, or for other positions."""
    return _memory(arm).key_space == "pre_rope" or sinks_move(arm)


def identity(arm: str) -> str:
    """What a fresh patch equals, as the method file declares it."""
    return get_method(ARMS[arm].method).identity


LIVE = [
    (family, arm)
    for family in FAMILIES
    for arm in ARMS
    # presets differ in sizes and parts, not in how they enter a model: one family is enough
    if not refuses(family, arm) and (family == "llama" or arm == ARMS[arm].method)
]
REFUSED = [(family, arm) for family in FAMILIES for arm in ARMS if refuses(family, arm)]
every_live = pytest.mark.parametrize(("family", "arm"), LIVE, ids=["-".join(x) for x in LIVE])
every_arm = pytest.mark.parametrize("arm", list(ARMS))
every_memory = pytest.mark.parametrize("arm", sorted(METHODS_WITH_MEMORY))
HAVE_PARAMETERS = sorted(
    arm
    for arm in METHODS_WITH_MEMORY
    if memory_parameters(patch(build("llama", layers=1), ARMS[arm]))
)
OFF_DEVICE = {arm for arm, c in ARMS.items() if getattr(c, "placement", "device") != "device"}
"""Arms with a store that takes no gradients."""
TRAINABLE = [arm for arm in HAVE_PARAMETERS if arm not in OFF_DEVICE]
every_trainable = pytest.mark.parametrize("arm", TRAINABLE)
every_family = pytest.mark.parametrize("family", list(FAMILIES))


def activate(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Move every memory parameter away from where it starts: a branch that starts at zero hides
    its faults.

    Vectors (gates, norms, biases) move up only, so that no gate is closed by chance.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.3 * (noise.abs() if parameter.ndim == 1 else noise)).to(parameter))
    return model


def window_alone(family: str, arm: str, **build_options) -> PreTrainedModel:
    """A tiny model with the sinks and window of `arm` and no memory."""
    config, kind = ARMS[arm], StreamingLLMConfig if sinks_move(arm) else WindowSinksConfig
    sizes = {"sliding_window": config.sliding_window, "num_sink_tokens": config.num_sink_tokens}
    return patch(build(family, **build_options), kind(**sizes))


def reading_all(arm: str) -> MethodConfig:
    """The config of `arm`, choosing everything."""
    config = ARMS[arm]
    names = {field.name for field in fields(config)}
    return replace(config, **{n: size for n, size in EVERYTHING.items() if n in names})


def patched(
    family: str, arm: str, *, live: bool = True, reads_all: bool = False, **build_options
) -> PreTrainedModel:
    """A tiny model with the method of `arm`, always with the same parameters; `live` activates
    the memory, `reads_all` lets it choose everything."""
    model, config = build(family, **build_options), reading_all(arm) if reads_all else ARMS[arm]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        patch(model, config)
    return activate(model) if live else model
