"""Every way of generating in every family: equal to its reference, or refused.

While nothing is evicted (nothing learnt by a bank, one open segment) the reference is the unpatched
model. Afterwards it is a loop over plain forwards of the whole text, without a cache.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from contract.arms import EXACT, patched
from contract.bank_arms import banked
from contract.families import build, tokens
from contract.runs import left_padded, one_pass
from contract.segment_arms import SEGMENT, reading
from torch import Tensor
from transformers import CompileConfig, PreTrainedModel, QuantizedCache

from memretrofit.errors import UnsupportedModelError
from memretrofit.patching.controls import ATTRIBUTE
from memretrofit.patching.segment_visit import SegmentLedger

SHORT, LONG, NEW = 4, 20, 5
assert SHORT + NEW - 1 <= SEGMENT < EXACT < LONG < 3 * SEGMENT < LONG + NEW
"""Of a short prompt nothing is evicted; behind a long one a segment ends."""
FP8 = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}

Call = Callable[[PreTrainedModel, Tensor], Tensor]


def generate(model: PreTrainedModel, ids: Tensor, **how: Any) -> Tensor:
    """Greedy, unless `how` says otherwise."""
    torch.manual_seed(3)
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False} | how)


def by(**how: Any) -> Call:
    """`generate` in some way."""
    return functools.partial(generate, **how)


def without_cache(**how: Any) -> Call:
    """The same way, with one forward over the whole text for every token."""
    return functools.partial(generate, use_cache=False, **how)


@torch.no_grad()
def loop(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Greedy decoding without `generate`."""
    for _ in range(NEW):
        ids = torch.cat([ids, one_pass(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids


@torch.no_grad()
def loop_on_fp8(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The same on a quantised cache: what it rounds changes the text."""
    cache, new = QuantizedCache("fp8", model.config), ids
    for _ in range(NEW):
        new = model(new, past_key_values=cache).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
    return ids


def row_by_row(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What two rows of different lengths go on with, each alone."""
    return torch.cat([loop(model, row[None])[:, -NEW:] for row in (ids[0], ids[1, 2:])])


def padded_rows(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The same in one left-padded batch."""
    both, mask = left_padded([ids[0], ids[1, 2:]], extra=1)
    return generate(model, both, attention_mask=mask)[:, -NEW:]


def assisted(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """By a smaller opinion: another model's."""
    return generate(model, ids, assistant_model=build("llama", seed=7))


def in_two_calls(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The second goes on with the cache of the first."""
    first = generate(model, ids, max_new_tokens=2, return_dict_in_generate=True)
    cache = first.past_key_values
    return generate(model, first.sequences, max_new_tokens=NEW - 2, past_key_values=cache)


def stopped(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """By a criterion of the caller, two tokens early; the rest from the cache that was left."""
    end = ids.shape[1] + NEW - 2
    stop = [lambda ids, scores: torch.full((len(ids),), ids.shape[1] >= end)]
    first = generate(model, ids, stopping_criteria=stop, return_dict_in_generate=True)
    assert first.sequences.shape[1] == end
    cache = first.past_key_values
    return generate(model, first.sequences, max_new_tokens=2, past_key_values=cache)


def own_loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **inputs):
    """A decoding loop of the caller, as `custom_generate` takes it."""
    while not bool(stopping_criteria(input_ids, None).all()):
        given = model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=inputs.pop("next", None), **inputs
        )
        output = model(**given)
        input_ids = torch.cat([input_ids, output.logits[:, -1:].argmax(-1)], dim=1)
        inputs = model._update_model_kwargs_for_generation(output, inputs) | {"next": 1}
    return input_ids


def from_embeddings(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """`inputs_embeds`; new tokens alone come back."""
    embeds = model.get_input_embeddings()(ids)
    new = generate(model, None, inputs_embeds=embeds, attention_mask=torch.ones_like(ids))
    return torch.cat([ids, new], dim=1)


@torch.no_grad()
def last_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """`logits_to_keep` of a forward."""
    return model(ids, logits_to_keep=3).logits.argmax(-1)


def last_of_all_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The same of every logit."""
    return one_pass(model, ids)[:, -3:].argmax(-1)


def together(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Continuous batching."""
    return torch.tensor([x.generated_tokens for x in model.generate_batch(ids.tolist()).values()])


class Backend:
    """Runs graphs as they are, and counts them. What was compiled before is forgotten: torch gives
    up on code that it has compiled often.
    """

    def __init__(self) -> None:
        torch.compiler.reset()
        self.graphs = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Backend:
        return self  # `generate` copies its config

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward

    def ran(self, model: PreTrainedModel) -> bool:
        """Whether anything was compiled, or nothing of a model that reads in segments."""
        ledger = getattr(model, ATTRIBUTE, None)
        return bool(self.graphs) is not isinstance(ledger, SegmentLedger)


@torch.no_grad()
def compiled(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What a compiled model predicts, without a cache."""
    backend = Backend()
    found = torch.compile(model, backend=backend)(ids, use_cache=False).logits.argmax(-1)
    assert backend.ran(model)
    return found


def predicted(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The same of the model as it is."""
    return one_pass(model, ids).argmax(-1)


def compiled_decoding(model: PreTrainedModel, ids: Tensor, **how: Any) -> Tensor:
    """`generate` over a compiled forward."""
    backend, eager = Backend(), model.forward
    model.forward = torch.compile(eager, backend=backend, **how)
    try:
        found = generate(model, ids)
    finally:
        model.forward = eager
    assert backend.ran(model)
    return found


@torch.no_grad()
def whole_steps(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Each decoding step in one graph, after a prompt that is read as always."""
    backend = Backend()
    step = torch.compile(model, backend=backend, fullgraph=True)
    output = model(ids, use_cache=True)
    for n in range(NEW):
        ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], dim=1)
        if n < NEW - 1:
            output = step(ids[:, -1:], past_key_values=output.past_key_values)
    assert backend.ran(model)
    return ids


def compiled_static(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What `generate` does on its own on a GPU: decoding steps are compiled."""
    how = CompileConfig(backend=Backend(), mode=None)
    how._compile_all_devices = True  # as Transformers' own tests do on a CPU
    found = generate(model, ids, cache_implementation="static", compile_config=how)
    assert how.backend.ran(model)
    return found


class Way(NamedTuple):
    """One way of generating: what becomes of it in each family, how to call it, what it equals."""

    attention: str
    ffn: str
    sequence: str
    call: Call
    reference: Call = loop
    rows: int = 2


EQUAL, REFUSED = "equal", "refused"
ABSENT = "not in Transformers 5"
"""It moved to the Hub, and asks for trust_remote_code: of a plain model, too."""
WHOLE = "refused by torch"
UNCOMPILED = "equal, runs uncompiled"

SAMPLING = {"do_sample": True, "temperature": 0.7, "top_k": 20}
BEAMS = {"num_beams": 3}
BEAM_SAMPLE = {"do_sample": True, "num_beams": 3, "num_return_sequences": 2}
GUIDANCE = {"guidance_scale": 1.5}

WAYS = {
    "greedy": Way(EQUAL, EQUAL, EQUAL, by()),
    "left-padded batch": Way(EQUAL, EQUAL, EQUAL, padded_rows, row_by_row),
    "sampling with a seed": Way(EQUAL, EQUAL, EQUAL, by(**SAMPLING), without_cache(**SAMPLING)),
    "beam search": Way(EQUAL, EQUAL, EQUAL, by(**BEAMS), without_cache(**BEAMS)),
    "beam sample": Way(EQUAL, EQUAL, EQUAL, by(**BEAM_SAMPLE), without_cache(**BEAM_SAMPLE)),
    "classifier-free guidance": Way(EQUAL, EQUAL, EQUAL, by(**GUIDANCE), without_cache(**GUIDANCE)),
    "prompt lookup": Way(EQUAL, EQUAL, EQUAL, by(prompt_lookup_num_tokens=3), rows=1),
    "assisted by another model": Way(EQUAL, EQUAL, EQUAL, assisted, rows=1),
    "early exit": Way(EQUAL, EQUAL, EQUAL, by(assistant_early_exit=1), rows=1),
    "use_cache=False": Way(EQUAL, EQUAL, EQUAL, by(use_cache=False)),
    "prefill in chunks": Way(EQUAL, EQUAL, EQUAL, by(prefill_chunk_size=3)),
    "going on with a returned cache": Way(EQUAL, EQUAL, EQUAL, in_two_calls),
    "stopping_criteria": Way(EQUAL, EQUAL, EQUAL, stopped),
    "logits_to_keep": Way(EQUAL, EQUAL, EQUAL, last_logits, last_of_all_logits),
    "custom_generate, a function": Way(EQUAL, EQUAL, EQUAL, by(custom_generate=own_loop)),
    "inputs_embeds": Way(EQUAL, REFUSED, EQUAL, from_embeddings),
    "static cache": Way(REFUSED, EQUAL, REFUSED, by(cache_implementation="static")),
    "quantised cache": Way(REFUSED, EQUAL, REFUSED, by(**FP8), loop_on_fp8),
    "continuous batching": Way(REFUSED, REFUSED, REFUSED, together),
    "paged cache": Way(REFUSED, REFUSED, REFUSED, by(cache_implementation="paged")),
    "contrastive search": Way(ABSENT, ABSENT, ABSENT, by(penalty_alpha=0.6, top_k=4)),
    "DoLa": Way(ABSENT, ABSENT, ABSENT, by(dola_layers="high")),
    "group beam search": Way(ABSENT, ABSENT, ABSENT, by(num_beams=4, num_beam_groups=2)),
    "torch.compile, no cache": Way(EQUAL, EQUAL, UNCOMPILED, compiled, predicted),
    "torch.compile": Way(EQUAL, EQUAL, UNCOMPILED, compiled_decoding),
    "torch.compile, static cache": Way(REFUSED, EQUAL, REFUSED, compiled_static),
    "torch.compile(fullgraph=True), steps": Way(EQUAL, WHOLE, WHOLE, whole_steps),
    "torch.compile(fullgraph=True), prompt": Way(
        WHOLE, WHOLE, WHOLE, functools.partial(compiled_decoding, fullgraph=True)
    ),
}
ARMS = {
    "window_sinks": ("attention", lambda live: patched("llama", "window_sinks")),
    "ahn": ("attention", lambda live: patched("llama", "ahn")),
    "hierarchical_ffn": ("ffn", lambda live: banked("llama", "hierarchical_ffn", live=live)),
    "armt": ("sequence", lambda live: reading("llama", "armt", live=live)),
}
"""Methods of each family. Attention is exact in the window whatever its memory has learnt."""

model_of = functools.cache(lambda arm, live: ARMS[arm][1](live))
base = functools.cache(lambda: build("llama"))


def prompt(length: int, rows: int) -> Tensor:
    """A text that returns to itself, so that prompt lookup finds candidates."""
    return tokens(rows, 6).repeat(1, 4)[:, :length]


@functools.cache
def expected(arm: str | None, reference: Call, length: int, rows: int) -> Tensor:
    """What the reference says of a live model, or of the plain one."""
    return reference(base() if arm is None else model_of(arm, True), prompt(length, rows))


def cells(*outcomes: str) -> Any:
    """The ways and arms that come out so; those that compile are slow."""
    return pytest.mark.parametrize(
        ("way", "arm"),
        [
            pytest.param(way, arm, marks=[pytest.mark.slow] * way.startswith("torch.compile"))
            for way, row in WAYS.items()
            for arm, (family, _) in ARMS.items()
            if getattr(row, family) in outcomes
        ],
    )


@cells(EQUAL, UNCOMPILED)
def test_it_is_the_unpatched_model_while_nothing_is_evicted(way, arm):
    row = WAYS[way]
    found = row.call(model_of(arm, False), prompt(SHORT, row.rows))
    assert torch.equal(found, expected(None, row.call, SHORT, row.rows))


@cells(EQUAL, UNCOMPILED)
def test_it_is_its_reference_when_something_is_evicted(way, arm):
    row = WAYS[way]
    found = row.call(model_of(arm, True), prompt(LONG, row.rows))
    assert torch.equal(found, expected(arm, row.reference, LONG, row.rows))


@cells(REFUSED)
def test_it_is_refused_and_leaves_the_model_as_it_was(way, arm):
    model, ids = model_of(arm, True), prompt(LONG, 2)
    with pytest.raises(UnsupportedModelError):
        WAYS[way].call(model, ids)
    assert torch.equal(generate(model, ids), expected(arm, loop, LONG, 2))


@cells(ABSENT)
def test_transformers_refuses_it_with_or_without_a_memory(way, arm):
    for model in (base(), model_of(arm, True)):
        with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
            WAYS[way].call(model, prompt(LONG, 1))


@cells(WHOLE)
def test_one_graph_of_all_is_refused_by_torch(way, arm):
    """With our reason; of a model that reads in segments it finds nothing to compile."""
    reasons = "a memory keeps state of its own|found no compiled frames"
    with pytest.raises(RuntimeError, match=reasons):
        WAYS[way].call(model_of(arm, True), prompt(LONG, 1))


@pytest.mark.parametrize("arm", list(ARMS))
def test_the_memory_matters(arm):
    """Witness: the long prompts above tell a model with a memory from one without."""
    assert not torch.equal(expected(arm, loop, LONG, 2), expected(None, loop, LONG, 2))


def test_a_quantised_cache_matters():
    """Witness: its reference is another text."""
    on_any, on_fp8 = (expected("hierarchical_ffn", x, LONG, 2) for x in (loop, loop_on_fp8))
    assert not torch.equal(on_any, on_fp8)


def test_the_page_shows_this_table():
    page = Path(__file__).parents[2] / "docs" / "generating.md"
    shown = re.findall(r"^\| (.*) \| (.*) \| (.*) \| (.*) \|$", page.read_text("utf-8"), re.M)
    assert shown[0] == ("way", "attention", "FFN", "sequence")
    assert shown[1:] == [(name, way.attention, way.ffn, way.sequence) for name, way in WAYS.items()]
