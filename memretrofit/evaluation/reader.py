"""Read prompts once, then score candidates and generate an answer, both from the same cache.

Any causal language model of Transformers will do, patched or not, inside a PEFT wrapper or not.
Rows of one batch may differ in length, and answer as they would alone. A prompt is read in chunks,
with the last position's logits alone, so that no tensor is T x T or T x vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from memretrofit.errors import ConfigError, StateError
from memretrofit.evaluation.cost import cache_bytes, padding_arguments, prefill
from memretrofit.hub.adapter import refuse_prompt_learning
from memretrofit.patching.wrapping import evaluating, unwrapped

_COPY_BYTES = 1 << 30
"""Size of the cache copies on which candidates are scored side by side."""
_POSITIONS_AT_ONCE = 512
"""Positions, all rows together, whose log-softmax is held: 49 152 words in float32 are 100 MB."""
_NOT_FINITE = (
    "the likelihood of what follows a prompt is not a finite number; weights are damaged or the "
    "precision is too low"
)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One prompt to read, and what is asked of it."""

    prompt: str
    candidates: tuple[str, ...] = ()
    """Continuations whose likelihood is wanted."""
    max_new_tokens: int = 0
    """Tokens to write at most; 0 writes nothing."""
    context: tuple[int, int] | None = None
    """First and last + 1 character of the prompt's long part, which text-side baselines cut into
    chunks; None: there is nothing to cut."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one `Reading`."""

    text: str
    """What was written, greedily, up to the end of sequence or the wanted number of tokens."""
    log_likelihoods: tuple[float, ...]
    """log p(candidate | prompt), summed over its tokens, nats."""
    token_counts: tuple[int, ...]
    """Tokens of each candidate."""
    entropy: float
    """Of the distribution of the first token after the prompt, nats."""


Answerer = Callable[[Sequence[Reading]], list[Outcome]]
"""Answers a batch of readings, in order: one arm of a comparison."""


@dataclass(frozen=True, eq=False)
class Prefilled:
    """A batch of prompts, read to the end."""

    ids: Tensor
    """Left-padded. [B, T]"""
    mask: Tensor
    """1 for tokens, 0 for padding. [B, T]"""
    cache: Any
    logits: Tensor
    """Of the token that follows, float32. [B, vocabulary]"""

    @property
    def is_padded(self) -> bool:
        """Whether the rows differ in length."""
        return not bool(self.mask.all())


class Likelihood(NamedTuple):
    """How likely a continuation is."""

    log_likelihood: float
    """Sum over its tokens, nats."""
    greedy: bool
    """Whether each of its tokens is the most likely one in its place."""


@torch.no_grad()
def read(
    model: Any,
    tokenizer: Any,
    readings: Sequence[Reading],
    *,
    chunk_size: int = 2048,
    start: Prefilled | None = None,
) -> list[Outcome]:
    """Outcomes of a batch of readings, in order.

    Every prompt is read once. Candidates are scored on copies of the cache that it leaves (two
    copies of a long prompt's cache must fit in memory), and the answer is generated from it.

    Args:
        start: the prompts, where they were read already.

    Raises:
        ConfigError: a prompt or a candidate has no token, or there is no reading.
        StateError: a likelihood is not a finite number.
    """
    candidates = [
        [tokenizer(text, add_special_tokens=False)["input_ids"] for text in reading.candidates]
        for reading in readings
    ]
    if start is None:
        prompts = [reading.prompt for reading in readings]
        start = read_prompts(model, tokenizer, prompts, chunk_size=chunk_size)
    likelihoods = log_likelihoods(model, start, candidates)
    log_p = start.logits.log_softmax(-1)
    entropies = torch.special.entr(log_p.exp()).sum(-1)
    limits = [reading.max_new_tokens for reading in readings]
    ends = end_tokens(model, tokenizer)
    tokens = [[] for _ in readings]
    if max(limits):
        tokens = generate_from(model, start, max(limits), ends)
    return [
        Outcome(
            text=tokenizer.decode(until(ids[:limit], ends), skip_special_tokens=True),
            log_likelihoods=tuple(found.log_likelihood for found in row),
            token_counts=tuple(map(len, texts)),
            entropy=float(entropy),
        )
        for ids, limit, row, texts, entropy in zip(
            tokens, limits, likelihoods, candidates, entropies, strict=True
        )
    ]


