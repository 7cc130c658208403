"""`generate` in every mode, with a window that fills at once, equals the same model without a
cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contract.arms import EXACT, every_arm, every_live, patched
from contract.families import VOCABULARY, build, tokens
from contract.runs import left_padded, positions_of
from hypothesis import example, given
from hypothesis import strategies as st

from memretrofit.patching.cache import MemoryLayer

PROMPT, NEW = 17, 14
ONE_ROW = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prompt lookup, chunked": {"prompt_lookup_num_tokens": 3, "prefill_chunk_size": 5},
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beam 4": {"do_sample": False, "num_beams": 4},
    "3 sequences": {"do_sample": True, "num_return_sequences": 3},
    "beam 4, 2 sequences": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "beam sample": {"do_sample": True, "num_beams": 3},
}


def repetitive(rows: int = 1) -> torch.Tensor:
    """A text that returns to itself, so that prompt lookup finds candidates, right ones and
    wrong ones."""
    part = tokens(rows, 6)
    return torch.cat([part, part, part[:, :5]], dim=1)


def generate(model, ids, **kwargs):
    torch.manual_seed(3)
    return model.generate(ids, max_new_tokens=NEW, **kwargs)


def greedy_by_hand(model, ids, mask=None, new=NEW):
    """One forward over the whole text for every new token: no `generate`, no cache, no loop of
    Transformers'."""
    mask = torch.ones_like(ids) if mask is None else mask
    for _ in range(new):
        with torch.no_grad():
            logits = model(
                ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
            ).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return ids


@every_live
def test_greedy_is_the_argmax_of_plain_forwards(family, arm):
    """The one reference that does not go through `generate`. The memory must matter: the base
    model says otherwise."""
    model, ids = patched(family, arm), tokens(3, PROMPT)
    expected = greedy_by_hand(model, ids)
    assert torch.equal(generate(model, ids, do_sample=False), expected)
    assert torch.equal(generate(model, ids, do_sample=False, use_cache=False), expected)
    assert not torch.equal(generate(build(family), ids, do_sample=False), expected)


@pytest.mark.parametrize("mode", list(MODES))
@every_arm
def test_every_mode_is_the_same_without_a_cache(arm, mode):
    model, ids = patched("llama", arm), tokens(2, PROMPT)
    found = generate(model, ids, **MODES[mode])
    expected = generate(model, ids, use_cache=False, **MODES[mode])
    assert torch.equal(found, expected)
    chunked = generate(model, ids, prefill_chunk_size=5, **MODES[mode])
    assert torch.equal(chunked, expected)


@every_live
def test_chunked_prefill_in_every_family(family, arm):
    model, ids = patched(family, arm), tokens(2, PROMPT)
    found = generate(model, ids, do_sample=False, prefill_chunk_size=5)
    assert torch.equal(found, generate(model, ids, do_sample=False, use_cache=False))


@pytest.mark.parametrize("mode", ["beam 4"])
@every_live
def test_reordering_in_every_family(family, arm, mode):
    model, ids = patched(family, arm), tokens(2, PROMPT)
    found = generate(model, ids, **MODES[mode])
    assert torch.equal(found, generate(model, ids, use_cache=False, **MODES[mode]))


@pytest.mark.parametrize("mode", list(MODES))
@every_arm
def test_every_mode_with_left_padding(arm, mode):
    model = patched("llama", arm)
    ids, mask = left_padded([tokens(1, PROMPT)[0], tokens(1, 6, seed=2)[0]])
    found = generate(model, ids, attention_mask=mask, **MODES[mode])
    expected = generate(model, ids, attention_mask=mask, use_cache=False, **MODES[mode])
    assert torch.equal(found, expected)


@every_live
def test_padded_rows_generate_what_they_generate_alone(family, arm):
    model = patched(family, arm)
    rows = [tokens(1, length, seed=length)[0] for length in (PROMPT, 9, 4)]
    ids, mask = left_padded(rows, extra=2)
    together = generate(model, ids, attention_mask=mask, do_sample=False)
    for n, row in enumerate(rows):
        alone = greedy_by_hand(model, row[None])
        assert torch.equal(together[n, -NEW:], alone[0, -NEW:])


