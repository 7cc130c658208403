"""The two-level softmax and the landmark, alone, against their definitions and the oracle."""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import WRONG

from memretrofit.modules.landmark import Landmark, two_level
from memretrofit.ops.attend import attend, merge

ROWS, GROUPS, SHARE, QUERIES, BLOCKS, SIZE, WIDTH = 2, 2, 3, 5, 4, 6, 8
CLOSE = 1e-12
"""float64: the same sums in another order."""


@pytest.fixture
def case() -> dict[str, torch.Tensor]:
    """Logits over blocks of which the last is not full, and half of the others are not wanted."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wanted = torch.rand(ROWS, GROUPS, 1, QUERIES, BLOCKS, generator=generator) < 0.5
    wanted[..., -1] = True
    wanted[0, 0, 0, 0] = False  # one query sees nothing
    visible = wanted[..., None].repeat(1, 1, 1, 1, 1, SIZE)
    visible[..., -1, 2:] = False
    return {
        "logits": 2 * draw(ROWS, GROUPS, SHARE, QUERIES, BLOCKS, SIZE),
        "visible": visible,
        "landmarks": 2 * draw(ROWS, GROUPS, SHARE, QUERIES, BLOCKS),
        "full": visible.all(-1),
        "values": draw(ROWS, GROUPS, BLOCKS, SIZE, WIDTH),
    }


def near_and_far(case, near_logits, near_values, **change):
    """The merge of near tokens [..., C, n] with the blocks: what the memory computes."""
    lse = near_logits.logsumexp(-1)
    near = near_logits.softmax(-1) @ near_values[:, :, None]
    return merge(near, lse, *two_level(**case | change))


def near_of(case) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(*case["landmarks"].shape[:-1], 3, generator=generator, dtype=torch.float64)
    values = torch.randn(ROWS, GROUPS, 3, WIDTH, generator=generator, dtype=torch.float64)
    return logits, values


def test_weights_are_a_landmarks_share_times_the_share_inside_its_block(case):
    """One weight at a time, by the paper's definition; every row sums to 1."""
    near_logits, near_values = near_of(case)
    found, _ = near_and_far(case, near_logits, near_values)
    ones = torch.ones_like
    total, _ = near_and_far(case, near_logits, ones(near_values), values=ones(case["values"]))
    assert (total - 1).abs().max() < CLOSE
    wrong_total = 0.0
    for b, g, r, t in torch.cartesian_prod(*map(torch.arange, (ROWS, GROUPS, SHARE, QUERIES))):
        s, landmark = case["logits"][b, g, r, t], case["landmarks"][b, g, r, t]
        visible, full = case["visible"][b, g, 0, t], case["full"][b, g, 0, t]
        tail = s[-1][visible[-1]]  # tokens of the block that is not full are near ones
        chosen = full.nonzero()[:, 0]
        upper = torch.cat([near_logits[b, g, r, t], tail, landmark[chosen]]).softmax(0)
        first, second, last = upper.split((3, len(tail), len(chosen)))
        expected = first @ near_values[b, g] + second @ case["values"][b, g, -1][visible[-1]]
        for weight, block in zip(last, chosen, strict=True):
            expected = expected + weight * (s[block].softmax(0) @ case["values"][b, g, block])
        assert (found[b, g, r, t] - expected).abs().max() < CLOSE
        wrong_total = max(wrong_total, (first @ near_values[b, g] - expected).abs().max().item())
    assert wrong_total > WRONG  # witness: the near tokens alone


def test_the_oracle_landmark_is_ordinary_attention(case):
    """A landmark that is its block's log-sum-exp telescopes to the softmax over the union.

    Witnesses: the mean-field value, which is below it, and an oracle that is off by one percent.
    """
    near_logits, near_values = near_of(case)
    union = torch.cat(
        [near_logits, case["logits"].masked_fill(~case["visible"], -torch.inf).flatten(-2)], dim=-1
    )
    values = torch.cat([near_values, case["values"].flatten(2, 3)], dim=2)
    expected = union.softmax(-1) @ values[:, :, None]
    oracle = case["logits"].logsumexp(-1)

    def error(landmarks: torch.Tensor) -> float:
        output, lse = near_and_far(case, near_logits, near_values, landmarks=landmarks)
        return max(
            (output - expected).abs().max().item(), (lse - union.logsumexp(-1)).abs().max().item()
        )

    assert error(oracle) < CLOSE
    mean_field = case["logits"].mean(-1) + math.log(SIZE)
    assert (mean_field <= oracle + CLOSE).all()  # Jensen
    assert error(mean_field) > WRONG
    assert error(1.01 * oracle) > WRONG


