"""Rows of token ids cut from whole documents, some of which need a memory by construction.

A plain row is T consecutive tokens of one document. A repeated-passage row is::

    [ prefix ; passage ; what follows the passage ; passage again ]    T tokens of one document
               ^ repeat_start - lag                 ^ repeat_start

with lag > window, so that only a memory can tell what comes back. Nothing is padded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from memretrofit.data.sources import Document
from memretrofit.errors import ConfigError, did_you_mean

# Independent random streams of one seed.
_SOURCE, _ORDER, _REPEAT = 0, 1, 2


class Row(NamedTuple):
    """One row, and where it comes from."""

    input_ids: Tensor
    """Token ids, int64.                                                          [T]"""
    repeat_start: int
    """First position of the passage that comes back; T when none does."""
    lag: int
    """Distance back to the passage's first occurrence; 0 when none comes back."""
    source: str
    title: str


class RowDataset(Dataset[dict[str, Tensor]]):
    """A map-style dataset in which item i depends on (seed, i) and the documents alone.

    A resumed run therefore sees the same rows, whatever the number of workers or the dataset's
    length. Each document is cut into blocks of T tokens at a random offset. A source's blocks are
    drawn without replacement: no two rows share a token until every block of that source has been
    used once; then the cut and the order are drawn anew. Documents shorter than T give no row.

    Args:
        documents: whole documents; their `source` is what `weights` refers to.
        tokenizer: a Transformers tokenizer; no special tokens are added.
        sequence_length: T.
        repeated_passage_share: probability that a row repeats a passage.
        minimum_lag: least distance between the two occurrences; must exceed the largest window that
            the model will see. Default T // 2.
        passage_length: least and largest number of tokens that come back. Default
            (T // 8, T // 4).
        weights: relative number of rows per source. Default: one per source, each the same.
        size: `len()` of the dataset. Default: the number of blocks of all sources.

    Raises:
        ConfigError: a value is out of range, a weight names an unknown source or leaves one out, or
            the documents of a source are all shorter than a row.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Any,
        sequence_length: int,
        repeated_passage_share: float = 0.0,
        seed: int = 0,
        weights: Mapping[str, float] | None = None,
        *,
        minimum_lag: int | None = None,
        passage_length: tuple[int, int] | None = None,
        size: int | None = None,
    ) -> None:
        self.sequence_length = sequence_length
        self.repeated_passage_share = repeated_passage_share
        self.seed = seed
        self.minimum_lag = sequence_length // 2 if minimum_lag is None else minimum_lag
        default_passage = (max(1, sequence_length // 8), max(1, sequence_length // 4))
        self.passage_length = default_passage if passage_length is None else passage_length
        self._check()

        self._blocks: dict[str, _Blocks] = {}
        for source in dict.fromkeys(document.source for document in documents):
            mine = [document for document in documents if document.source == source]
            self._blocks[source] = _Blocks(source, mine, tokenizer, sequence_length)
        if not self._blocks:
            raise ConfigError("no documents to make rows of; load_documents gives some")
        self.sources = tuple(self._blocks)
        share = _shares(self.sources, weights)
        self._cumulative = np.cumsum(share)
        self.size = sum(blocks.count for blocks in self._blocks.values()) if size is None else size
        if self.size < 1:
            raise ConfigError(f"size={size!r} must be at least 1 row")
        self._schedule = np.empty((0, 2), dtype=np.int64)

    def _check(self) -> None:
        length, (least, most) = self.sequence_length, self.passage_length
        problems = []
        if length < 2:
            problems.append(f"sequence_length={length!r} must be at least 2 tokens")
        if not 0 <= self.repeated_passage_share <= 1:
            problems.append(
                f"repeated_passage_share={self.repeated_passage_share!r} must lie in [0, 1]"
            )
        if self.seed < 0:
            problems.append(f"seed={self.seed!r} must not be negative")
        if self.repeated_passage_share > 0:
            if not 1 <= least <= most:
                problems.append(
                    f"passage_length={(least, most)!r} must be (least, largest), both at least 1"
                )
            if max(self.minimum_lag, most) + most > length:
                problems.append(
                    f"minimum_lag={self.minimum_lag} and a passage of up to {most} tokens do not "
                    f"fit in sequence_length={length}; use longer rows, a shorter lag or passage"
                )
            if self.minimum_lag < 1:
                problems.append(f"minimum_lag={self.minimum_lag!r} must be at least 1")
        if problems:
            raise ConfigError.listing("RowDataset", problems)

    def __len__(self) -> int:
        """Number of rows that one pass over the dataset gives."""
        return self.size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`input_ids` [T] and `repeat_start` [] of row `index`: what a collator can stack."""
        row = self.row(index)
        return {"input_ids": row.input_ids, "repeat_start": torch.tensor(row.repeat_start)}

    def row(self, index: int) -> Row:
        """Row `index` with its provenance.

        Raises:
            IndexError: the index is outside the dataset.
        """
        if not -self.size <= index < self.size:
            raise IndexError(f"row {index} of a dataset of {self.size} rows")
        index %= self.size
        length = self.sequence_length
        source, rank = self._place(index)
        title, block = self._blocks[source].block(self.seed, self.sources.index(source), rank)

        random = np.random.default_rng((self.seed, _REPEAT, index))
        repeat_start, lag = length, 0
        if random.random() < self.repeated_passage_share:
            least, most = self.passage_length
            passage = int(random.integers(least, most + 1))
            repeat_start = length - passage
            lag = int(random.integers(max(self.minimum_lag, passage), repeat_start + 1))
            first = repeat_start - lag
            block = np.concatenate([block[:repeat_start], block[first : first + passage]])
        ids = torch.from_numpy(block.astype(np.int64))
        return Row(ids, repeat_start, lag, source, title)

    def rows(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """The first `count` rows stacked, for evaluation: ids [R, T] and repeat_start [R]."""
        chosen = [self.row(index) for index in range(self.size if count is None else count)]
        return (
            torch.stack([row.input_ids for row in chosen]),
            torch.tensor([row.repeat_start for row in chosen]),
        )

    def _place(self, index: int) -> tuple[str, int]:
        """The source of row `index`, and how many rows before it come from the same source."""
        if index >= len(self._schedule):
            # One number per row from one stream, whose beginning does not depend on its length.
            length = max(1024, 2 * (index + 1))
            draw = np.random.default_rng((self.seed, _SOURCE)).random(length)
            which = np.searchsorted(self._cumulative, draw, side="right")
            which = np.minimum(which, len(self.sources) - 1)
            rank = np.empty(length, dtype=np.int64)
            for number in range(len(self.sources)):
                mine = which == number
                rank[mine] = np.arange(mine.sum())
            self._schedule = np.stack([which, rank], axis=1)
        number, rank = self._schedule[index]
        return self.sources[number], int(rank)


class _Blocks:
    """The token ids of one source, cut into blocks of T in an order that each pass draws anew."""

    def __init__(
        self, source: str, documents: Sequence[Document], tokenizer: Any, length: int
    ) -> None:
        ids = tokenizer([document.text for document in documents], add_special_tokens=False)
        self.length = length
        self.ids: list[np.ndarray] = []
        self.titles: list[str] = []
        longest = 0
        for document, row in zip(documents, ids["input_ids"], strict=True):
            longest = max(longest, len(row))
            if len(row) >= length:
                self.ids.append(np.asarray(row, dtype=np.int32))
                self.titles.append(document.title)
        if not self.ids:
            raise ConfigError(
                f"text source {source!r}: sequence_length={length} asked, the longest of its "
                f"{len(documents)} documents has {longest} tokens; use shorter rows or longer text"
            )
        self.per_document = np.array([len(row) // length for row in self.ids])
        self.count = int(self.per_document.sum())
        self._pass: tuple[tuple[int, int, int], np.ndarray, np.ndarray] | None = None

    def block(self, seed: int, number: int, rank: int) -> tuple[str, np.ndarray]:
        """The `rank`-th block that this source gives: the title of its document, and ids [T]."""
        passes, place = divmod(rank, self.count)
        key = (seed, number, passes)
        if self._pass is None or self._pass[0] != key:
            random = np.random.default_rng((seed, _ORDER, number, passes))
            slack = np.array([len(row) for row in self.ids]) - self.per_document * self.length
            self._pass = (key, random.permutation(self.count), random.integers(0, slack + 1))
        _, order, offsets = self._pass
        ends = np.cumsum(self.per_document)
        document = int(np.searchsorted(ends, order[place], side="right"))
        inside = int(order[place] - (ends[document] - self.per_document[document]))
        start = int(offsets[document]) + inside * self.length
        return self.titles[document], self.ids[document][start : start + self.length]


def _shares(sources: Sequence[str], weights: Mapping[str, float] | None) -> np.ndarray:
    if weights is None:
        return np.full(len(sources), 1 / len(sources))
    problems = [
        f"weight for unknown source {name!r}; {did_you_mean(name, sources)}"
        for name in weights
        if name not in sources
    ]
    problems += [f"no weight for source {name!r}" for name in sources if name not in weights]
    problems += [
        f"weight of {name!r} is {weight!r}; it must be a positive number"
        for name, weight in weights.items()
        if not (weight > 0 and np.isfinite(weight))
    ]
    if problems:
        raise ConfigError.listing("weights", problems)
    share = np.array([float(weights[name]) for name in sources])
    return share / share.sum()
