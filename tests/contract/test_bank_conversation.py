"""A bank's conversation lives in the cache: any split, padding, beams, crops and copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from contract.bank_arms import EXAMPLES, LENGTH, bank_of, banked, every_arm, every_live
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass, positions_of
from hypothesis import example, given
from hypothesis import strategies as st
from tolerances import REORDERED, WRONG
from transformers import DynamicCache

from memretrofit.errors import StateError, UnsupportedModelError
from memretrofit.modules.bank import PAD, Tokens
from memretrofit.patching.controls import memory_disabled


def same_rows(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether the same rows of the same tables are read."""
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


ROWS = torch.stack(EXAMPLES[:2])
ends = st.lists(st.integers(1, LENGTH - 1), max_size=6, unique=True).map(sorted)


@every_live
def test_token_by_token_is_one_pass(family, arm):
    """Rule 4."""
    model = banked(family, arm)
    found, _ = in_pieces(model, ROWS, range(1, LENGTH))
    assert apart(found, one_pass(model, ROWS)) < REORDERED


@given(ends=ends)
@example(ends=[1, 2, 3])
@every_arm
def test_any_split_is_one_pass(arm, ends):
    """Forbids: an n-gram that is cut by the border of two calls, a route of the first alone."""
    model = banked("llama", arm)
    assert apart(in_pieces(model, ROWS, ends)[0], one_pass(model, ROWS)) < REORDERED


@every_arm
def test_the_tolerance_of_splits_rejects_a_forgotten_history(arm):
    """Witness: the same keys, and a bank that begins to look up at the second piece."""
    model = banked("llama", arm)
    row, bank = ROWS[:1], bank_of(model)
    alone = bank.addresses(Tokens(ids=row[:, -1:], new=1))
    if same_rows(alone, bank.addresses(Tokens(ids=row, new=1))):
        pytest.skip("a token is looked up by itself, or by hidden states, which the keys carry")
    _, cache = in_pieces(model, ROWS[:, :2], [2])
    cache.history.apply(lambda x: torch.full_like(x, PAD))
    found = model(ROWS[:, 2:], past_key_values=cache).logits
    assert apart(found, one_pass(model, ROWS)[:, 2:]) > WRONG


@given(lengths=st.lists(st.integers(1, LENGTH), min_size=1, max_size=3), extra=st.integers(0, 5))
@example(lengths=[LENGTH, 3], extra=2)
@every_arm
def test_left_padding_and_neighbours_do_not_matter(arm, lengths, extra):
    """Each row of a padded batch, in one pass and in pieces, is that row alone."""
    model = banked("llama", arm)
    rows = [EXAMPLES[n][:length] for n, length in enumerate(lengths)]
    ids, mask = left_padded(rows, extra=extra)
    whole = one_pass(model, ids, attention_mask=mask, position_ids=positions_of(mask))
    pieces, _ = in_pieces(model, ids, [ids.shape[1] // 2], mask=mask)
    for n, row in enumerate(rows):
        alone = one_pass(model, row[None])[0]
        assert apart(whole[n, -len(row) :], alone) < REORDERED
        assert apart(pieces[n, -len(row) :], alone) < REORDERED


@every_arm
def test_rows_move_and_are_cropped_with_their_history(arm):
    """Reordered, repeated, chosen and cropped rows go on as if they had been read so."""
    model = banked("llama", arm)
    head, tail = ROWS[:, :14], ROWS[:, 14:]

    def go_on(change, expected_head, follow) -> None:
        cache = in_pieces(model, head, [5])[1]
        change(cache)
        with torch.no_grad():
            found = model(follow, past_key_values=cache).logits
        whole = one_pass(model, torch.cat([expected_head, follow], dim=1))
        assert apart(found, whole[:, expected_head.shape[1] :]) < REORDERED

    swap = torch.tensor([1, 0])
    go_on(lambda c: c.reorder_cache(swap), head[swap], tail)
    go_on(lambda c: c.batch_repeat_interleave(2), head.repeat_interleave(2, 0), tail[[0, 1, 1, 0]])
    go_on(lambda c: c.batch_select_indices(torch.tensor([1])), head[1:], tail[:1])
    go_on(lambda c: c.crop(-4), head[:, :-4], tail)


@every_arm
def test_a_copied_conversation_goes_its_own_way(arm):
    """Deep copies share nothing, and a reset cache begins anew."""
    model = banked("llama", arm)
    cache = in_pieces(model, ROWS[:, :10], [4])[1]
    twin = copy.deepcopy(cache)
    with torch.no_grad():
        model(ROWS[:, 10:12], past_key_values=cache)
        found = model(ROWS[:, 10:], past_key_values=twin).logits
        assert apart(found, one_pass(model, ROWS)[:, 10:]) < REORDERED
        cache.reset()
        again = model(ROWS, past_key_values=cache).logits
    assert apart(again, one_pass(model, ROWS)) < REORDERED


@every_arm
def test_a_copied_model_stands_alone(arm):
    """It reads its own embeddings and rows, by deepcopy and through a pickle."""
    for twinned in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        model = banked("llama", arm)
        expected = one_pass(model, ROWS)
        twin = twinned(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(one_pass(twin, ROWS), expected)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}])
