"""Rows by formula: against the definition in Python's integers, and as draws."""

from __future__ import annotations

import statistics

import pytest
import torch

from memretrofit.errors import ConfigError
from memretrofit.modules.fresh_rows import FreshRows

WORD = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(word):
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def row_of(seed, row, width, std):
    """A row by the definition, one value at a time."""
    normal = statistics.NormalDist()
    low, high = normal.cdf(-2), normal.cdf(2)
    first, values = mix((mix(seed) + (row + 1) * GOLDEN) & WORD), []
    for place in range(width):
        word = mix((first + (place // 4 + 1) * GOLDEN) & WORD)
        level = (word >> 16 * (place % 4)) & 0xFFFF
        values.append(std * normal.inv_cdf(low + (level + 0.5) / (1 << 16) * (high - low)))
    return torch.tensor(values)


def test_mix_is_splitmix64():
    # Vigna's splitmix64.c: the first outputs for the seed 1234567
    state, found = 1234567, []
    for _ in range(3):
        state = (state + GOLDEN) & WORD
        found.append(mix(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("row", [0, 7, 10**12])
def test_a_row_is_the_definition(row):
    fresh = FreshRows(10**12 + 1, (3, 7), seed=5, std=0.02)
    found = fresh.read(torch.tensor([row])).flatten()
    expected = row_of(5, row, 21, 0.02)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert (found - row_of(6, row, 21, 0.02)).abs().max() > 0.005


def test_a_row_does_not_depend_on_the_others():
    fresh = FreshRows(40_000, (9, 5), torch.bfloat16, seed=1, std=1.0)
    many = fresh.read(torch.arange(40_000))  # more than is made at once
    for index in ([0], [39_999], [3, 17, 39_998], [17, 39_998]):
        assert torch.equal(fresh.read(torch.tensor(index)), many[index])


def test_draws_are_a_truncated_normal_without_pattern():
    rows = FreshRows(500, (400,), seed=9, std=0.5).read(torch.arange(500)).double()
    assert rows.abs().max() <= 1.0
    assert abs(rows.mean()) < 0.005  # 0.44 / sqrt(200,000) is 0.001
    assert abs(rows.std() - 0.5 * 0.8796) < 0.005  # of a normal that is cut at two deviations
    for one, other in ((rows[1:], rows[:-1]), (rows[:, 1:], rows[:, :-1])):
        correlation = torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 0.01


def test_the_zero_part_alone_is_zero():
    plain = FreshRows(8, (2, 3, 4), std=1.0)
    parted = FreshRows(8, (2, 3, 4), std=1.0, zero_part=(1, 2))
    rows, whole = parted.read(torch.arange(8)), plain.read(torch.arange(8))
    assert not rows[:, :, 2].any()
    assert torch.equal(rows[:, :, :2], whole[:, :, :2])
    assert whole[:, :, 2].all()


def test_without_deviation_all_is_zero_and_takes_no_memory():
    fresh = FreshRows(10**15, (64,))
    assert fresh.blank
    assert fresh.nbytes == 0
    assert torch.equal(fresh.read(torch.tensor([0, 10**14])), torch.zeros(2, 64))


def test_identity_tells_what_changes_a_row():
    same = {FreshRows(4, (2,), std=1.0, seed=3).identity for _ in range(2)}
    others = [
        FreshRows(5, (2,), std=1.0, seed=3),
        FreshRows(4, (3,), std=1.0, seed=3),
        FreshRows(4, (2,), torch.bfloat16, std=1.0, seed=3),
        FreshRows(4, (2,), std=1.0, seed=4),
        FreshRows(4, (2,), std=2.0, seed=3),
        FreshRows(4, (2,), std=1.0, seed=3, zero_part=(0, 1)),
        FreshRows(4, (2,), seed=3),
    ]
    assert len(same | {source.identity for source in others}) == 8
    # zero rows are the same rows for every seed
    assert FreshRows(4, (2,), seed=3).identity == FreshRows(4, (2,), seed=4).identity


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rows": 0}, "0 rows"),
        ({"shape": (3, 0)}, r"\[3, 0\]"),
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.int8}, "int8"),
        ({"std": -1.0}, "std=-1.0"),
        ({"std": float("nan")}, "std=nan"),
        ({"zero_part": (2, 0)}, "zero_part"),
        ({"zero_part": (1, 4)}, "zero_part"),
    ],
)
def test_unusable_values_are_refused(change, match):
    with pytest.raises(ConfigError, match=match):
        FreshRows(**{"rows": 3, "shape": (3, 4), **change})
