"""The arms of a task run: one model, made into each thing that it is compared with, as it reads.

An arm that is the same computation as another is the same object, so that it is run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from memretrofit.config import exact_tokens
from memretrofit.description import base_parameters
from memretrofit.errors import ConfigError, did_you_mean
from memretrofit.evaluation.arm_table import TASK_ARMS
from memretrofit.evaluation.arms import fresh_values, has_window, holds_state, memory_values
from memretrofit.evaluation.cost import cache_bytes, prefill, step_ms
from memretrofit.evaluation.likelihood import Arm
from memretrofit.evaluation.reader import (
    Answerer,
    Outcome,
    Reading,
    read,
    read_prompts,
    read_rows_apart,
)
from memretrofit.evaluation.runs.baselines import bm25, oprm
from memretrofit.evaluation.task import token_counter
from memretrofit.hub.adapter import is_peft
from memretrofit.methods import get_method
from memretrofit.methods.window_sinks import WindowSinksConfig
from memretrofit.patching.controls import (
    memory_disabled,
    memory_silenced,
    state_carried,
    state_shuffled,
    writes_disabled,
)
from memretrofit.patching.reach import longest_text
from memretrofit.patching.wrapping import evaluating, positions_of, unwrapped
from memretrofit.retrofit import (
    is_patched,
    memory_parameters,
    patched_config,
    patched_for_now,
)

COST_TOKENS = 16
"""Decoding steps whose median time an arm's cost is."""


@dataclass(frozen=True, eq=False)
class ModelArm:
    """Answers with the model, inside a context that makes it the arm."""

    model: Any
    tokenizer: Any
    context: Arm
    chunk_size: int
    has_memory: bool = False
    """Whether the memory's parameters take part."""
    has_adapter: bool = False
    """Whether a PEFT adapter does."""
    memory_is_trained: bool = False
    """Whether those that take part were trained."""
    of_rows: bool = False
    """Whether rows read each other's states: then a batch has at least two, and the arm's cost is
    that without the exchange."""
    carries: bool = False
    """Whether every row begins with the state that the next row's whole text has left."""
    segment_length: int | None = None
    """Tokens of a segment, where `context` is open for the last one of each prompt alone."""
    positions: int | None = None
    """Tokens that it can read at most; None: any number."""

    def __call__(self, readings: Sequence[Reading]) -> list[Outcome]:
        """Outcomes of a batch, in order."""
        start = None
        if self.segment_length is not None:
            rows = [self.tokenizer(reading.prompt)["input_ids"] for reading in readings]
            start = read_rows_apart(
                self.model, rows, self.segment_length, self.context, chunk_size=self.chunk_size
            )
        with self.context(), self._state_of([reading.prompt for reading in readings]):
            return read(
                self.model, self.tokenizer, readings, chunk_size=self.chunk_size, start=start
            )

    def _state_of(self, prompts: list[str]) -> AbstractContextManager[object]:
        if not self.carries:
            return nullcontext()
        others = prompts[1:] + prompts[:1]
        left = read_prompts(self.model, self.tokenizer, others, chunk_size=self.chunk_size)
        return state_carried(self.model, left.cache)

    @torch.no_grad()
    def cost(self, reading: Reading) -> dict[str, int | float]:
        """Tokens of one prompt, bytes of the cache after it, milliseconds of a decoding step, and
        parameters.

        `active_parameters` are those that take part in one token: of routed experts the share that
        a token is sent to. `trained_parameters` are those of them that were added and trained.
        """
        ids = torch.tensor([self.tokenizer(reading.prompt)["input_ids"]])
        ids = ids.to(next(self.model.parameters()).device)
        context = nullcontext if self.of_rows else self.context
        with context(), evaluating(self.model):
            cache, logits = prefill(self.model, ids, chunk_size=self.chunk_size)
            held = cache_bytes(cache)
            time = step_ms(self.model, cache, logits, COST_TOKENS)
        memory = _memory_parameters(self.model) if self.has_memory else 0
        adapter = _adapter_parameters(self.model) if self.has_adapter else 0
        return {
            "tokens": ids.shape[1],
            "cache_bytes": held,
            "ms_per_token": time,
            "trained_parameters": adapter + (memory if self.memory_is_trained else 0),
            "active_parameters": _active_parameters(self.model) + memory + adapter,
        }