@given(size=st.integers(1, PROMPT + 3), pad=st.integers(0, 6))
@example(size=EXACT, pad=0)
@example(size=1, pad=3)
@every_arm
def test_any_size_of_prefill_chunks(arm, size, pad):
    model = patched("llama", arm)
    ids, mask = left_padded([tokens(1, PROMPT)[0], tokens(1, 12, seed=1)[0]], extra=pad)
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, do_sample=False, prefill_chunk_size=size
    )
    assert torch.equal(found, greedy_by_hand(model, ids, mask, new=4))


@pytest.mark.parametrize("kwargs", list(ONE_ROW.values()), ids=list(ONE_ROW))
@every_live
def test_prompt_lookup_is_greedy(family, arm, kwargs):
    """Rejected candidates must leave no trace in the state."""
    model, ids = patched(family, arm), repetitive()
    assert torch.equal(generate(model, ids, do_sample=False, **kwargs), greedy_by_hand(model, ids))


ASSISTANTS = {
    "plain, agrees never": lambda family, arm: build(family, seed=7),
    "plain, agrees at times": lambda family, arm: build(family),
    "patched, agrees always": lambda family, arm: patched(family, arm),
    "patched, another window": lambda family, arm: patched(family, "window_sinks"),
}


def check_assisted(family, arm, assistant):
    model, ids = patched(family, arm), tokens(1, PROMPT)
    helper = ASSISTANTS[assistant](family, arm)
    found = generate(model, ids, do_sample=False, assistant_model=helper)
    assert torch.equal(found, greedy_by_hand(model, ids))


@pytest.mark.parametrize("assistant", list(ASSISTANTS))
@every_arm
def test_assisted_decoding_is_greedy(arm, assistant):
    """Past recording begins before the first forward: a cache that is upgraded later folds what
    is rejected."""
    check_assisted("llama", arm, assistant)


@every_live
def test_assisted_decoding_is_greedy_in_every_family(family, arm):
    check_assisted(family, arm, "plain, agrees never")


@pytest.mark.parametrize("short", [3, EXACT - 2])
@every_arm
def test_assisted_decoding_across_the_border(arm, short):
    """The window fills while candidates are being rejected."""
    model, ids = patched("llama", arm), tokens(1, short)
    for helper in (build("llama"), patched("llama", arm)):
        found = generate(model, ids, do_sample=False, assistant_model=helper)
        assert torch.equal(found, greedy_by_hand(model, ids))


@every_arm
def test_a_patched_assistant_of_a_plain_model(arm):
    """The assistant only proposes: whatever it remembers, the text is the plain model's."""
    base, ids = build("llama"), tokens(1, PROMPT)
    found = generate(base, ids, do_sample=False, assistant_model=patched("llama", arm))
    assert torch.equal(found, generate(base, ids, do_sample=False))


@every_arm
def test_generation_uses_the_memory(arm):
    """Not vacuous: the returned cache holds memory layers that have seen the text and keep a
    bounded part of it."""
    output = generate(
        patched("llama", arm), tokens(1, PROMPT), do_sample=False, return_dict_in_generate=True
    )
    layers = output.past_key_values.layers
    assert all(isinstance(layer, MemoryLayer) for layer in layers)
    for layer in layers:
        assert layer.get_seq_length() >= PROMPT + NEW - 1
        assert layer.keys.shape[-2] == EXACT
    assert output.sequences.max() < VOCABULARY


@every_arm
def test_embeddings_instead_of_ids(arm):
    model, ids = patched("llama", arm), tokens(2, PROMPT)
    embedded = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    found = model.generate(
        inputs_embeds=embedded, attention_mask=mask, max_new_tokens=NEW, do_sample=False
    )
    assert torch.equal(found, greedy_by_hand(model, ids)[:, PROMPT:])