def read_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, chunk_size: int = 2048
) -> Prefilled:
    """`read_rows` of the prompts' tokens, special ones included."""
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    return read_rows(model, rows, chunk_size=chunk_size)


@torch.no_grad()
def read_rows(model: Any, rows: Sequence[Sequence[int]], *, chunk_size: int = 2048) -> Prefilled:
    """Read rows of token ids as one batch, `chunk_size` tokens of each at a time.

    Raises:
        ConfigError: a row has no token, or there is no row.
        StateError: what follows has no finite likelihood.
        UnsupportedModelError: the model keeps no cache, or reads more than the rows.
    """
    ids, mask = _rows_of(model, rows)
    padding = None if bool(mask.all()) else mask
    with evaluating(model):
        cache, logits = prefill(model, ids, chunk_size=chunk_size, attention_mask=padding)
    if not torch.isfinite(logits).all():
        raise StateError(_NOT_FINITE)
    return Prefilled(ids, mask, cache, logits.float())


@torch.no_grad()
def read_rows_apart(
    model: Any,
    rows: Sequence[Sequence[int]],
    segment_length: int,
    context: Callable[[], AbstractContextManager[object]],
    *,
    chunk_size: int = 2048,
) -> Prefilled:
    """`read_rows`, where `context` is open for the last segment of each row alone: the segments of
    `segment_length` tokens before it are read first.

    Raises:
        As `read_rows` does.
    """
    borders = [(len(row) - 1) // segment_length * segment_length for row in rows]
    parts = list(zip(rows, borders, strict=True))
    last, mask = _rows_of(model, [row[at:] for row, at in parts])
    ids, cache = last, None
    with evaluating(model):
        if any(borders):
            before, known = (
                x.to(last.device) for x in _left_padded([row[:at] for row, at in parts])
            )
            cache, _ = prefill(model, before, chunk_size=chunk_size, attention_mask=known)
            ids, mask = torch.cat([before, last], dim=1), torch.cat([known, mask], dim=1)
        with context():
            output = model(
                input_ids=last, attention_mask=mask, past_key_values=cache, use_cache=True
            )
    logits = output.logits[:, -1].float()
    if not torch.isfinite(logits).all():
        raise StateError(_NOT_FINITE)
    return Prefilled(ids, mask, output.past_key_values, logits)


def _rows_of(model: Any, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows that can be read, on the model's device. [B, longest]"""
    empty = [place for place, row in enumerate(rows) if not row]
    if empty or not rows:
        raise ConfigError(f"{len(rows)} prompts, of which {empty} hold no token; give each a text")
    refuse_prompt_learning(model)
    ids, mask = _left_padded(rows)
    device = next(model.parameters()).device
    return ids.to(device), mask.to(device)


@torch.no_grad()
def log_likelihoods(
    model: Any, start: Prefilled, candidates: Sequence[Sequence[Sequence[int]]]
) -> list[list[Likelihood]]:
    """How likely each of a row's candidates (token ids) is after the row: `[row][candidate]`.

    `start` stays as it is. The same candidates of all rows run side by side, and after the last row
    comes the first: a switch that exchanges neighbouring rows exchanges prompts, never two
    candidates of one.

    Raises:
        ConfigError: a candidate has no token.
        StateError: a likelihood is not a finite number.
    """
    if any(not ids for row in candidates for ids in row):
        raise ConfigError("a candidate holds no token, so it has no likelihood; give it some text")
    log_p = start.logits.log_softmax(-1)
    best = log_p.argmax(-1).tolist()
    found = [
        [Likelihood(float(log_p[row, ids[0]]), best[row] == ids[0]) for ids in texts]
        for row, texts in enumerate(candidates)
    ]
    rounds = max(map(len, candidates))
    width = max(1, min(rounds, _COPY_BYTES // max(1, cache_bytes(start.cache))))
    for first in range(0, rounds, width):
        places = [
            (row, number)
            for number in range(first, min(first + width, rounds))
            for row in range(len(candidates))
        ]
        texts = [candidates[r][n] if n < len(candidates[r]) else [] for r, n in places]
        if max(map(len, texts)) < 2:
            continue
        with evaluating(model):
            rest = _continue(model, start, [row for row, _ in places], texts)
        for (row, number), text, more in zip(places, texts, rest, strict=True):
            if text:
                first_token = found[row][number]
                found[row][number] = Likelihood(
                    first_token.log_likelihood + more.log_likelihood,
                    first_token.greedy and more.greedy,
                )
    if not all(math.isfinite(candidate.log_likelihood) for row in found for candidate in row):
        raise StateError(_NOT_FINITE)
    return found


def _continue(
    model: Any, start: Prefilled, rows: Sequence[int], texts: Sequence[Sequence[int]]
) -> list[Likelihood]:
    """How likely each text is, but for its first token, after the prompt of its row.

    Texts are padded on the right, where padding changes nothing before it.
    """
    device = start.ids.device
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for place, text in enumerate(texts):
        ids[place, : len(text)] = torch.tensor(text, dtype=torch.long)
    ids = ids.to(device)
    lengths = torch.tensor([[len(text)] for text in texts], device=device)
    index = torch.tensor(rows, device=device)
    cache = copy.deepcopy(start.cache)
    cache.reorder_cache(index)  # the one selection of rows that every kind of layer has
    mask = torch.cat([start.mask[index], torch.ones_like(ids)], dim=1) if start.is_padded else None
    totals = torch.zeros(len(texts), dtype=torch.float64)
    greedy = torch.ones(len(texts), dtype=torch.bool)
    read, last = start.ids.shape[1], ids.shape[1] - 1
    step = max(1, _POSITIONS_AT_ONCE // len(texts))
    for begin in range(0, last, step):
        end = min(begin + step, last)
        padding = padding_arguments(model, mask, read + begin, read + end)
        output = model(
            input_ids=ids[:, begin:end], past_key_values=cache, use_cache=True, **padding
        )
        cache, target = output.past_key_values, ids[:, begin + 1 : end + 1]
        log_p = output.logits.float().log_softmax(-1)
        counted = torch.arange(begin + 1, end + 1, device=device) < lengths
        chosen = log_p.gather(-1, target[..., None])[..., 0].double()
        totals += torch.where(counted, chosen, 0.0).sum(-1).cpu()
        greedy &= ((log_p.argmax(-1) == target) | ~counted).all(-1).cpu()
    return [Likelihood(*pair) for pair in zip(totals.tolist(), greedy.tolist(), strict=True)]


@torch.no_grad()
def generate_from(
    model: Any, start: Prefilled, max_new_tokens: int, ends: Sequence[int]
) -> list[list[int]]:
    """Greedy continuations of at most `max_new_tokens` >= 1 tokens; uses up the cache of `start`.

    Rows go on until all have met one of `ends`: cut each with `until`. The checkpoint's own
    generation settings (sampling, penalties, forced or forbidden tokens, a static cache) are left
    out: the argmax of the model's logits is what is measured.
    """
    tokens = start.logits.argmax(-1, keepdim=True)
    if max_new_tokens > 1:
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            use_cache=True,
            max_new_tokens=max_new_tokens - 1,
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else 0,
        )
        # The model inside a PEFT wrapper: the wrapper would put its own settings in their place.
        inner = unwrapped(model)
        with evaluating(model), without_own_settings(inner):
            tokens = inner.generate(
                input_ids=torch.cat([start.ids, tokens], dim=1),
                attention_mask=torch.cat([start.mask, torch.ones_like(tokens)], dim=1),
                past_key_values=start.cache,
                generation_config=settings,
            )[:, start.ids.shape[1] :]
    return tokens.tolist()


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """`generate` fills whatever a config leaves unset from the model's own."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def until(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    """What comes before the first of `ends`."""
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[:stop])


def end_tokens(model: Any, tokenizer: Any = None) -> list[int]:
    """Tokens that end an answer, as the checkpoint's generation settings and tokenizer say."""
    stated = unwrapped(model).generation_config.eos_token_id
    found = [*(stated if isinstance(stated, list) else [stated])]
    found += [] if tokenizer is None else [tokenizer.eos_token_id]
    return sorted({token for token in found if token is not None})


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, [B, longest]."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = torch.tensor(row)
        mask[place, longest - len(row) :] = 1
    return ids, mask