@every_arm
def test_generate_is_greedy_or_beams_over_one_pass(arm, how):
    """Each way of generating, against the same without a cache. Prompt lookup crops."""
    model = banked("llama", arm)
    prompt = ROWS[:1, :8]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **how}
    found = model.generate(prompt, **options)
    plain = {k: v for k, v in options.items() if k != "prompt_lookup_num_tokens"}
    assert torch.equal(found, model.generate(prompt, use_cache=False, **plain))


@every_arm
def test_what_a_bank_cannot_know_is_refused(arm):
    """A cache that was filled without it, or partly, or by another; embeddings; other masks."""
    model, base = banked("llama", arm), build("llama")
    stranger = in_pieces(base, ROWS[:, :4], [2])[1]
    with pytest.raises(StateError, match="read without the bank"):
        model(ROWS[:, 4:], past_key_values=stranger)
    cache = in_pieces(model, ROWS[:, :4], [2])[1]
    with memory_disabled(model):
        model(ROWS[:, 4:6], past_key_values=cache)
    with pytest.raises(StateError, match="of which the bank has seen 4"):
        model(ROWS[:, 6:], past_key_values=cache)
    other = in_pieces(banked("llama", arm), ROWS[:, :4], [2])[1]
    with pytest.raises(StateError, match="another patched model"):
        model(ROWS[:, 4:], past_key_values=other)
    with pytest.raises(UnsupportedModelError, match="input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ROWS))
    with pytest.raises(StateError, match="2-D mask"):
        model(ROWS, attention_mask=torch.zeros(2, 1, LENGTH, LENGTH))
    packed = torch.arange(LENGTH).fmod(10)[None]
    with pytest.raises(StateError, match="begin anew"):
        model(ROWS, position_ids=packed, use_cache=False)
    assert torch.equal(one_pass(model, ROWS), one_pass(banked("llama", arm), ROWS))


@every_arm
def test_arguments_by_position_are_read(arm):
    """The decoder's own signature says which is which: padding is not taken for text."""
    model = banked("llama", arm)
    ids, mask = left_padded([EXAMPLES[0][:9]], extra=4)
    with torch.no_grad():
        named = model.model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask))
        plain = model.model(ids, mask, positions_of(mask))
    assert torch.equal(named[0], plain[0])


@every_arm
def test_inference_mode(arm):
    """Where tensors do not count their versions."""
    with torch.inference_mode():
        model = banked("llama", arm)
        assert one_pass(model, ROWS).isfinite().all()


@every_arm
def test_an_empty_cache_that_was_passed_in_is_filled(arm):
    """What `generate` does."""
    model = banked("llama", arm)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ROWS[:, :9], past_key_values=cache)
        found = model(ROWS[:, 9:], past_key_values=cache).logits
    assert apart(found, one_pass(model, ROWS)[:, 9:]) < REORDERED
    assert isinstance(cache, DynamicCache)


@every_arm
def test_a_longer_text_than_any_example_is_read(arm):
    """Beyond what the bank was prepared for."""
    model = banked("llama", arm)
    ids = tokens(1, 4 * LENGTH, seed=3)
    assert apart(in_pieces(model, ids, [LENGTH, LENGTH + 1])[0], one_pass(model, ids)) < REORDERED
