"""Position policies: what they are made for, in whole models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass, positions_of
from tolerances import REORDERED, WRONG

from memretrofit.methods.infllm import InfLLMConfig
from memretrofit.methods.knn_memory import KNNMemoryConfig
from memretrofit.methods.landmark import LandmarkConfig
from memretrofit.modules import stored
from memretrofit.modules.positions import POSITIONS, packed
from memretrofit.retrofit import patch

LENGTH, SIZES = 50, {"sliding_window": 8, "num_sink_tokens": 0}
INFLLM = InfLLMConfig(**SIZES, block_size=4, top_k=2, position_group=3)
METHODS = {
    "infllm": INFLLM,
    "landmark": LandmarkConfig(**SIZES, block_size=4, top_k=2, position_group=3),
    "knn": KNNMemoryConfig(**SIZES, top_k=5, position_group=3),
}


def opened(config):
    """A model whose gates, if it has any, are open."""
    model = patch(build("llama"), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("opening"):
                parameter.fill_(1.0)
    return model


@pytest.mark.parametrize(
    ("policy", "group"), [("absolute", 1), ("grouped", 1), ("reindexed", 1), ("reindexed", 5)]
)
def test_all_that_left_without_a_gap_is_full_attention(policy, group):
    """With all of it fetched, side by side before the window is where it was, and groups of one
    are no groups. Witnesses: two blocks, and groups of two."""
    ids, everything = tokens(2, LENGTH), replace(INFLLM, top_k=99, position_group=group)
    expected = one_pass(build("llama"), ids)
    model = patch(build("llama"), replace(everything, positions=policy))
    assert apart(one_pass(model, ids), expected) < REORDERED
    assert apart(in_pieces(model, ids, range(1, LENGTH))[0], expected) < REORDERED
    for wrong in ({"top_k": 2, "positions": policy}, {"position_group": 2, "positions": "grouped"}):
        found = one_pass(patch(build("llama"), replace(everything, **wrong)), ids)
        assert apart(found, expected) > WRONG


@pytest.mark.parametrize(
    ("method", "policy"),
    [(m, p) for m in METHODS for p in ("grouped", "reindexed") if (m, p) != ("knn", "reindexed")],
)
def test_a_row_is_read_alike_wherever_it_begins(method, policy):
    """Any padding, any split, any number of queries that fetch together. Forbids groups that are
    counted from the first slot of the batch. Witness: the border of the window."""
    config = replace(METHODS[method], positions=policy)
    model, row = opened(config), tokens(1, LENGTH)
    expected = one_pass(model, row)
    for extra in (1, 2, 5):
        ids, mask = left_padded([row[0], row[0, :20]], extra=extra)
        padded = {"attention_mask": mask, "position_ids": positions_of(mask)}
        assert apart(one_pass(model, ids, **padded)[:1, extra:], expected) < REORDERED
        pieces, _ = in_pieces(model, ids, (20, 21, 33), mask=mask)
        assert apart(pieces[:1, extra:], expected) < REORDERED
    clamped = one_pass(opened(replace(config, positions="clamp")), row)
    assert apart(clamped, expected) > WRONG


def test_queries_are_turned_a_few_blocks_at_a_time(monkeypatch):
    """What bounds memory changes no result."""
    model, ids = opened(replace(INFLLM, positions="reindexed")), tokens(1, LENGTH)
    expected = one_pass(model, ids)
    for name, size in (("TURNED", 1), ("TURNED", 9000)):
        monkeypatch.setattr(stored, name, size)
        assert apart(one_pass(model, ids), expected) < REORDERED


def test_what_a_query_attends_is_packed_before_its_window():
    """Distances of hand-made choices: each token one further than the next one attended."""
    attended = torch.tensor(
        [
            [[1, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]],  # a block not wanted, one that is begun
            [[0, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]],  # the tail and the head of events
        ]
    ).bool()[None, None]
    further, window = packed(attended), 8
    entry = torch.arange(3)
    distance = window + further[..., None] - entry  # the query is that far from entry 0 of a block
    for query in (0, 1):
        seen = attended[0, 0, query]
        found = distance[0, 0, query][seen]
        assert found.tolist() == list(range(window + int(seen.sum()) - 1, window - 1, -1))


def test_the_largest_distance_of_each_policy():
    """T = 1000, W = 100, P = 4, n = 32 fetched: which trained positions a policy needs."""
    t, window, left = torch.tensor([1000]), torch.tensor([100]), torch.arange(0, 901)
    largest = {}
    for name, policy in POSITIONS.items():
        attended = torch.ones(1, 1, 1, 2, 16, dtype=torch.bool)
        further = policy.further(attended)
        query = policy.query(t, window, 4) + (0 if further is None else further.max())
        keys = policy.fetched(left, torch.arange(901) % 16, 4)
        largest[name] = int((query - keys).max())
    assert largest == {"absolute": 1000, "clamp": 100, "grouped": 325, "reindexed": 131}
