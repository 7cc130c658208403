"""Every method of the bank family with every preset, found in the folder of methods."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from contract.families import FAMILIES, VOCABULARY, build, tokens
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.methods import available_methods
from memretrofit.modules.bank import MemoryBank, Preparation
from memretrofit.patching.ledger import ledger_of
from memretrofit.retrofit import memory_parameters, patch

LENGTH = 24

SMALL = {
    "branching": (2, 2),
    "block_sizes": (3, 2),
    "route_tokens": 6,
    "ngram_orders": (2, 3),
    "table_size": 53,
    "num_slots": 49,
    "num_heads": 2,
    "key_dim": 8,
    "value_dim": 16,
    "top_k": 3,
}
"""Sizes that a test can fill, for the fields of these names."""

BESIDE = {
    "engram-convolved": {"conv_width": 2},
    "engram-hot": {"hot_bytes": 640},
    "hierarchical_ffn-generic": {"generic_size": 4},
    "hierarchical_ffn-late_third": {"placement": "late_third"},
}
"""What no preset sets: a method and what differs from its defaults."""


def _small(config: MethodConfig) -> MethodConfig:
    names = {field.name for field in fields(config)}
    return replace(config, **{name: size for name, size in SMALL.items() if name in names})


def _discover() -> dict[str, MethodConfig]:
    arms: dict[str, MethodConfig] = {}
    for name, info in available_methods().items():
        if info.family != "banks":
            continue
        found = {name: _small(info.config_class())}
        found |= {f"{name}-{preset}": _small(c) for preset, c in info.presets.items()}
        found |= {
            arm: replace(found[name], **changes)
            for arm, changes in BESIDE.items()
            if arm.startswith(f"{name}-")
        }
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

EXAMPLES = [row for seed in range(3) for row in tokens(2, LENGTH, seed=seed)]
"""The texts that the banks of these tests were prepared for."""


class _Words:
    """A tokenizer of one word for each id; two of them differ in case alone."""

    vocab_size = VOCABULARY

    def __len__(self) -> int:
        return VOCABULARY

    def decode(self, ids: list[int], **_: object) -> str:
        (number,) = ids
        return f"Word{number - 1}" if number % 10 == 1 else f"word{number}"

    def convert_ids_to_tokens(self, number: int) -> str:
        return self.decode([number])


def bank_of(model: PreTrainedModel) -> MemoryBank:
    """The bank of a patched model."""
    return ledger_of(model).bank  # type: ignore[attr-defined]


def banked(
    family: str, arm: str, *, live: bool = True, layers: int = 2, opened: bool = True
) -> PreTrainedModel:
    """A tiny model with the bank of `arm`, prepared for `EXAMPLES` and with their rows open;
    `live` moves every parameter away from where it starts."""
    model = build(family, layers=layers)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        patch(model, ARMS[arm])
        bank = bank_of(model)
        generic = [row for seed in range(10, 13) for row in tokens(2, LENGTH, seed=seed)]
        embedding = model.get_input_embeddings().weight.detach()
        bank.prepare(
            Preparation(examples=EXAMPLES, generic=generic, embedding=embedding, tokenizer=_Words())
        )
        if opened:
            bank.open_rows(EXAMPLES)
    return activate(model) if live else model


def activate(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Move every parameter of the bank and its reads: a branch that starts at zero hides faults."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in memory_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((0.3 * noise).to(parameter))
    return model