def answerers_of(
    model: Any,
    tokenizer: Any,
    *,
    arms: Sequence[str] = (),
    window: int | None = None,
    chunk_size: int = 2048,
    seed: int = 0,
) -> dict[str, Answerer]:
    """The arms of a model, in the order of `TASK_ARMS`.

    A patched model has all of them, but for `window` where its memory stands beside no window.
    `full` and `window` are its base model, without any adapter; `untrained` is the base model with
    a fresh memory. A model without memory has `full`, `bm25` and `oprm`, and with `window` also
    that, which patches the model for as long as it answers.

    The arms of a memory read as far as its distances stay within the positions of the model
    (`longest_text`): any length where it reads in segments, or where what is far stands near, as
    under `positions="clamp"`. `full` reads as far as the model. Text baselines read any length: as
    many tokens at once as one segment has, where there are segments.

    Two names have the same object where they are the same computation: `zeroed` and `window` where
    there is no adapter; `untrained` and `window` where a fresh memory of the method is silent
    (up to the rounding that the method's identity test allows); all controls of a method that holds
    no state.

    Args:
        model: any causal language model of Transformers, patched or not.
        tokenizer: its tokenizer.
        arms: names to take; none takes all.
        window: tokens attended exactly by the window arm of a model without memory.
        chunk_size: tokens of a prompt per forward.
        seed: of the untrained memory.

    Raises:
        ConfigError: an unknown arm, one that this model cannot be, or a window that does not fit.
        StateError: the memory is of a family that no task is asked of.
    """
    if is_patched(model) and window is not None:
        raise ConfigError(
            f"window={window}: a patched model's window arm, if it has one, has the window of its "
            f"method, {patched_config(model)}. Leave --window out."
        )
    make = _patched_arms if is_patched(model) else _base_arms
    found: dict[str, Answerer] = dict(make(model, tokenizer, window, chunk_size, seed))
    count = token_counter(tokenizer)
    found["bm25"] = bm25(found["full"], count, budget=kept_exactly(model, window))
    found["oprm"] = oprm(found["full"], count, chunk_tokens=segment_length(model))
    faults = [
        f"unknown arm {a!r}; {did_you_mean(a, TASK_ARMS)}" for a in arms if a not in TASK_ARMS
    ]
    faults += [
        f"{arm!r} needs {_needed(arm, model)}; this {type(unwrapped(model)).__name__} has "
        f"{', '.join(found)}"
        for arm in arms
        if arm in TASK_ARMS and arm not in found
    ]
    if faults:
        raise ConfigError.listing("arms", faults)
    return {arm: found[arm] for arm in TASK_ARMS if arm in found and (not arms or arm in arms)}


def _needed(arm: str, model: Any) -> str:
    if is_patched(model):
        return "a memory beside a sliding window"
    return "--window N" if arm == "window" else "a patched model"


def same_computations(answerers: Mapping[str, Answerer]) -> dict[str, str]:
    """Arm -> the earlier arm that is the same computation."""
    names = list(answerers)
    first = {name: next(n for n in names if answerers[n] is answerers[name]) for name in names}
    return {name: other for name, other in first.items() if other != name}


def _base_arms(
    model: Any, tokenizer: Any, window: int | None, chunk_size: int, seed: int
) -> dict[str, Answerer]:
    arm = partial(
        ModelArm,
        model,
        tokenizer,
        chunk_size=chunk_size,
        has_adapter=is_peft(model),
        positions=positions_of(model),
    )
    found: dict[str, Answerer] = {"full": arm(nullcontext)}
    if window is not None:
        bounded = partial(
            patched_for_now, unwrapped(model), WindowSinksConfig(sliding_window=window)
        )
        with bounded():  # what does not fit is told before anything is read
            pass
        found["window"] = arm(bounded)
    return found


