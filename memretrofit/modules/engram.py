"""Rows that the last few tokens name, and what a layer makes of them: a gate by context, and a
short causal convolution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memretrofit.errors import StateError
from memretrofit.modules.bank import (
    PAD,
    BankRead,
    MemoryBank,
    Preparation,
    Reach,
    Read,
    Tokens,
    is_real,
)
from memretrofit.modules.table import FreshRows, Table
from memretrofit.ops.ngram import distinct_primes, hash_ngrams, odd_multipliers, recent_tokens

ROWS = "rows"
"""The one table: all layers, orders and heads behind each other."""
LEAST_SCORE = 1e-6
"""Below it a gate has no gradient: the root's slope has no bound at zero."""
CONVOLUTION_EPSILON = 1e-5


class Ngrams(NamedTuple):
    """What the new tokens found."""

    rows: Tensor
    """[B, T, layers, heads * D], zeros at padding."""
    live: Tensor
    """[B, T, layers] bool: a row of this token is open, or not zero."""


class NgramBank(MemoryBank):
    """A table whose rows are named by hashed n-grams. Its constants are buffers: they are saved
    and loaded, never drawn again.
    """

    token_map: Tensor
    """[vocabulary] compressed ids."""
    pad: Tensor
    """[] the compressed id that stands where a row has no token."""
    multipliers: Tensor
    primes: Tensor
    offsets: Tensor
    """[layers, orders * heads] first row of each head."""

    def __init__(
        self,
        *,
        layers: Sequence[int],
        vocab_size: int,
        ngram_orders: tuple[int, ...],
        num_heads: int,
        table_size: int,
        value_dim: int,
        std: float,
        seed: int,
        hot_bytes: int,
    ) -> None:
        primes = distinct_primes(table_size, len(layers), len(ngram_orders), num_heads)
        rows = FreshRows(int(primes.sum()), (value_dim,), torch.float32, seed, std)
        super().__init__({ROWS: Table(rows, hot_bytes=hot_bytes)})
        self.layers, self.orders, self.seed = tuple(layers), ngram_orders, seed
        self.reach = Reach("last", max(ngram_orders) - 1)
        # until a tokenizer is seen every token is its own, and padding is one more
        self.register_buffer("token_map", torch.arange(vocab_size))
        self.register_buffer("pad", torch.tensor(vocab_size))
        self.register_buffer("multipliers", self._draw(vocab_size + 1))
        self.register_buffer("primes", primes)
        ends = primes.flatten().cumsum(0).view_as(primes)
        self.register_buffer("offsets", ends - primes)

    def _draw(self, num_ids: int) -> Tensor:
        return odd_multipliers(self.seed, self.layers, max(self.orders), num_ids)

    def prepare(self, preparation: Preparation) -> None:
        """Let tokens that normalise to the same text share an id; nothing without a tokenizer.

        Raises:
            StateError: rows are open already: they would be other n-grams' rows afterwards.
        """
        if preparation.tokenizer is None:
            return
        if self.table(ROWS).opened:
            raise StateError(
                f"{self.table(ROWS).opened} rows of this bank are open, and a tokenizer changes "
                "which n-grams they belong to. Prepare the bank before rows are opened."
            )
        token_map, count, pad = compress_vocabulary(preparation.tokenizer, len(self.token_map))
        self.token_map.copy_(token_map)
        self.pad.fill_(pad)
        self.multipliers.copy_(self._draw(count))

    def forward(self, tokens: Tokens) -> Ngrams:
        """The rows of the new tokens, for every layer at once."""
        real, table = is_real(tokens), self.table(ROWS)
        index = self._index(tokens)[real]  # [n, layers, heads]
        found = table(index)
        live = (table.is_open(index) | (found != 0).any(-1)).any(-1)
        shape = (*real.shape, index.shape[1])
        rows = found.new_zeros(*shape, index.shape[2] * found.shape[-1])
        return Ngrams(
            rows.index_put((real,), found.flatten(-2)),
            live.new_zeros(shape).index_put((real,), live),
        )

    def addresses(self, tokens: Tokens) -> dict[str, Tensor]:
        """The rows that the n-grams of these tokens name."""
        return {ROWS: self._index(tokens)[is_real(tokens)].unique()}

    def _index(self, tokens: Tokens) -> Tensor:
        """[B, T, layers, orders * heads] row numbers; those of padding mean nothing."""
        recent = recent_tokens(tokens.ids, tokens.new, max(self.orders), PAD)
        compressed = self.token_map[recent.clamp(min=0)].where(recent != PAD, self.pad)
        return hash_ngrams(compressed, self.multipliers, self.primes, self.orders) + self.offsets


