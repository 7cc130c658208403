"""HMT: its recall against values worked by hand, and a text against the loop that its equations
are, on the model as it was."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass
from tolerances import REORDERED, WRONG

from memretrofit.errors import ConfigError
from memretrofit.methods.hmt import HMT_SMOLLM, HMTConfig
from memretrofit.methods.rmt import RMTConfig
from memretrofit.modules.summary_queue import HELD, QUEUE, QueueRecall, empty_queue, pushed
from memretrofit.patching.controls import memory_silenced
from memretrofit.patching.segment_visit import segment_ledger_of
from memretrofit.patching.session import session_of
from memretrofit.retrofit import memory_parameters, patch

SEGMENT, LENGTH = 8, 37
SMALL = HMTConfig(segment_length=SEGMENT, num_sensory_tokens=3, queue_length=2, key_dim=6)
"""Four whole segments and a part of a fifth, which no longer recalls the first two."""
CONFIGS = {
    "default": SMALL,
    "no sensory": replace(SMALL, num_sensory_tokens=0, summary_fraction=0.3),
    "long sensory": replace(SMALL, num_sensory_tokens=11, num_sink_tokens=2),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def patched(config):
    torch.manual_seed(0)
    return patch(build("llama"), config)


def parts_of(model) -> dict[str, torch.Tensor]:
    """The memory's parameters, by their own names."""
    found = memory_parameters(model).items()
    return {name.partition("memory.")[2].removesuffix(".weight"): x for name, x in found}


def recalled(parts, query, queue):
    """[B, 1, E] from a list of memories [B, E], one row and one memory at a time."""
    if not queue:
        return parts["first"].expand(len(query), 1, -1)
    rows = []
    for b, q in enumerate(query):
        keys = [parts["recall.key_map"] @ memory[b] for memory in queue]
        asked = parts["recall.query_map"] @ q
        scores = [float(asked @ key) / math.sqrt(len(key)) for key in keys]
        total = sum(math.exp(s) for s in scores)
        rows.append(sum(math.exp(s) / total * m[b] for s, m in zip(scores, queue, strict=True)))
    return torch.stack(rows)[:, None]


def by_hand(model, parts, ids, config: HMTConfig, *, leaks=False):
    """Logits [B, T, vocabulary] and the queue of a model that is not patched. `leaks`: as
    published, the second forward answers the whole segment.
    """
    embed, length, first = model.get_input_embeddings(), config.segment_length, config.spans[0]
    sinks = embed(ids.new_full((len(ids), config.num_sink_tokens), model.config.bos_token_id))
    query, queue, logits = torch.zeros(len(ids), sinks.shape[-1]), [], []
    for begin in range(0, ids.shape[1], length):
        segment = embed(ids[:, begin : begin + length])
        sensory = embed(ids[:, max(begin - config.num_sensory_tokens, 0) : begin])

        def read(recall, tokens, behind, sensory=sensory):
            columns = torch.cat([sinks, recall, sensory, tokens, behind], dim=1)
            hidden = model.model(inputs_embeds=columns).last_hidden_state
            end = columns.shape[1] - behind.shape[1]
            return hidden[:, end - tokens.shape[1] : end], hidden[:, -1]

        memory, behind = recalled(parts, query, queue), parts["summary"].expand(len(ids), 1, -1)
        answered, query = read(memory, segment[:, :first], behind)
        if segment.shape[1] > first:
            memory = recalled(parts, query, queue)
            again, written = read(memory, segment, memory)
            answered = again if leaks else torch.cat([answered, again[:, first:]], dim=1)
            closed = segment.shape[1] == length
            queue = [*queue, *[written] * closed][-config.queue_length :]
        logits.append(model.lm_head(answered))
    return torch.cat(logits, dim=1), queue


@configs
@torch.no_grad()
def test_it_is_the_loop_over_segments(config: HMTConfig) -> None:
    model, base, ids = patched(config), build("llama"), tokens(2, LENGTH)
    found, cache = in_pieces(model, ids, [])
    wanted, queue = by_hand(base, parts_of(model), ids, config)
    assert apart(found, wanted) < REORDERED
    other = {"recall.query_map": -parts_of(model)["recall.query_map"]}
    assert apart(found, by_hand(base, parts_of(model) | other, ids, config)[0]) > WRONG
    state = session_of(cache, segment_ledger_of(model).owner).state
    assert state is not None
    assert state[HELD].tolist() == [[1, 1], [1, 1]]
    assert apart(state[QUEUE], torch.stack(queue, dim=1)) < REORDERED


@torch.no_grad()
def test_a_queue_of_one_and_no_sensory_tokens_is_rmt() -> None:
    ids = tokens(2, LENGTH)
    model = patched(replace(SMALL, num_sensory_tokens=0, queue_length=1))
    rmt = patched(RMTConfig(segment_length=SEGMENT, num_memory_tokens=1, carry="raw"))
    (rows,) = memory_parameters(rmt).values()
    rows.copy_(parts_of(model)["first"])
    assert apart(one_pass(model, ids), one_pass(rmt, ids)) < REORDERED
    two = patched(replace(SMALL, num_sensory_tokens=0, queue_length=2))
    assert (
        apart(one_pass(two, ids)[:, : 2 * SEGMENT], one_pass(rmt, ids)[:, : 2 * SEGMENT])
        < REORDERED
    )
    assert apart(one_pass(two, ids), one_pass(rmt, ids)) > WRONG


