"""I7 to I9: every earlier token is seen exactly once, no later one ever, and the controls take
away what they name."""

from __future__ import annotations

import pytest
import torch
from contract.arms import (
    EXACT,
    LIVE,
    METHODS_WITH_MEMORY,
    SINKS,
    WINDOW,
    every_arm,
    every_live,
    every_memory,
    patched,
    sinks_move,
    window_alone,
)
from contract.families import VOCABULARY, build, tokens
from contract.runs import (
    apart,
    explicit_window,
    in_pieces,
    one_pass,
)
from tolerances import ONE_LAYER, REORDERED, WRONG

from memretrofit.errors import StateError
from memretrofit.modules.events import EventMemory
from memretrofit.modules.recall import RecallMemory
from memretrofit.patching.controls import state_shuffled, window_override, writes_disabled
from memretrofit.retrofit import memory_disabled, memory_parameters

LENGTH = 30
SEEN = [(family, arm) for family, arm in LIVE if arm in METHODS_WITH_MEMORY]


def influence(model) -> torch.Tensor:
    """[t, j] how far logits at t move when token j becomes another one: row j of one batch holds
    that change."""
    ids = tokens(1, LENGTH).expand(LENGTH, -1).clone()
    ids[range(LENGTH), range(LENGTH)] = (ids[range(LENGTH), range(LENGTH)] + 1) % VOCABULARY
    moved = one_pass(model, ids) - one_pass(model, tokens(1, LENGTH))
    return moved.abs().amax(-1).T


def hold_on(model) -> None:
    """Slow every decay down, or the oldest tokens are below the last bit of the state."""
    with torch.no_grad():
        for name, parameter in memory_parameters(model).items():
            if name.endswith("log_rate"):
                parameter.fill_(-6.0)


def in_window(window: int = WINDOW, sinks: int = SINKS) -> torch.Tensor:
    t, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    return (j <= t) & ((t - j < window) | (j < sinks))


@pytest.mark.parametrize(("family", "arm"), SEEN, ids=["-".join(x) for x in SEEN])
def test_every_earlier_token_counts_and_no_other(family, arm):
    """I7 in one layer: with writes all j <= t, without writes exactly window and sinks. Forbids
    a token that falls
    between the two, which no tolerance on logits shows."""
    model = patched(family, arm, layers=1, reads_all=True)
    hold_on(model)
    causal = torch.ones(LENGTH, LENGTH).tril().bool()
    with_state = influence(model)
    # other shapes of batch may round otherwise; a token that is seen moves logits far more than
    # that
    assert (with_state[~causal] < ONE_LAYER).all()
    assert (with_state[causal] > ONE_LAYER).all()
    with writes_disabled(model):
        without_state = influence(model)
    assert ((without_state > ONE_LAYER) == in_window()).all()


def test_the_map_of_influence_rejects_a_window_that_is_off_by_one():
    model = patched("llama", "window_sinks", layers=1)
    found = influence(model) > ONE_LAYER
    assert (found == in_window()).all()
    for window, sinks in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        assert not (found == in_window(WINDOW + window, SINKS + sinks)).all()


def fetches_unions(model) -> bool:
    """Whether queries fetch together what any of them wants: then the length of their sums depends
    on later tokens, whose shares are zero.
    """
    return any(isinstance(module, RecallMemory | EventMemory) for module in model.modules())


@every_live
def test_no_later_token_changes_anything(family, arm):
    """I8, bit for bit, at the borders of the window and of a block; queries that fetch together
    round alike only while they fetch as much.
    """
    model, ids = patched(family, arm), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    for j in (1, SINKS, EXACT - 1, EXACT, EXACT + 1, LENGTH - 1):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % VOCABULARY
        found = one_pass(model, changed)
        if fetches_unions(model):
            assert apart(found[:, :j], expected[:, :j]) < ONE_LAYER
        else:
            assert torch.equal(found[:, :j], expected[:, :j])
        assert apart(found[:, j], expected[:, j]) > WRONG


@pytest.mark.parametrize("arm", ["infllm", "infllm-host", "composed"])
def test_the_tolerance_of_unions_rejects_a_choice_that_queries_share(arm, monkeypatch):
    """Witness for the test above: queries that choose by their mean, as published InfLLM has them,
    from what has left each one's window."""
    model, ids = patched("llama", arm), tokens(2, LENGTH)
    choose = RecallMemory.choose

    def shared(self, query, border, store):
        return choose(self, query.mean(2, keepdim=True).expand_as(query), border, store)

    monkeypatch.setattr(RecallMemory, "choose", shared)
    expected, moved = one_pass(model, ids), []
    for j in (EXACT + 1, LENGTH - 1):
        changed = ids.clone()
        changed[:, j:] = (changed[:, j:] + 1) % VOCABULARY
        moved.append(apart(one_pass(model, changed)[:, :j], expected[:, :j]))
    assert max(moved) > 10 * ONE_LAYER


@pytest.mark.parametrize("live", [True, False], ids=["trained", "fresh"])
@every_live
def test_without_writes_a_memory_is_its_window(family, arm, live):
    """I9 for the whole forward and for a cache; streaming_llm has no state, so nothing changes
    there."""
    model, ids = patched(family, arm, live=live), tokens(2, LENGTH)
    has_memory = arm in METHODS_WITH_MEMORY
    expected = one_pass(window_alone(family, arm), ids) if has_memory else one_pass(model, ids)
    if arm == "window_sinks":
        assert apart(expected, explicit_window(build(family), ids, WINDOW, SINKS)) < REORDERED
    with writes_disabled(model):
        assert apart(one_pass(model, ids), expected) < REORDERED
        assert apart(in_pieces(model, ids, (5, 12, 13, 20))[0], expected) < REORDERED
    if has_memory and live:
        assert apart(one_pass(model, ids), expected) > WRONG


