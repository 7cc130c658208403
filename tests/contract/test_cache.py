"""What a cache of a patched model promises to whoever holds it, and the caches that cannot hold
a memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from contract.arms import ARMS, EXACT, WINDOW, every_arm, every_live, patched
from contract.families import build, tokens
from contract.runs import apart, in_pieces, one_pass
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import REORDERED, WRONG
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedLayer

from memretrofit.errors import StateError, UnsupportedModelError
from memretrofit.patching.cache import MemoryLayer
from memretrofit.retrofit import memory_disabled, patch, unpatch

LENGTH, FILLED = 34, 20


@torch.no_grad()
def go_on(model, cache, ids, begin):
    return model(ids[:, begin:], past_key_values=cache, use_cache=True).logits


@every_live
def test_rows_move_with_the_batch(family, arm):
    """Beam search reorders rows, contrastive search repeats and selects them: window, state and
    gates go along."""
    model, ids = patched(family, arm), tokens(3, LENGTH)
    expected = one_pass(model, ids)
    for change, order in (
        (lambda c, o: c.reorder_cache(o), torch.tensor([2, 0, 0])),
        (lambda c, o: c.batch_select_indices(o), torch.tensor([1, 2])),
        (lambda c, o: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        _, cache = in_pieces(model, ids[:, :FILLED], (9, 10))
        change(cache, order)
        found = go_on(model, cache, ids[order], FILLED)
        assert apart(found, expected[order, FILLED:]) < REORDERED
        wrong = order.roll(1)
        if not torch.equal(wrong, order):
            assert apart(found, expected[wrong, FILLED:]) > WRONG


@every_arm
def test_a_short_cache_is_reordered_too(arm):
    """Before anything has left the window there is no state to move."""
    model, ids = patched("llama", arm), tokens(3, LENGTH)
    order = torch.tensor([1, 1, 2])
    _, cache = in_pieces(model, ids[:, :4], ())
    cache.reorder_cache(order)
    mixed = torch.cat([ids[order, :4], ids[:, 4:]], dim=1)
    assert apart(go_on(model, cache, mixed, 4), one_pass(model, mixed)[:, 4:]) < REORDERED


@every_live
def test_a_copy_of_a_filled_cache_is_a_second_conversation(family, arm):
    model, ids = patched(family, arm), tokens(2, LENGTH)
    _, cache = in_pieces(model, ids[:, :FILLED], (12,))
    twin = copy.deepcopy(cache)
    other = tokens(2, LENGTH, seed=4)
    go_on(model, cache, torch.cat([ids[:, :FILLED], other[:, FILLED:]], 1), FILLED)
    first = go_on(model, copy.deepcopy(twin), ids, FILLED)
    assert torch.equal(go_on(model, twin, ids, FILLED), first)
    assert apart(first, one_pass(model, ids)[:, FILLED:]) < REORDERED


@every_arm
def test_a_dropped_cache_is_freed_at_once(arm):
    """Without a search for garbage, which a few large tensors never start. Its copies too."""
    model, ids = patched("llama", arm), tokens(2, LENGTH)
    _, cache = in_pieces(model, ids, (FILLED,))
    twin = copy.deepcopy(cache)
    gc.collect()
    gc.disable()
    try:
        left = [weakref.ref(layer) for held in (cache, twin) for layer in held.layers]
        del cache, twin
        assert not any(ref() for ref in left)
    finally:
        gc.enable()


@every_arm
def test_a_copy_of_a_cache_is_cropped_alone(arm):
    model, ids = patched("llama", arm), tokens(1, LENGTH)
    _, cache = in_pieces(model, ids[:, :EXACT], ())
    twin = copy.deepcopy(cache)
    twin.crop(-4)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (EXACT, EXACT - 4)
    assert apart(go_on(model, cache, ids, EXACT), one_pass(model, ids)[:, EXACT:]) < REORDERED


@given(filled=st.integers(1, LENGTH - 8), drafted=st.integers(1, 7), removed=st.integers(0, 7))
@example(filled=EXACT - 2, drafted=6, removed=5)
@example(filled=EXACT, drafted=1, removed=1)
@example(filled=LENGTH - 8, drafted=7, removed=7)
@every_arm
def test_a_crop_under_past_recording_leaves_no_trace(arm, filled, drafted, removed):
    """Assisted decoding by hand: draft, take some back, go on; twice."""
    removed = min(removed, drafted)
    model, ids = patched("llama", arm), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    cache = DynamicCache(config=model.config)
    in_pieces(model, ids[:, :filled], (), cache=cache)
    cache.activate_past_recording()
    wrong = torch.cat([ids[:, :filled], tokens(2, 8, seed=8)], dim=1)
    keep = filled + drafted - removed
    draft = torch.cat([ids[:, :keep], wrong[:, keep : filled + drafted]], dim=1)
    for begin in (filled, None):
        if begin is not None:
            go_on(model, cache, draft, begin)
            cache.crop(-removed)
        else:
            go_on(model, cache, torch.cat([ids[:, :keep], tokens(2, 2, seed=6)], 1), keep)
            cache.crop(-2)
        assert cache.get_seq_length() == keep
    assert apart(go_on(model, cache, ids, keep), expected[:, keep:]) < REORDERED


@every_arm
def test_a_crop_that_would_need_folded_tokens_is_refused(arm):
    """Without recording a fold cannot be undone; within what is kept a crop is exact. Nothing
    changes on refusal."""
    model, ids = patched("llama", arm), tokens(1, LENGTH)
    expected = one_pass(model, ids)
    _, cache = in_pieces(model, ids[:, :FILLED], ())
    with pytest.raises(StateError, match="activate_past_recording"):
        cache.crop(-3)
    assert cache.get_seq_length() == FILLED
    assert apart(go_on(model, cache, ids, FILLED), expected[:, FILLED:]) < REORDERED
    _, short = in_pieces(model, ids[:, :EXACT], ())
    short.crop(-4)
    assert apart(go_on(model, short, ids, EXACT - 4), expected[:, EXACT - 4 :]) < REORDERED


@every_arm
def test_a_refused_crop_changes_no_layer_of_a_mixed_model(arm):
    """Half the layers patched: the others can be cropped, and must not be when the patched ones
    refuse."""
    model = patch(build("llama"), replace(ARMS[arm], layers_to_transform=(1,)))
    ids = tokens(1, LENGTH)
    _, cache = in_pieces(model, ids[:, :FILLED], ())
    with pytest.raises(StateError):
        cache.crop(-3)
    assert [layer.get_seq_length() for layer in cache.layers] == [FILLED, FILLED]


@every_arm
def test_reset_is_a_fresh_cache(arm):
    model, ids = patched("llama", arm), tokens(2, LENGTH)
    fresh, _ = in_pieces(model, ids, (15, 16))
    _, cache = in_pieces(model, tokens(2, 25, seed=3), (11,))
    cache.reset()
    assert torch.equal(in_pieces(model, ids, (15, 16), cache=cache)[0], fresh)
    cache.reset()
    wider = tokens(5, LENGTH)
    again, _ = in_pieces(model, wider, (15,), cache=cache)
    assert apart(again, one_pass(model, wider)) < REORDERED


@every_arm
def test_plain_and_configured_caches_are_upgraded(arm):
    model, ids = patched("llama", arm), tokens(1, LENGTH)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        found, used = in_pieces(model, ids, (9, 15), cache=cache)
        assert used is cache
        assert all(isinstance(layer, MemoryLayer) for layer in cache.layers)
        assert apart(found, one_pass(model, ids)) < REORDERED


def _offloaded(model):
    cache = DynamicCache(config=model.config)
    cache.offloading = True  # the constructor needs an accelerator
    return cache


CANNOT: dict[str, Callable] = {
    "static": lambda model: StaticCache(config=model.config, max_cache_len=64),
    "offloaded": _offloaded,
}


@pytest.mark.parametrize("kind", list(CANNOT))
@every_arm
def test_a_cache_that_cannot_hold_a_memory_is_refused(arm, kind):
    """Never base attention in silence: refused at the first token, inside the window too,
    forward and generate."""
    model = patched("llama", arm)
    for ids in (tokens(1, 4), tokens(1, LENGTH)):
        with pytest.raises(UnsupportedModelError, match=r"(?i)cache"):
            model(ids, past_key_values=CANNOT[kind](model), use_cache=True)
        with pytest.raises(UnsupportedModelError, match=r"(?i)cache"):
            model.generate(ids, past_key_values=CANNOT[kind](model), max_new_tokens=3)
    one_pass(model, ids)  # and the model is as it was


@pytest.mark.parametrize("name", ["static", "offloaded", "offloaded_static"])
@every_arm
def test_a_cache_implementation_that_cannot_hold_a_memory_is_refused(arm, name, monkeypatch):
    """By name, through `generate`. The quantised one needs a package to be built; see below."""
    model = patched("llama", arm)
    if name.startswith("offloaded"):
        # its constructor asks the accelerator for a stream
        monkeypatch.setattr(torch, "Stream", lambda *args, **kwargs: None)
        monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **kwargs: None)
    with pytest.raises(UnsupportedModelError, match=r"(?i)cache"):
        model.generate(
            tokens(1, 4), max_new_tokens=3, cache_implementation=name, disable_compile=True
        )


@every_arm
def test_quantised_layers_are_refused_without_their_backend(arm):
    """The layer class alone decides, so the test needs no quantisation package."""

    class Quantised(QuantizedLayer):
        def _quantize(self, tensor, axis): ...
        def _dequantize(self, tensor): ...

    model = patched("llama", arm)
    cache = DynamicCache(config=model.config)
    cache.layers[1] = Quantised()
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="Quantised"):
        model(tokens(1, 4), past_key_values=cache, use_cache=True)


@every_arm
def test_a_cache_that_was_filled_without_memory_is_refused(arm):
    model, ids = patched("llama", arm), tokens(1, LENGTH)
    with memory_disabled(model):
        _, cache = in_pieces(model, ids[:, :FILLED], ())
    with pytest.raises(StateError, match="without memory"):
        go_on(model, cache, ids, FILLED)
    with pytest.raises(StateError, match="without memory"):
        model.generate(ids, past_key_values=cache, max_new_tokens=2)


@every_arm
def test_a_cache_of_another_patch_is_refused(arm):
    """Of another model, and of an earlier patch of the same model."""
    model, ids = patched("llama", arm), tokens(1, LENGTH)
    _, cache = in_pieces(model, ids[:, :FILLED], ())
    with pytest.raises(StateError, match="another patched model"):
        go_on(patched("llama", arm), cache, ids, FILLED)
    unpatch(model)
    patch(model, ARMS[arm])
    with pytest.raises(StateError, match="earlier patch"):
        go_on(model, cache, ids, FILLED)


@every_arm
def test_a_cache_with_memory_is_refused_by_base_attention(arm):
    """A model that is unpatched, never was patched, or is disabled, must not attend to the few
    tokens kept."""
    model, ids = patched("llama", arm), tokens(1, LENGTH)
    _, cache = in_pieces(model, ids[:, :FILLED], ())
    _, short = in_pieces(model, ids[:, :4], ())
    with memory_disabled(model):
        with pytest.raises(StateError):
            go_on(
                model, short, ids, 4
            )  # nothing is missing yet, but what follows would miss the gates of these
        with pytest.raises(StateError):
            go_on(model, copy.deepcopy(cache), ids, FILLED)
    with pytest.raises(StateError):
        go_on(build("llama"), copy.deepcopy(cache), ids, FILLED)
    unpatch(model)
    with pytest.raises(StateError):
        go_on(model, cache, ids, FILLED)


def test_the_window_of_a_cache_keeps_positions_absolute():
    """What tells models and `generate` where the next token stands."""
    model, ids = patched("llama", "window_sinks"), tokens(1, LENGTH)
    _, cache = in_pieces(model, ids, (WINDOW, 20))
    assert cache.get_seq_length() == LENGTH
    assert cache.layers[0].keys.shape[-2] == EXACT
