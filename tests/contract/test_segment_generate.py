"""`generate` in every mode across the borders of segments equals plain forwards over the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.families import build, tokens
from contract.runs import left_padded, positions_of
from contract.segment_arms import (
    ARMS,
    every_arm,
    every_live,
    every_method,
    reading,
    segment_of,
    session,
)
from transformers import DynamicCache

from memretrofit.errors import UnsupportedModelError

NEW = 12
every_short = pytest.mark.parametrize(
    "arm", [arm for arm in ARMS if arm in (ARMS[arm].method, f"{ARMS[arm].method}-short")]
)
"""Each method, and with segments shorter than a draft."""
ROWS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beam 3": {"do_sample": False, "num_beams": 3},
    "2 sequences": {"do_sample": True, "num_return_sequences": 2},
    "beam 3, 2 sequences": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "beam sample": {"do_sample": True, "num_beams": 2},
}
ONE_ROW: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prompt lookup, chunked": {"prompt_lookup_num_tokens": 3, "prefill_chunk_size": 5},
}


def prompt(arm: str, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Two segments and a half of the arm: generation closes the third, and more."""
    return tokens(rows, 2 * segment_of(arm) + max(1, segment_of(arm) // 2), seed=seed)


def generate(model, ids, **kwargs):
    torch.manual_seed(3)
    return model.generate(ids, max_new_tokens=NEW, **kwargs)


@torch.no_grad()
def greedy_by_hand(model, ids, mask=None):
    """One forward over the whole text for every new token: no cache, no loop of Transformers'."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(NEW):
        positions = positions_of(mask)
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


@every_live
def test_greedy_is_the_argmax_of_plain_forwards(family, arm):
    """With a cache, without, and with a prompt that is read in pieces."""
    model, ids = reading(family, arm), prompt(arm, rows=2)
    expected = greedy_by_hand(model, ids)
    assert torch.equal(generate(model, ids, do_sample=False), expected)
    assert torch.equal(generate(model, ids, do_sample=False, use_cache=False), expected)
    assert torch.equal(generate(model, ids, do_sample=False, prefill_chunk_size=5), expected)
    # witness: the base model says otherwise
    assert not torch.equal(generate(build(family), ids, do_sample=False), expected)


@pytest.mark.parametrize("mode", list(ROWS))
@every_method
def test_every_mode_is_the_same_without_a_cache(arm, mode):
    """Beams are recomputed there, and reordered here: the state must have moved with them."""
    model, ids = reading("llama", arm), prompt(arm, rows=2)
    expected = generate(model, ids, use_cache=False, **ROWS[mode])
    assert torch.equal(generate(model, ids, **ROWS[mode]), expected)


@every_arm
def test_beams_with_left_padding(arm):
    model = reading("llama", arm)
    rows = [prompt(arm)[0], prompt(arm, seed=2)[0, : segment_of(arm) + 1]]
    ids, mask = left_padded(rows)
    found = generate(model, ids, attention_mask=mask, **ROWS["beam 3"])
    expected = generate(model, ids, attention_mask=mask, use_cache=False, **ROWS["beam 3"])
    assert torch.equal(found, expected)


@every_live
def test_padded_rows_generate_what_they_generate_alone(family, arm):
    model = reading(family, arm)
    rows = [prompt(arm, seed=n)[0, n:] for n in range(3)]
    ids, mask = left_padded(rows, extra=2)
    together = generate(model, ids, attention_mask=mask, do_sample=False)
    for n, row in enumerate(rows):
        assert torch.equal(together[n, -NEW:], greedy_by_hand(model, row[None])[0, -NEW:])


@pytest.mark.parametrize("how", list(ONE_ROW.values()), ids=list(ONE_ROW))
@every_short
def test_prompt_lookup_is_greedy(arm, how):
    """Candidates that are rejected across a border leave no trace in the state."""
    part = tokens(1, segment_of(arm))
    model, ids = (
        reading("llama", arm),
        torch.cat([part, part, part[:, : -(-part.shape[1] // 2)]], 1),
    )
    assert torch.equal(generate(model, ids, do_sample=False, **how), greedy_by_hand(model, ids))


@pytest.mark.parametrize("helper", ["another", "base", "twin"])
@every_method
def test_assisted_decoding_is_greedy(arm, helper):
    """An assistant that agrees never, at times, and always: crops of every length."""
    model, ids = reading("llama", arm), prompt(arm)
    assistants = {
        "another": lambda: build("llama", seed=7),
        "base": lambda: build("llama"),
        "twin": lambda: reading("llama", arm),
    }
    found = generate(model, ids, do_sample=False, assistant_model=assistants[helper]())
    assert torch.equal(found, greedy_by_hand(model, ids))


@every_method
def test_an_assistant_that_reads_in_segments(arm):
    """It only proposes: whatever it remembers, the text is the plain model's."""
    base, ids = build("llama"), prompt(arm)
    found = generate(base, ids, do_sample=False, assistant_model=reading("llama", arm))
    assert torch.equal(found, generate(base, ids, do_sample=False))


@every_arm
def test_generating_goes_on_from_a_returned_cache(arm):
    model, ids = reading("llama", arm), prompt(arm)
    whole = generate(model, ids, do_sample=False)
    options = {"do_sample": False, "return_dict_in_generate": True}
    begun = model.generate(ids, max_new_tokens=5, **options)
    assert session(begun.past_key_values).seen == ids.shape[1] + 4
    more = model.generate(
        begun.sequences, past_key_values=begun.past_key_values, max_new_tokens=NEW - 5, **options
    )
    assert torch.equal(more.sequences, whole)


@pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
@every_method
def test_other_caches_are_refused(arm, kind):
    model, ids = reading("llama", arm), prompt(arm)
    with pytest.raises((UnsupportedModelError, ImportError)):
        model.generate(ids, max_new_tokens=2, cache_implementation=kind)


@every_method
def test_an_empty_cache_that_was_passed_in_is_filled(arm):
    """With or without the model's config, which gives a cache one layer for each of the model's."""
    model, ids = reading("gemma3", arm), prompt(arm)
    expected = generate(model, ids, do_sample=False)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        found = generate(model, ids, do_sample=False, past_key_values=cache)
        assert torch.equal(found, expected)
        assert session(cache).seen == ids.shape[1] + NEW - 1