class EngramRead(BankRead):
    """a v + silu(conv(norm(a v))), a = sigmoid(root(norm(h) . norm(k) / sqrt(E))), where k and v
    are linear in the rows.
    """

    def __init__(
        self,
        *,
        number: int,
        row_width: int,
        hidden_size: int,
        conv_width: int,
        dilation: int,
        silent: bool,
    ) -> None:
        """`number`: which of the bank's layers this is. `silent`: the value map starts at zero;
        else the rows have to.
        """
        super().__init__()
        self.number, self.dilation = number, dilation
        self.convolves = conv_width > 0
        self.history = max(0, conv_width - 1) * dilation
        self.key_map = nn.Linear(row_width, hidden_size, bias=False)
        self.value_map = nn.Linear(row_width, hidden_size, bias=False)
        if silent:
            nn.init.zeros_(self.value_map.weight)
        self.key_scale = nn.Parameter(torch.ones(hidden_size))
        self.hidden_scale = nn.Parameter(torch.ones(hidden_size))
        if self.convolves:
            self.conv_scale = nn.Parameter(torch.ones(hidden_size))
            self.conv_weight = nn.Parameter(torch.zeros(conv_width, hidden_size))

    def forward(self, hidden: Tensor, found: Ngrams, past: Tensor | None) -> Read:
        """Added before attention; tokens none of whose rows is live keep their bits."""
        weight = self.value_map.weight
        rows, live = found.rows[:, :, self.number].to(weight), found.live[:, :, self.number]
        live = live.to(weight.device)
        key = _normed(self.key_map(rows), self.key_scale)
        query = _normed(hidden.to(weight), self.hidden_scale)
        score = (query * key).sum(-1, keepdim=True) / math.sqrt(hidden.shape[-1])
        value = signed_root(score).sigmoid() * self.value_map(rows)
        if not self.convolves:
            return Read(value, live)
        kept = _normed(value, self.conv_scale, CONVOLUTION_EPSILON)
        taps = self._taps(kept, past)
        terms = (w * tap for w, tap in zip(self.conv_weight, taps, strict=True))
        convolved = F.silu(functools.reduce(torch.add, terms))
        earlier = None if past is None else (past != 0).any(-1)
        where = torch.stack(self._taps(live, earlier)).any(0)
        return Read(value + convolved, where, kept)

    def _taps(self, columns: Tensor, past: Tensor | None) -> list[Tensor]:
        """`columns` [B, T, ...] and as they were `dilation` tokens before, and so on, the
        earliest first; zeros before the row.
        """
        batch, length = columns.shape[:2]
        missing = self.history - (0 if past is None else past.shape[1])
        before = [columns.new_zeros(batch, missing, *columns.shape[2:])]
        before += [] if past is None else [past.to(columns)]
        source = torch.cat([*before, columns], dim=1)
        return [source[:, i : i + length] for i in range(0, self.history + 1, self.dilation)]


def signed_root(score: Tensor) -> Tensor:
    """sign(s) sqrt(max(|s|, 1e-6)), as in the released code; the paper has no root."""
    return score.abs().clamp(min=LEAST_SCORE).sqrt() * score.sign()


def _normed(x: Tensor, scale: Tensor, epsilon: float | None = None) -> Tensor:
    return F.rms_norm(x, scale.shape, scale, epsilon)


def compress_vocabulary(tokenizer: Any, size: int) -> tuple[Tensor, int, int]:
    """Ids under which tokens that differ in case, accents or surrounding space are one.

    Args:
        tokenizer: of Transformers.
        size: rows of the model's input embeddings. Those that no token uses are padding.

    Returns:
        The new id of each old one [size], how many there are, and that of padding: what the
        tokenizer pads with, or ends with, or one more.
    """
    # not ours to rewrite: every other normaliser has its own Unicode tables, and so other ids
    from tokenizers import Regex, normalizers

    folds = normalizers.NFKC(), normalizers.NFD(), normalizers.StripAccents()
    spaces = normalizers.Replace(Regex(r"[ \t\r\n]+"), " ")
    fold = normalizers.Sequence([*folds, normalizers.Lowercase(), spaces])
    strip = normalizers.Strip()
    known: dict[str, int] = {}
    new_ids: list[int] = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        if "\ufffd" in text:  # a part of a character has no text: its piece stands for it
            name = tokenizer.convert_ids_to_tokens(token)
        elif (folded := fold.normalize_str(text)) == " ":
            name = folded
        else:
            name = strip.normalize_str(folded) or text
        new_ids.append(known.setdefault(name, len(known)))
    ends = (getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos"))
    end = next((token for token in ends if token is not None), None)
    pad = len(known) if end is None else new_ids[end]
    token_map = torch.full((size,), pad)
    token_map[: len(new_ids)] = torch.tensor(new_ids)[:size]
    return token_map, max(len(known), pad + 1), pad
