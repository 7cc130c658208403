"""EM-LLM: events against their definition on the model's own logits, and the methods that it
reduces to.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import replace

import pytest
import torch
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass, positions_of
from modules.edges_by_hand import begins_by_hand
from tolerances import REORDERED, WRONG

from memretrofit import patch
from memretrofit.errors import ConfigError, StateError
from memretrofit.methods.em_llm import EM_LLM, EMLLMConfig
from memretrofit.methods.infllm import InfLLMConfig
from memretrofit.ops.segment import conductance, modularity
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


def asks_by_hand(ids, logits, window: int = WINDOW) -> list[bool]:
    """Where one row's own logits were surprised, beyond the sinks."""
    steps = logits.double().log_softmax(-1)
    surprises = [math.nan] + [-steps[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
    asks = [False] * SINKS
    for t in range(SINKS, len(ids)):
        before = [x for x in surprises[max(t - window, 0) : t] if not math.isnan(x)]
        asks.append(surprises[t] > statistics.mean(before) + statistics.stdev(before))
    return asks


def sizes_by_hand(ids, logits, left: int) -> list[int]:
    """Sizes of the events that are complete once `left` tokens of one row have left the window."""
    asks, sizes = asks_by_hand(ids, logits), [0]
    for t in range(SINKS, SINKS + left):
        full = sizes[-1] == SMALL.max_event_size
        if full or (asks[t] and sizes[-1] >= SMALL.min_event_size):
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


# Where events are cut

REFINED = replace(SMALL, sliding_window=16, max_event_size=7, refinement="modularity")


def refined_by_hand(ids, logits, cache, row: int, quality) -> list[int]:
    """Sizes of the events of one row, from its logits and from the keys that all layers store."""
    stored = [layer.state[0].live()[0][row] for layer in cache.layers]
    keys = torch.cat([x.transpose(0, 1).flatten(1) for x in stored], dim=-1)
    asks = asks_by_hand(ids[row], logits[row], REFINED.sliding_window)[SINKS:]
    begins = begins_by_hand([int(x) for x in asks[: len(keys)]], keys, quality, 2, 7)
    return [b - a for a, b in itertools.pairwise(begins)]


@pytest.mark.parametrize("ends", [(), (11,), (30, 31, 45), range(25, 40)])
@pytest.mark.parametrize("refinement", ["modularity", "conductance"])
def test_refined_events_fall_apart_best_by_the_keys_of_all_layers(refinement, ends):
    quality = {"modularity": modularity, "conductance": lambda a: -conductance(a)}
    ids = tokens(2, 90)
    logits, cache = in_pieces(model_with(replace(REFINED, refinement=refinement)), ids, ends)
    for row in range(2):
        expected = refined_by_hand(ids, logits, cache, row, quality[refinement])
        assert len(expected) > 8
        for layer in range(2):
            assert sizes_of(cache, row, layer)[: len(expected)] == expected
    asked = refined_by_hand(ids, logits, cache, 0, lambda a: torch.arange(len(a)) * 1.0)
    assert sizes_of(cache)[: len(asked)] != asked  # witness: edges where surprise put them


def test_refined_events_of_a_padded_row_are_those_of_the_row():
    model = model_with(REFINED)
    rows = [tokens(1, length, seed=n)[0] for n, length in enumerate((LENGTH, 41))]
    ids, mask = left_padded(rows, extra=5)
    _, cache = in_pieces(model, ids, (13, 40, 41), mask=mask)
    for n, row in enumerate(rows):
        _, alone = in_pieces(model, row[None], (20,))
        assert sizes_of(cache, n) == sizes_of(alone)


def test_events_of_fixed_size_and_random_ones_do_not_ask_what_surprised():
    """The controls of segmentation: the same sizes whatever the tokens, and other events."""
    texts = [tokens(1, LENGTH, seed=n) for n in range(2)]
    sizes = {}
    for name in ("surprise", "fixed", "random"):
        model = model_with(replace(SMALL, segmentation=name))
        sizes[name] = [sizes_of(in_pieces(model, ids, (20, 21, 44))[1]) for ids in texts]
    assert set(sizes["fixed"][0]) == {SMALL.max_event_size}
    assert sizes["random"][0] not in (sizes["surprise"][0], sizes["fixed"][0])
    means = {name: sum(map(sum, x)) / sum(map(len, x)) for name, x in sizes.items()}
    assert means["random"] == pytest.approx(means["surprise"], rel=0.25)


def test_random_events_depend_on_no_split_and_no_padding():
    model = model_with(replace(SMALL, segmentation="random"))
    rows = [tokens(1, length, seed=n)[0] for n, length in enumerate((LENGTH, 41))]
    ids, mask = left_padded(rows, extra=3)
    _, cache = in_pieces(model, ids, (13, 40, 41), mask=mask)
    for n, row in enumerate(rows):
        for ends in ((), (20,)):
            _, alone = in_pieces(model, row[None], ends)
            assert sizes_of(cache, n) == sizes_of(alone)


@pytest.mark.parametrize(
    "options", [{"placement": "host"}, {"placement": "disk", "hot_bytes": 900}]
)
def test_a_store_off_the_device_gives_the_same(options):
    ids = tokens(2, LENGTH)
    expected = one_pass(model_with(SMALL), ids)
    found, cache = in_pieces(model_with(replace(SMALL, **options)), ids, (30,))
    assert apart(found, expected) < REORDERED
    assert cache.layers[0].state[0].keys.placement == options["placement"]


def test_equal_tokens_are_equal_to_every_query():
    """A text of few tokens, so that events tie: one query at a time (window 1) or many at once, in
    a batch or alone, the older of them is chosen.
    """
    config = replace(SMALL, sliding_window=1, min_event_size=1, max_event_size=1, recalled_tokens=5)
    model = model_with(config)
    rows = [tokens(1, length, seed=n)[0] % 9 for n, length in enumerate((40, 29))]
    ids, mask = left_padded(rows, extra=2)
    whole = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    for n, row in enumerate(rows):
        assert apart(whole[n, -len(row) :], one_pass(model, row[None])[0]) < REORDERED


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
        ({"refinement": "modularity", "max_event_size": 8}, "shorter events"),
        ({"segmentation": "sentences"}, "segmentation"),
    ):
        with pytest.raises(ConfigError, match=message):
            replace(SMALL, **wrong)
    small = model_with(replace(SMALL, refinement="modularity"))
    with (
        window_override(small, sliding_window=4, num_sink_tokens=0),
        pytest.raises(ConfigError, match="sliding_window=4 is too small"),
    ):
        one_pass(small, tokens(1, 30))
    assert (EM_LLM.similar_tokens, EM_LLM.near_tokens) == (1434, 614)
