"""What a cache holds of a text that is read in segments: moved, cropped, copied, and refused."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass
from contract.segment_arms import (
    differ,
    every_arm,
    every_live,
    every_method,
    held,
    ledger,
    reading,
    segment_of,
    session,
    text,
)
from tolerances import REORDERED
from transformers import DynamicCache, StaticCache

from memretrofit import unpatch
from memretrofit.errors import MemretrofitError, StateError, UnsupportedModelError
from memretrofit.patching.session import Session


def content(cache) -> list[torch.Tensor]:
    """Every tensor of a session, copied."""
    layer = session(cache)
    found = [layer.counts, layer.valid, layer.embeds, *layer.state.values()]
    found += [x for inner in layer.layers for x in (inner.keys, inner.values)]
    return [x.clone() for x in found if x is not None]


def untouched(cache, before: list[torch.Tensor], seen: int) -> bool:
    """Whether a cache is what it was."""
    after = content(cache)
    same = len(after) == len(before)
    same = same and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    return same and session(cache).seen == seen == cache.get_seq_length()


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@every_arm
def test_rows_move_with_all_that_is_theirs(arm, padded):
    """Reordered, repeated and chosen rows go on as if they had been read so; a reset cache begins
    anew."""
    model, ids = reading("llama", arm), text(arm)
    mask = torch.ones_like(ids)
    if padded:
        ids, mask = left_padded([ids[0], ids[1, 2:]])
    cut = ids.shape[1] - 4
    whole = one_pass(model, ids, attention_mask=mask)[:, cut:]

    def go_on(change, rows) -> None:
        _, cache = in_pieces(model, ids[:, :cut], [5], mask=mask[:, :cut])
        change(cache)
        with torch.no_grad():
            found = model(ids[rows, cut:], attention_mask=mask[rows], past_key_values=cache).logits
        assert apart(found, whole[rows]) < REORDERED

    swap = torch.tensor([1, 0])
    go_on(lambda cache: cache.reorder_cache(swap), swap)
    go_on(lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1]))
    go_on(lambda cache: cache.batch_select_indices(torch.tensor([1])), torch.tensor([1]))
    _, cache = in_pieces(model, ids[:, :cut], [5], mask=mask[:, :cut])
    cache.reset()
    assert cache.get_seq_length() == 0
    found, _ = in_pieces(model, ids, [cut], mask=mask, cache=cache)
    assert apart(found[:, cut:], whole) < REORDERED


@every_live
def test_a_crop_inside_the_open_span_is_never_having_read(family, arm):
    """As far back as the span goes, and no further without recording: then nothing changes."""
    model, ids = reading(family, arm), text(arm)
    spans = ledger(model).memory.spans
    opened = max(x for x in itertools.accumulate((0, *spans)) if x < segment_of(arm))
    place = 3 * segment_of(arm) + opened  # where the last span began
    end = place + spans[[*itertools.accumulate((0, *spans))].index(opened)] - 1
    expected = one_pass(model, ids)
    for count in range(end - place + 1):
        _, cache = in_pieces(model, ids[:, :end], [3])
        cache.crop(-count)
        assert cache.get_seq_length() == end - count
        with torch.no_grad():
            found = model(ids[:, end - count :], past_key_values=cache).logits
        assert apart(found, expected[:, end - count :]) < REORDERED
    _, cache = in_pieces(model, ids[:, :end], [3])
    before = content(cache)
    for wrong, told in ((place - end - 1, "cannot be undone"), (3, "minus"), (-end - 1, "minus")):
        with pytest.raises(StateError, match=told):
            cache.crop(wrong)
        assert untouched(cache, before, end)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@every_arm
def test_a_recorded_crop_goes_back_across_borders(arm, padded):
    """To any token since the last crop, and again from there: what was written is taken back."""
    model, ids = reading("llama", arm), text(arm)
    mask = torch.ones_like(ids)
    if padded:
        ids, mask = left_padded([ids[0], ids[1, 2:]])
    expected, begin = one_pass(model, ids, attention_mask=mask), segment_of(arm) + 1
    real = mask.bool()
    for back in range(begin, ids.shape[1] - 1, 3):
        _, cache = in_pieces(model, ids[:, :begin], [], mask=mask[:, :begin])
        cache.activate_past_recording()
        assert cache.is_croppable
        for end in (ids.shape[1], ids.shape[1] - 1):
            with torch.no_grad():
                seen = cache.get_seq_length()
                found = model(
                    ids[:, seen:end], attention_mask=mask[:, :end], past_key_values=cache
                ).logits
            own = real[:, seen:end]
            assert apart(found[own], expected[:, seen:end][own]) < REORDERED
            cache.crop(back - end)
        _, alone = in_pieces(model, ids[:, :back], [], mask=mask[:, :back])
        assert differ(held(cache), held(alone)) < REORDERED


@every_arm
def test_a_crop_forgets_what_it_kept_for_crops(arm):
    """Else a long assisted decoding would hold the state of every segment."""
    model, ids = reading("llama", arm), text(arm)
    _, cache = in_pieces(model, ids[:, :3], [])
    cache.activate_past_recording()
    in_pieces(model, ids[:, 3:], [], cache=cache)
    assert session(cache).earlier
    assert cache.layers[0].nbytes() > 2 * sum(x.nbytes for x in session(cache).state.values())
    cache.crop(0)
    assert not session(cache).earlier


@every_arm
def test_a_copied_conversation_goes_its_own_way(arm):
    model, ids = reading("llama", arm), text(arm)
    cut = 2 * segment_of(arm) + 1
    _, cache = in_pieces(model, ids[:, :cut], [3])
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        model(tokens(2, 20, seed=5), past_key_values=cache)
        found = model(ids[:, cut:], past_key_values=twin).logits
    assert apart(found, one_pass(model, ids)[:, cut:]) < REORDERED


@every_live
def test_bytes_do_not_grow_with_the_text(family, arm):
    """At the same place in a segment, from the number of segments on that fills what is kept."""
    model, size = reading(family, arm), segment_of(arm)
    found = []
    for segments in (12, 13, 20):
        _, cache = in_pieces(model, tokens(2, segments * size + 1), [])
        found.append(cache.layers[0].nbytes())
    assert found[0] == found[1] == found[2] > 0
    _, cache = in_pieces(model, tokens(2, 13 * size + 1), range(1, 13 * size))
    assert cache.layers[0].nbytes() <= found[0] + 2 * size * 32 * 4  # tokens that may be read again


@torch.no_grad()
@every_method
def test_what_cannot_be_read_in_segments_is_refused(arm):
    """Each by name, and the conversation stays as it was."""
    model, ids = reading("llama", arm), text(arm)
    seen = segment_of(arm) + 3
    _, cache = in_pieces(model, ids[:, :seen], [4])
    before, more = content(cache), ids[:, seen:]
    embeds = model.get_input_embeddings()(more)
    packed = torch.arange(more.shape[1]).fmod(7)[None].expand(2, -1)
    wrong = [
        ({"input_ids": more, "inputs_embeds": embeds}, StateError, "input_ids and inputs_embeds"),
        ({}, StateError, "neither"),
        ({"input_ids": more[:, :0]}, StateError, "0 tokens"),
        ({"input_ids": more, "attention_mask": torch.zeros(2, 1, 9, 9)}, StateError, "2-D"),
        ({"input_ids": more, "position_ids": packed}, StateError, "begin anew"),
        ({"input_ids": more[:1]}, StateError, "holds 2 rows, and 1 were passed"),
        ({"input_ids": more.repeat(2, 1)}, StateError, "holds 2 rows, and 4 were passed"),
        ({"input_ids": more, "output_attentions": True}, MemretrofitError, "attentions"),
    ]
    for call, error, told in wrong:
        with pytest.raises(error, match=told):
            model(past_key_values=cache, **call)
        assert untouched(cache, before, seen), told
    with pytest.raises(StateError, match="called by itself"):
        model.model(more)
    with pytest.raises(StateError, match="called by itself"):
        model.model(more, past_key_values=cache)
    assert untouched(cache, before, seen)
    found = model(more, past_key_values=cache).logits
    assert apart(found, one_pass(model, ids)[:, seen:]) < REORDERED


@torch.no_grad()
@every_method
def test_other_caches_are_refused(arm):
    """Static, offloaded, filled by the base model or by another patch; and it is left alone."""
    model, base, ids = reading("llama", arm), build("llama"), text(arm)
    static = StaticCache(config=model.config, max_cache_len=64)
    for cache in (static, DynamicCache(offloading=True)):
        with pytest.raises(UnsupportedModelError, match="plain DynamicCache"):
            model(ids, past_key_values=cache)
    foreign = base(ids, use_cache=True).past_key_values
    with pytest.raises(StateError, match="not read in segments"):
        model(ids, past_key_values=foreign)
    assert not any(isinstance(layer, Session) for layer in foreign.layers)
    _, other = in_pieces(reading("llama", arm), ids, [])
    before = content(other)
    with pytest.raises(StateError, match="another patched model"):
        model(ids[:, :4], past_key_values=other)
    assert untouched(other, before, ids.shape[1])


@torch.no_grad()
@every_method
def test_the_base_model_does_not_read_a_session(arm):
    model, ids = reading("llama", arm), text(arm)
    _, cache = in_pieces(model, ids, [])
    before = content(cache)
    unpatch(model)
    with pytest.raises(StateError, match="base attention cannot read it"):
        model(ids[:, :1], past_key_values=cache)
    assert untouched(cache, before, ids.shape[1])


@torch.no_grad()
@every_method
def test_an_empty_call_changes_nothing(arm):
    """A row of a batch that waits is padding throughout, and stays as it was."""
    model, ids = reading("llama", arm), text(arm)
    seen = segment_of(arm) + 3
    _, cache = in_pieces(model, ids[:, :seen], [])
    mask = torch.ones(2, seen + 12, dtype=torch.long)
    mask[1, seen:] = 0
    state = {name: x.clone() for name, x in held(cache).items()}
    model(tokens(2, 12, seed=4), attention_mask=mask, past_key_values=cache)
    after = held(cache)
    assert all(torch.equal(after[name][1], x[1]) for name, x in state.items())
    assert not torch.equal(after["counts"][0], state["counts"][0])