@every_memory
def test_a_new_conversation_starts_empty(arm):
    """Nothing of one forward or cache is left on the module for the next."""
    model, ids = patched("llama", arm), tokens(2, LENGTH)
    first = one_pass(model, ids)
    _, other = in_pieces(model, tokens(2, LENGTH, seed=5), (9,))
    assert torch.equal(one_pass(model, ids), first)
    assert apart(in_pieces(model, ids, (15,))[0], first) < REORDERED
    other.reset()
    assert other.get_seq_length() == 0
    assert apart(in_pieces(model, ids, (15,), cache=other)[0], first) < REORDERED


@every_memory
def test_interleaved_conversations_do_not_meet(arm):
    """State is in the cache: two conversations, a piece of each in turn."""
    model = patched("llama", arm)
    texts = [tokens(1, LENGTH, seed=n) for n in range(2)]
    caches, logits = [None, None], [[], []]
    for begin, end in ((0, 12), (12, 13), (13, 25), (25, LENGTH)):
        for n, text in enumerate(texts):
            with torch.no_grad():
                output = model(text[:, begin:end], past_key_values=caches[n], use_cache=True)
            caches[n] = output.past_key_values
            logits[n].append(output.logits)
    for text, found in zip(texts, logits, strict=True):
        assert apart(torch.cat(found, 1), one_pass(model, text)) < REORDERED


@every_memory
def test_a_shuffled_state_is_the_state_of_the_next_row(arm):
    """In one layer the shuffled model is: this row's window, the next row's state. Equal rows
    hide it, others do not. What is chosen may hang on the logits (`em_llm`), so all is read."""
    model = patched("llama", arm, layers=1, reads_all=True)
    same = tokens(1, LENGTH).expand(3, -1)
    with state_shuffled(model):
        assert apart(one_pass(model, same), one_pass(model, same)) == 0
        shuffled = one_pass(model, same)
    assert apart(shuffled, one_pass(model, same)) < REORDERED
    rows = tokens(3, LENGTH)
    # all rows end alike, so that queries and windows agree and only states differ
    rows[:, LENGTH - WINDOW :] = rows[:1, LENGTH - WINDOW :]
    rows[:, :SINKS] = rows[:1, :SINKS]
    plain = one_pass(model, rows)
    with state_shuffled(model):
        shuffled = one_pass(model, rows)
        pieces, _ = in_pieces(model, rows, (9, 17, 18))
    assert apart(plain[:, -1], shuffled[:, -1]) > WRONG
    assert apart(shuffled[:, -1], plain.roll(-1, dims=0)[:, -1]) < REORDERED
    assert apart(shuffled[:, :EXACT], plain[:, :EXACT]) < REORDERED
    assert apart(pieces, shuffled) < REORDERED
    assert apart(shuffled[:, -1], plain.roll(1, dims=0)[:, -1]) > WRONG  # witness: the row before


@every_arm
def test_another_window_for_one_forward(arm):
    """`window_override` is a patch with that window, weights and all."""
    model, ids = patched("llama", arm), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    with window_override(model, sliding_window=5, num_sink_tokens=2):
        narrow = one_pass(model, ids)
        with writes_disabled(model):
            no_state = one_pass(model, ids)
    with window_override(model, sliding_window=60, num_sink_tokens=0):
        assert torch.equal(one_pass(model, ids), one_pass(build("llama"), ids))
    assert apart(narrow, expected) > WRONG
    assert torch.equal(one_pass(model, ids), expected)
    if not sinks_move(arm):
        assert apart(no_state, explicit_window(build("llama"), ids, 5, 2)) < REORDERED


@every_arm
def test_another_window_needs_a_forward_without_cache(arm):
    """A cache has the window that it was filled with. Models use one unless told otherwise, so
    this must not pass."""
    model, ids = patched("llama", arm), tokens(2, LENGTH)
    with (
        window_override(model, sliding_window=5, num_sink_tokens=2),
        pytest.raises(StateError, match="use_cache=False"),
    ):
        model(ids)


@every_memory
def test_shuffling_needs_rows_to_shuffle(arm):
    """With one row the control would be the treatment."""
    model = patched("llama", arm)
    with state_shuffled(model), pytest.raises(StateError, match="at least two"):
        one_pass(model, tokens(1, LENGTH))


@every_live
def test_a_disabled_memory_is_the_base_model(family, arm):
    """Forward, gradient mode and generation; and the memory is back afterwards, also after an
    error."""
    base, model, ids = build(family), patched(family, arm), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    with memory_disabled(model):
        assert torch.equal(one_pass(model, ids), one_pass(base, ids))
        assert torch.equal(in_pieces(model, ids, (9, 20))[0], in_pieces(base, ids, (9, 20))[0])
        assert torch.equal(model(ids).logits, base(ids).logits)
        found = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, base.generate(ids, max_new_tokens=5, do_sample=False))
    with pytest.raises(ZeroDivisionError), memory_disabled(model):
        raise ZeroDivisionError
    assert torch.equal(one_pass(model, ids), expected)
    assert apart(expected, one_pass(base, ids)) > WRONG
