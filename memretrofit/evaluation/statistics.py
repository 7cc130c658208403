"""From scores to claims: paired bootstrap intervals over sequences, and the memory gain.

::

    memory gain = NLL(shuffled) - NLL(trained)              what this text's own state is worth,
    nats its share   = memory gain / (NLL(window) - NLL(full))   of what the window loses gap
    closure = (NLL(window) - NLL(trained)) / (NLL(window) - NLL(full))

A memory that stands beside no window has `zeroed`, each segment alone, in the place of `window`.
Gap closure also counts a general correction that any text's state would give; the memory gain does
not.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memretrofit.errors import ConfigError, did_you_mean
from memretrofit.evaluation.arm_table import ARMS
from memretrofit.evaluation.likelihood import Scores


class Interval(NamedTuple):
    """A mean over sequences and its bootstrap interval."""

    mean: float
    low: float
    high: float

    def excludes_zero(self) -> bool:
        """True when zero lies outside the interval."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Summary:
    """One text's table: every arm, and the differences that matter, each with its interval.

    A gain is None when an arm that it needs was not scored. A share is also None when NLL(window) -
    NLL(full) is not above zero in every resample: a share of nothing says nothing.
    """

    sequences: int
    positions: int
    """Scored positions, all sequences together."""
    level: float
    nll: dict[str, Interval]
    """Negative log-likelihood of each arm past the window, nats per token."""
    kl: dict[str, Interval]
    """Divergence from full attention of each arm past the window, nats per token."""
    window_loss: Interval | None
    """NLL(window) - NLL(full): what there is to win; of `zeroed` where there is no window."""
    memory_gain: Interval | None
    memory_gain_share: Interval | None
    gap_closure: Interval | None
    write_gain: Interval | None
    """NLL(no_write) - NLL(trained): what writing anything at all is worth."""
    nll_by_sequence: dict[str, list[float]]
    """What `nll` is the mean of, so that two reports on the same rows can be paired."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an interval becomes {"mean", "low", "high"}.

        `arms` is added: what each name stands for, so that the values explain themselves.
        """

        def plain(value: Any) -> Any:
            if isinstance(value, Interval):
                return value._asdict()
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return value

        # asdict keeps named tuples, so that `plain` still sees intervals.
        values = {key: plain(value) for key, value in asdict(self).items()}
        return {"arms": {name: ARMS[name] for name in self.nll}, **values}


