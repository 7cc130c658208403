"""EM-LLM: events against their definition on the model's own logits, and the methods that it
reduces to.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest
import torch
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass, positions_of
from tolerances import REORDERED, WRONG

from memretrofit import patch
from memretrofit.errors import ConfigError, StateError
from memretrofit.methods.em_llm import EM_LLM, EMLLMConfig
from memretrofit.methods.infllm import InfLLMConfig
from memretrofit.patching.controls import intercepted, window_override

WINDOW, SINKS, LENGTH = 8, 3, 60
SMALL = EMLLMConfig(
    sliding_window=WINDOW,
    num_sink_tokens=SINKS,
    min_event_size=2,
    max_event_size=5,
    recalled_tokens=10,
)


def model_with(config, family="llama", **build_options):
    return patch(build(family, **build_options), config)


def sizes_by_hand(ids, logits, left: int) -> list[int]:
    """Sizes of the events that are complete once `left` tokens of one row have left the window."""
    steps = logits.double().log_softmax(-1)
    surprises = [math.nan] + [-steps[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
    sizes = [0]
    for t in range(SINKS, SINKS + left):
        before = [x for x in surprises[max(t - WINDOW, 0) : t] if not math.isnan(x)]
        stands_out = surprises[t] > statistics.mean(before) + statistics.stdev(before)
        full = sizes[-1] == SMALL.max_event_size
        if full or (stands_out and sizes[-1] >= SMALL.min_event_size):
            sizes.append(0)
        sizes[-1] += 1
    return sizes if sizes[-1] == SMALL.max_event_size else sizes[:-1]


def sizes_of(cache, row: int = 0, layer: int = 0) -> list[int]:
    """Sizes of the events that a layer of a cache holds."""
    held = cache.layers[layer].state[2][row].flatten()
    return [int(x) for x in held if x]


@pytest.mark.parametrize("ends", [(), (11,), (30, 31, 45), range(1, LENGTH)])
def test_events_are_cut_where_the_models_own_logits_are_surprised(ends):
    """In every layer, from the logits that the patched model returned."""
    model, ids = model_with(SMALL), tokens(2, LENGTH)
    logits, cache = in_pieces(model, ids, ends)
    for row in range(2):
        expected = sizes_by_hand(ids[row], logits[row], LENGTH - WINDOW - SINKS)
        assert sizes_of(cache, row, 0) == sizes_of(cache, row, 1) == expected
        assert len(set(expected)) > 2  # witness: these are no uniform blocks
    wrong = sizes_by_hand(ids[0], logits[0].roll(1, 0), LENGTH - WINDOW - SINKS)
    assert sizes_of(cache) != wrong  # witness: logits of the token before


def test_events_of_a_padded_row_are_those_of_the_row():
    model = model_with(SMALL)
    rows = [tokens(1, length, seed=n)[0] for n, length in enumerate((LENGTH, 37))]
    ids, mask = left_padded(rows, extra=2)
    _, cache = in_pieces(model, ids, (13, 40, 41), mask=mask)
    for n, row in enumerate(rows):
        _, alone = in_pieces(model, row[None], (20,))
        assert sizes_of(cache, n) == sizes_of(alone)


def test_the_mean_key_of_an_event_is_that_of_its_tokens():
    """From the keys that the store holds, in order of arrival."""
    _, cache = in_pieces(model_with(SMALL), tokens(2, LENGTH), (25, 26))
    store, means, _, _ = cache.layers[1].state
    keys, _ = store.live()
    for row in range(2):
        begin = 0
        for n, size in enumerate(sizes_of(cache, row, 1)):
            expected = keys[row, :, begin : begin + size].mean(1)
            assert apart(means[row, :, n], expected) < REORDERED
            begin += size


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
@pytest.mark.parametrize("positions", ["clamp", "absolute"])
def test_events_of_one_size_without_neighbours_are_infllm(granularity, positions):
    shared = {
        "sliding_window": WINDOW,
        "num_sink_tokens": SINKS,
        "granularity": granularity,
        "positions": positions,
    }
    uniform = EMLLMConfig(
        min_event_size=4, max_event_size=4, recalled_tokens=8, contiguity=0.0, **shared
    )
    ids = tokens(2, LENGTH)
    expected = one_pass(model_with(InfLLMConfig(block_size=4, top_k=2, **shared)), ids)
    assert apart(one_pass(model_with(uniform), ids), expected) < REORDERED
    for change in ({"contiguity": 0.5}, {"min_event_size": 2}):
        assert apart(one_pass(model_with(replace(uniform, **change)), ids), expected) > WRONG


def test_all_events_at_their_true_places_are_full_attention():
    ids = tokens(2, LENGTH)
    everything = replace(SMALL, recalled_tokens=1000, positions="absolute")
    expected = one_pass(build("llama"), ids)
    assert apart(one_pass(model_with(everything), ids), expected) < REORDERED
    clamped = model_with(replace(everything, positions="clamp"))
    assert apart(one_pass(clamped, ids), expected) > WRONG


def test_another_window_for_one_forward_is_a_patch_with_it():
    """The reader's own cache takes the window of the forward."""
    ids, model = tokens(2, LENGTH), model_with(SMALL)
    with window_override(model, sliding_window=14, num_sink_tokens=2):
        found = one_pass(model, ids)
    other = model_with(replace(SMALL, sliding_window=14, num_sink_tokens=2))
    assert torch.equal(found, one_pass(other, ids))
    assert apart(found, one_pass(model, ids)) > WRONG


def test_rows_that_begin_with_padding_of_any_length_cut_alike():
    """Padding longer than window and sinks together: whole pieces hold nothing."""
    model, row = model_with(SMALL), tokens(1, 30)[0]
    ids, mask = left_padded([row], extra=29)
    found = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    assert apart(found[0, 29:], one_pass(model, row[None])[0]) < REORDERED


def test_a_memory_whose_text_is_not_read_in_pieces_says_so():
    model = model_with(SMALL)
    remember = intercepted(model, lambda call: call.remember())
    with remember, pytest.raises(StateError, match="pieces"):
        one_pass(model, tokens(1, 30))


def test_sizes_that_cannot_be_are_refused():
    for wrong, message in (
        ({"min_event_size": 6}, "max_event_size=5 is not between"),
        ({"max_event_size": 9}, "sliding_window=8"),
        ({"contiguity": 1.0}, "leaves none"),
        ({"recalled_tokens": 0}, "recalled_tokens"),
        ({"surprise_threshold": -1.0}, "surprise_threshold"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(SMALL, **wrong)
    assert (EM_LLM.similar_tokens, EM_LLM.near_tokens) == (1434, 614)
