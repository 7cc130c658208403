"""What a bank costs in decoding: one step with it, against the model that it was put beside.

Arms share the base weights and take turns, as in `bench`, so a ratio is one of the same moment.
Each bank is prepared for texts, the rows that they read are open, as after an injection, and all
others lie in RAM. Every conversation begins as one of those texts: what is measured is a bank that
is read, not one that abstains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.errors import ConfigError
from memretrofit.evaluation.bench import FULL, Arm, random_ids, take_turns
from memretrofit.evaluation.bench_room import lacking
from memretrofit.evaluation.cost import prefill
from memretrofit.methods.engram import EngramConfig
from memretrofit.methods.hierarchical_ffn import HierarchicalFFNConfig
from memretrofit.modules.bank import Preparation, Tokens
from memretrofit.modules.row_sources import row_nbytes
from memretrofit.modules.table import HeldRows
from memretrofit.patching.ffn import bank_of

BANKS: dict[str, MethodConfig] = {
    "hierarchical_ffn": HierarchicalFFNConfig(),
    "engram": EngramConfig(),
}
TEXTS, TEXT_TOKENS = 64, 32
"""Texts that the banks are prepared for, as many of ordinary text, and their length."""


@torch.no_grad()
def bench_bank_decode(
    base: PreTrainedModel,
    contexts: Sequence[int],
    rounds: int,
    *,
    batches: Sequence[int] = (1, 8),
    banks: dict[str, MethodConfig] = BANKS,
    say: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Milliseconds of one decoding step of so many rows after each context (at least
    `TEXT_TOKENS`), and the ratio to the base model's in the same round, by the clock and in CPU
    time. `reads`: share of the rows whose last token reads an open row.

    Raises:
        ConfigError: a context is shorter than the texts, or memory has no room for the rows.
    """
    if too_short := [context for context in contexts if context < TEXT_TOKENS]:
        raise ConfigError(
            f"bank contexts {too_short}: a conversation begins with {TEXT_TOKENS} tokens that a "
            f"bank was prepared for. Choose {TEXT_TOKENS} or more."
        )
    if not contexts:
        return []
    texts = random_ids(base, 2 * TEXTS * TEXT_TOKENS).view(2 * TEXTS, TEXT_TOKENS)
    models = {FULL: Arm(name=FULL, config=base.config).share(base)}
    for name, method in banks.items():
        say(f"preparing {name}")
        models[name] = Arm(name=name, config=base.config, method=method).share(base)
        _prepare(models[name], texts[:TEXTS], texts[TEXTS:])
    found = []
    for context in contexts:
        for batch in batches:
            say(f"decoding {batch} rows with a bank after {context} tokens")
            rest = random_ids(base, batch * (context - TEXT_TOKENS)).view(batch, -1)
            ids = torch.cat([texts[torch.arange(batch) % TEXTS], rest], dim=1)
            found += _decode(models, ids, rounds)
    return found


def _prepare(model: PreTrainedModel, examples: Tensor, generic: Tensor) -> None:
    bank, embedding = bank_of(model), model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)
    bank.prepare(Preparation(examples=[*examples], generic=[*generic], embedding=embedding))
    bank.open_rows([*examples])
    nbytes = sum(table.rows * row_nbytes(table.source) for _, table in bank.each_table())
    if reason := lacking(nbytes, 0):
        raise ConfigError(f"A bank to decode with in {reason} Leave it out (--bank-contexts none).")
    for _, table in bank.each_table():
        table.attach(HeldRows.copy_of(table.source, "ram"))


def _decode(models: dict[str, PreTrainedModel], ids: Tensor, rounds: int) -> list[dict[str, Any]]:
    caches = {name: prefill(model, ids, chunk_size=None)[0] for name, model in models.items()}
    token = ids[:, :1]

    def step(name: str) -> Callable[[], Any]:
        return lambda: models[name](token, past_key_values=caches[name], use_cache=True)

    times = take_turns({name: step(name) for name in models}, rounds, warmup=2)
    return [
        {
            "arm": name,
            "context": ids.shape[1],
            "batch": len(ids),
            "rounds": rounds,
            "ms_per_token": timing.ms(),
            "over_full": timing.over(times[FULL]),
            "over_full_cpu": timing.over(times[FULL], "cpu"),
            "reads": None if name == FULL else _share_reading(models[name], ids),
        }
        for name, timing in times.items()
    ]


def _share_reading(model: PreTrainedModel, ids: Tensor) -> float:
    """Over the texts that conversations begin with: what follows is drawn at random."""
    bank = bank_of(model)
    found = [bank.addresses(Tokens(ids=row[None, :TEXT_TOKENS], new=1)) for row in ids]
    reading = [
        any(bool(bank.table(name).is_open(index).any()) for name, index in rows.items())
        for rows in found
    ]
    return sum(reading) / len(reading)