def test_a_query_that_sees_nothing_is_the_neutral_element_and_has_gradients(case):
    leaves = {name: case[name].requires_grad_() for name in ("logits", "landmarks", "values")}
    o, lse = two_level(**case)
    assert (o[0, 0, :, 0] == 0).all()
    assert (lse[0, 0, :, 0] == -torch.inf).all()
    seen = lse > -torch.inf
    (o.sum() + lse[seen].sum()).backward()
    for name, leaf in leaves.items():
        assert leaf.grad.isfinite().all(), name
    assert not leaves["logits"].grad[~case["visible"].expand_as(case["logits"])].any()
    assert not leaves["landmarks"].grad[~case["full"].expand_as(case["landmarks"])].any()
    assert leaves["landmarks"].grad[case["full"].expand_as(case["landmarks"])].all()


def test_no_blocks_at_all_are_the_neutral_element(case):
    none = {name: x[..., :0] for name, x in case.items() if name in ("landmarks", "full")}
    none |= {name: case[name][..., :0, :] for name in ("logits", "visible")}
    o, lse = two_level(**none, values=case["values"][:, :, :0])
    assert (o == 0).all()
    assert (lse == -torch.inf).all()


def test_a_landmark_is_a_learned_mean_of_rotated_keys():
    """Untrained, the mean of the placed keys; with a strong pooling query, the key along it."""
    torch.manual_seed(0)
    landmark, keys = Landmark(GROUPS, WIDTH), torch.randn(3, GROUPS, SIZE, WIDTH)

    def place(x: torch.Tensor) -> torch.Tensor:
        return x.flip(-1)

    assert torch.allclose(landmark(keys, place), place(keys).mean(-2), atol=1e-6)
    with torch.no_grad():
        landmark.pooling[0, 1] = 1e4
        landmark.offset[1] = torch.arange(WIDTH)
    found = landmark(keys, place)
    best = keys[:, 0, :, 1].argmax(-1)
    assert torch.equal(found[:, 0], place(keys)[torch.arange(3), 0, best])
    shifted = place(keys[:, 1] + torch.arange(WIDTH)).mean(-2)
    assert torch.allclose(found[:, 1], shifted, atol=1e-5)


def test_uniform_blocks_need_no_training():
    """Where all keys of a block are equal, mean key and log S are its log-sum-exp: the result is
    attention over its tokens."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, QUERIES, WIDTH), torch.randn(1, 1, BLOCKS, WIDTH)
    values = torch.randn(1, 1, BLOCKS, SIZE, WIDTH)
    repeated = key[:, :, :, None].expand(1, 1, BLOCKS, SIZE, WIDTH)
    output, normaliser = attend(query, repeated.flatten(2, 3), values.flatten(2, 3), scale=1.0)
    logits = torch.einsum("bgck,bgusk->bgcus", query, repeated)
    mean = Landmark(1, WIDTH)(repeated[0, 0][:, None], lambda x: x).movedim(0, 1)
    landmarks = torch.einsum("bgck,guk->bgcu", query, mean)
    seen = torch.ones(1, 1, 1, QUERIES, BLOCKS, SIZE, dtype=torch.bool)
    for bias, right in ((math.log(SIZE), True), (0.0, False)):
        o, lse = two_level(
            logits[:, :, None], seen, landmarks[:, :, None] + bias, seen.all(-1), values
        )
        assert torch.allclose(o[:, :, 0], output, atol=1e-5)
        assert torch.allclose(lse[:, :, 0], normaliser, atol=1e-5) is right