def test_recall_of_one_memory_is_that_memory() -> None:
    recall, queue = QueueRecall(4, 3), torch.randn(2, 5, 4)
    held = torch.zeros(2, 5)
    held[:, 3] = 1
    assert torch.equal(recall(torch.randn(2, 4), queue, held), queue[:, 3])


@torch.no_grad()
def test_recall_without_a_query_is_the_mean() -> None:
    recall, queue = QueueRecall(4, 3), torch.randn(2, 5, 4)
    recall.query_map.weight.zero_()
    held = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = recall(torch.randn(2, 4), queue, held)
    assert torch.allclose(found[0], queue[0, 2:].mean(0))
    assert torch.allclose(found[1], queue[1].mean(0))


@torch.no_grad()
def test_recall_is_not_halved_by_autocast() -> None:
    """Its queue is single in any model. Witness: a product that autocast does halve."""
    recall, queue, query = QueueRecall(4, 3), torch.randn(2, 5, 4), torch.randn(2, 4)
    expected, product = recall(query, queue, torch.ones(2, 5)), query @ query.mT
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(recall(query, queue, torch.ones(2, 5)), expected)
        assert apart((query @ query.mT).float(), product) > REORDERED


@torch.no_grad()
def test_recall_of_two() -> None:
    """Scores ln 3 and 0: weights 3/4 and 1/4."""
    recall = QueueRecall(2, 2)
    recall.query_map.weight.copy_(torch.eye(2))
    recall.key_map.weight.copy_(torch.eye(2))
    query = torch.tensor([[math.log(3) * math.sqrt(2), 0.0]])
    found = recall(query, torch.eye(2)[None], torch.ones(1, 2))
    assert torch.allclose(found, torch.tensor([[0.75, 0.25]]))


def test_the_oldest_leave_the_queue() -> None:
    state = empty_queue(1, 3, torch.zeros(1, 1))
    for first in (1.0, 3.0):
        state = pushed(state, torch.tensor([[[first], [first + 1]]]))
        seen = [state[QUEUE].flatten().tolist(), state[HELD].flatten().tolist()]
        wanted = [0.0, 1.0, 2.0] if first == 1 else [2.0, 3.0, 4.0]
        assert seen == [wanted, [float(first > 1), 1.0, 1.0]]


def test_gradients_reach_every_part() -> None:
    """Also with rows whose queue is empty, where a softmax over nothing would give nan."""
    model, ids = patched(SMALL), tokens(2, LENGTH)
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, x in parts_of(model).items():
        assert x.grad is not None, name
        assert 0 < x.grad.abs().sum() < math.inf, name


@configs
def test_one_pass_is_any_split_and_rows_are_rows_alone(config: HMTConfig) -> None:
    model, ids = patched(config), tokens(2, LENGTH)
    found = one_pass(model, ids)
    for ends in ([1, 2, 7, 9, 16], [4, 8, 24], list(range(1, LENGTH))):
        assert apart(in_pieces(model, ids, ends)[0], found) < REORDERED
    rows = [ids[0, :30], ids[1, :17]]
    padded, mask = left_padded(rows)
    together, _ = in_pieces(model, padded, [5, 17], mask=mask)
    for row, logits in zip(rows, together, strict=True):
        alone = one_pass(model, row[None])[0]
        assert apart(logits[-len(row) :], alone) < REORDERED
        assert apart(logits[-len(row) :].roll(1, 0), alone) > WRONG


@torch.no_grad()
def test_a_token_changes_nothing_before_it() -> None:
    """In the published form it does: there the summary stands in front of what it sums up."""
    model, base, ids = patched(SMALL), build("llama"), tokens(1, LENGTH)
    parts = parts_of(model)
    found, leaking = one_pass(model, ids), by_hand(base, parts, ids, SMALL, leaks=True)[0]
    leaked = 0.0
    for place in (1, 3, 4, SEGMENT, 2 * SEGMENT + 3, 3 * SEGMENT + 5):
        other = ids.clone()
        other[0, place] = ids[0, place] % 100 + 1
        changed = one_pass(model, other)
        assert torch.equal(changed[:, :place], found[:, :place])
        assert apart(changed[:, place:], found[:, place:]) > WRONG
        published = by_hand(base, parts, other, SMALL, leaks=True)[0]
        leaked = max(leaked, apart(published[:, :place], leaking[:, :place]))
    assert leaked > WRONG


def test_silenced_it_recalls_nothing() -> None:
    model, ids = patched(replace(SMALL, num_sensory_tokens=0)), tokens(2, 2 * SEGMENT)
    with memory_silenced(model):
        silenced = one_pass(model, ids)
    second = one_pass(model, ids[:, SEGMENT:])
    assert apart(silenced[:, SEGMENT:], second) < REORDERED
    assert apart(one_pass(model, ids)[:, SEGMENT:], second) > WRONG


def test_sizes() -> None:
    assert HMT_SMOLLM.spans == (512, 512)
    assert replace(SMALL, summary_fraction=0.01).spans == (1, 7)
    assert replace(SMALL, summary_fraction=1.0).spans == (7, 1)
    with pytest.raises(ConfigError, match="segment_length=1"):
        HMTConfig(segment_length=1)