def paired_bootstrap(
    a: Tensor,
    b: Tensor,
    *,
    groups: Sequence[Hashable] | None = None,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of a - b over sequences, with its percentile interval: whole sequences are resampled.

    Both are one number per sequence, of the same sequences in the same order: [R]. The pairing
    removes what sequences have in common, so the interval is that of the difference. `groups` names
    for each sequence what it shares with others (the same passage at another length): then whole
    groups are resampled, and R counts for no more than there are groups.

    The tails are those of Student's t, because the plain percentile interval of few sequences is
    too narrow (Hesterberg, arXiv 1411.5279, calls it the expanded percentile interval).

    Raises:
        ConfigError: the shapes differ, fewer than two sequences or groups, a value is not finite,
            or an argument is out of range.
    """
    return _Resampling(len(a), samples, seed, level, groups).difference(_column(a), _column(b))


def accuracy_interval(
    values: Sequence[float], *, groups: Sequence[Hashable] | None = None, level: float = 0.95
) -> Interval:
    """Mean of scores in [0, 1], with Wilson's interval for as many trials as there are groups.

    Unlike resamples of items that are all alike, it has a width: 6 right of 6 reach down to 0.61. A
    score between 0 and 1 varies less than a right or wrong of the same mean, so for it, as for
    sequences of one group, the interval is if anything too wide.

    Raises:
        ConfigError: no scores, one outside of [0, 1], or another number of groups.
    """
    if not values or not all(0 <= value <= 1 for value in values):
        raise ConfigError("an accuracy needs at least one score, and every score within [0, 1]")
    trials = len(set(_group_numbers(groups, len(values))))
    mean, z = sum(values) / len(values), NormalDist().inv_cdf((1 + level) / 2)
    middle = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    reach = z * (mean * (1 - mean) / trials + (z / (2 * trials)) ** 2) ** 0.5 / (1 + z * z / trials)
    # At 0 and 1 one end is the mean itself, but for rounding.
    return Interval(mean, min(mean, max(0.0, middle - reach)), max(mean, min(1.0, middle + reach)))


def summarise(
    scores: Mapping[str, Scores],
    *,
    first_position: int | Tensor,
    last_position: int | None = None,
    samples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
) -> Summary:
    """The table of one text: mean per sequence over its scored columns, then over sequences.

    Args:
        scores: arm -> scores, with the names of `ARMS`; any subset of them.
        first_position: first scored column: W + N for all that is past the window, or one column
            per sequence [R], as `repeat_start` gives for the passage that comes back.
        last_position: last scored column, included; None scores to the end.
        samples: resamples of the bootstrap.
        seed: of the resampling; all differences use the same resamples.
        level: coverage of the intervals.

    Raises:
        ConfigError: an unknown arm, arms of different shapes, a sequence without a scored column,
            or fewer than two sequences.
    """
    unknown = [name for name in scores if name not in ARMS]
    if unknown:
        raise ConfigError.listing(
            "arms", [f"unknown arm {name!r}; {did_you_mean(name, ARMS)}" for name in unknown]
        )
    shapes = {name: tuple(arm.nll.shape) for name, arm in scores.items()}
    if len(set(shapes.values())) != 1:
        raise ConfigError(f"arms must be scored on the same rows; found shapes {shapes}")
    rows, columns = next(iter(shapes.values()))
    mask = _scored(rows, columns, first_position, last_position)

    resampling = _Resampling(rows, samples, seed, level)
    ordered = [name for name in ARMS if name in scores]
    nll = {name: _per_sequence(scores[name].nll, mask) for name in ordered}
    kl = {
        name: _per_sequence(scores[name].kl, mask)
        for name in ordered
        if torch.isfinite(scores[name].kl[mask]).all()
    }

    floor = "window" if "window" in nll else "zeroed"

    def difference(a: str, b: str) -> Interval | None:
        return resampling.difference(nll[a], nll[b]) if a in nll and b in nll else None

    def share(a: str, b: str) -> Interval | None:
        if not {a, b, floor, "full"} <= nll.keys():
            return None
        return resampling.ratio(nll[a] - nll[b], nll[floor] - nll["full"])

    return Summary(
        sequences=rows,
        positions=int(mask.sum()),
        level=level,
        nll={name: resampling.mean(values) for name, values in nll.items()},
        kl={name: resampling.mean(values) for name, values in kl.items()},
        window_loss=difference(floor, "full"),
        memory_gain=difference("shuffled", "trained"),
        memory_gain_share=share("shuffled", "trained"),
        gap_closure=share(floor, "trained"),
        write_gain=difference("no_write", "trained"),
        nll_by_sequence={name: values.tolist() for name, values in nll.items()},
    )


class _Resampling:
    """How often each group is drawn in each resample; shared by all that must stay paired."""

    def __init__(
        self,
        rows: int,
        samples: int,
        seed: int,
        level: float,
        groups: Sequence[Hashable] | None = None,
    ) -> None:
        self._groups = _group_numbers(groups, rows)
        self._sizes = np.bincount(self._groups)
        count, what = len(self._sizes), "sequences" if groups is None else "groups"
        problems = []
        if count < 2:
            problems.append(f"{count} {what}; an interval over {what} needs at least 2")
        if samples < 1:
            problems.append(f"samples={samples} must be at least 1")
        if not 0 < level < 1:
            problems.append(f"level={level} must lie between 0 and 1, both excluded")
        if problems:
            raise ConfigError.listing("bootstrap", problems)
        random = np.random.default_rng(seed)
        drawn = random.multinomial(count, np.full(count, 1 / count), size=samples)
        self._weights = drawn / (drawn @ self._sizes)[:, None]
        outside = _tail(level, count)
        self._tails = (outside, 1 - outside)

    def mean(self, values: np.ndarray) -> Interval:
        return self._interval(float(values.mean()), self._means(values))

    def difference(self, a: np.ndarray, b: np.ndarray) -> Interval:
        if a.shape != b.shape:
            raise ConfigError(
                f"paired scores of {a.shape[0]} and {b.shape[0]} sequences; score the same rows"
            )
        return self.mean(a - b)

    def ratio(self, part: np.ndarray, whole: np.ndarray) -> Interval | None:
        """Ratio of means; None unless the whole is above zero in every resample."""
        wholes = self._means(whole)
        if wholes.min() <= 0:
            return None
        return self._interval(float(part.mean() / whole.mean()), self._means(part) / wholes)

    def _means(self, values: np.ndarray) -> np.ndarray:
        return self._weights @ np.bincount(self._groups, weights=values)

    def _interval(self, mean: float, draws: np.ndarray) -> Interval:
        low, high = np.quantile(draws, self._tails)
        return Interval(mean, float(low), float(high))


def _group_numbers(groups: Sequence[Hashable] | None, rows: int) -> np.ndarray:
    """A number for each sequence, the same within a group. [R]"""
    if groups is None:
        return np.arange(rows)
    if len(groups) != rows:
        raise ConfigError(f"{len(groups)} groups of {rows} sequences; name one for each")
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    return np.array([places[group] for group in groups], dtype=int)


def _tail(level: float, count: int) -> float:
    """Share of the resamples to cut off at each end: Phi(-t sqrt(n / (n - 1))).

    Student's t with n - 1 degrees of freedom by its expansion (Abramowitz and Stegun, 26.7.5).
    """
    normal, v = NormalDist(), count - 1
    z = normal.inv_cdf((1 + level) / 2)
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    return normal.cdf(-t * (count / v) ** 0.5)


def _column(values: Tensor) -> np.ndarray:
    if values.dim() != 1 or not torch.isfinite(values).all():
        raise ConfigError(
            f"scores of shape {tuple(values.shape)}; expected one finite number per sequence, [R]"
        )
    return values.detach().double().cpu().numpy()


def _scored(
    rows: int, columns: int, first_position: int | Tensor, last_position: int | None
) -> Tensor:
    """Which columns count in each row. [R, T - 1]"""
    first = torch.as_tensor(first_position)
    if first.dim() > 1 or (first.dim() == 1 and first.shape[0] != rows):
        raise ConfigError(
            f"first_position of shape {tuple(first.shape)}; expected one, or one per row"
        )
    last = columns - 1 if last_position is None else last_position
    column = torch.arange(columns)
    mask = (column >= first.reshape(-1, 1)) & (column <= last)
    mask = mask.expand(rows, columns)
    empty = int((~mask.any(1)).sum())
    if empty or int(first.min()) < 0 or last >= columns:
        raise ConfigError(
            f"first_position={first.tolist()} and last_position={last_position} leave {empty} of "
            f"{rows} rows without a score, or lie outside the {columns} columns"
        )
    return mask


def _per_sequence(values: Tensor, mask: Tensor) -> np.ndarray:
    total = torch.where(mask, values.double(), 0.0).sum(1)
    return _column(total / mask.sum(1))