def _patched_arms(
    model: Any, tokenizer: Any, window: int | None, chunk_size: int, seed: int
) -> dict[str, Answerer]:
    adapted, windowed, most = is_peft(model), has_window(model), positions_of(model)
    stateless = not holds_state(model)
    fresh_is_silent = stateless or get_method(patched_config(model).method).identity == "window"
    arm = partial(
        ModelArm,
        model,
        tokenizer,
        chunk_size=chunk_size,
        positions=longest_text(model),
    )
    is_trained = memory_state(model, seed) == "trained"
    own = partial(arm, has_memory=True, has_adapter=adapted, memory_is_trained=is_trained)

    def base(*switches: Arm) -> Arm:
        """The base model, whatever adapter there is, inside `switches`."""
        return partial(_within, [*switches, model.disable_adapter] if adapted else switches)

    def control(
        switch: Callable[[Any], AbstractContextManager[object]], **options: Any
    ) -> Answerer:
        return trained if stateless else own(partial(switch, model), **options)

    trained = own(nullcontext)
    # what is read alone is read by the base model beside a window, and else with a memory's own
    # parameters
    zeroed = control(memory_silenced, has_memory=not windowed)
    near = arm(base(partial(memory_silenced, model))) if adapted else zeroed
    untrained: Answerer = near
    if not fresh_is_silent:
        values = fresh_values(model, seed)
        untrained = arm(base(partial(memory_values, model, values)), has_memory=True)
    return {
        "full": arm(base(partial(memory_disabled, model)), positions=most),
        **({"window": near} if windowed else {}),
        "untrained": untrained,
        "trained": trained,
        "zeroed": zeroed,
        # without a window, to write nothing and to read what nobody wrote come to the same
        "no_write": control(writes_disabled) if windowed else zeroed,
        # a memory that is read and written in turns hands on what it reads: were all segments to
        # read the neighbour's, a text would meet itself again after as many as there are rows
        "shuffled": control(state_shuffled, of_rows=True, segment_length=segment_length(model)),
        "stale": trained if stateless else own(nullcontext, of_rows=True, carries=True),
    }


@contextmanager
def _within(contexts: Sequence[Arm]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context())
        yield


def memory_state(model: Any, seed: int = 0) -> str:
    """`trained`; `untrained` where the memory is as a fresh patch makes it; `none` where there is
    none, or none that has parameters.

    What a fresh patch draws at random differs from patch to patch and says nothing, unless it was
    drawn with `seed`; a memory is untrained where all the rest is untouched.
    """
    own = memory_parameters(model) if is_patched(model) else {}
    if not own:
        return "none"
    fresh, other = fresh_values(model, seed), fresh_values(model, seed + 1)
    untouched = {name for name, p in own.items() if torch.equal(fresh[name].to(p), p.data)}
    settled = {name for name in own if torch.equal(fresh[name], other[name])}
    return "untrained" if untouched >= (settled or own.keys()) else "trained"


def segment_length(model: Any) -> int | None:
    """Tokens of a segment; None for a model that does not read in segments."""
    return getattr(patched_config(model), "segment_length", None) if is_patched(model) else None


def kept_exactly(model: Any, window: int | None = None) -> int | None:
    """`exact_tokens` of the memory, or of a base model's window; None without either."""
    if is_patched(model):
        return exact_tokens(patched_config(model))
    return None if window is None else exact_tokens(WindowSinksConfig(sliding_window=window))


def _memory_parameters(model: Any) -> int:
    return sum(p.numel() for p in memory_parameters(model).values())


def _adapter_parameters(model: Any) -> int:
    base = sum(p.numel() for _, p in base_parameters(model))
    memory = _memory_parameters(model) if is_patched(model) else 0
    return sum(p.numel() for p in model.parameters()) - base - memory


def _active_parameters(model: Any) -> int:
    """Parameters of the base model that one token meets."""
    config: Any = unwrapped(model).config.get_text_config(decoder=True)  # type: ignore[union-attr]
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    experts = next((n for name in names if (n := getattr(config, name, None))), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    share = chosen / experts if chosen and experts else 1.0
    return round(
        sum(
            p.numel() * (share if ".experts." in name else 1.0)
            for name, p in base_parameters(model)
        )
    )
