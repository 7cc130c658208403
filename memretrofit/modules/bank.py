"""What a memory bank is: the contract between rows that were added to a model and the seams at
which they are read.

A bank stands beside the whole model. Once per forward it decides, from the tokens of each row so
far, what is looked up; then one read in each patched layer turns that into something which is added
there. Rows live in tables (`modules.table`): what trains is a table's delta, never the table.
Letters: see `memretrofit.__doc__`; P is the number of tokens that came before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from memretrofit.errors import StateError
from memretrofit.modules.table import Table

PAD = -1
"""Stands in `Tokens.ids` where a row has no token."""


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of a forward behind those that came before in their rows."""

    ids: Tensor
    """[B, P + T] the row so far, or as much of it as the bank's `Reach` asks for; `PAD` where there
    is no token.
    """
    new: int
    """T: the last so many are read in this forward."""
    routes: Tensor | None = None
    """[B, depth] what the user pinned for these conversations, -1 to abstain; None: the bank
    decides.
    """

    @classmethod
    def of(cls, text: Tensor) -> Tokens:
        """One text [T] of ids, read at once."""
        return cls(ids=text[None], new=len(text))


class Reach(NamedTuple):
    """Which of the tokens that came before the new ones a look-up needs."""

    end: Literal["first", "last"]
    """The first ones that there are of a row, or the columns right before the new ones."""
    length: int


def first_tokens(ids: Tensor, count: int) -> Tensor:
    """The first `count` tokens that there are in each row of `ids` [B, P], `PAD` behind them."""
    real = ids != PAD
    place = (real.cumsum(-1) - 1).masked_fill(~real, count).clamp(max=count)
    # one more column takes all others
    return ids.new_full((len(ids), count + 1), PAD).scatter_(1, place, ids)[:, :count]


def tensors_sha256(named: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes, types and values, in their order."""
    digest = hashlib.sha256()
    for name, x in named:
        content = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{name} {tuple(x.shape)} {x.dtype} ".encode())
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


class Read(NamedTuple):
    """What one layer adds."""

    added: Tensor | None
    """[B, T, E]; None leaves the original forward as it is, bit for bit."""
    where: Tensor | None = None
    """[B, T] bool: every other token keeps its original bits. None adds everywhere."""
    kept: Tensor | None = None
    """[B, T, D] what the read must see again of these tokens."""


class BankRead(nn.Module):
    """One layer's part: what was looked up becomes something that is added there."""

    history: int = 0
    """Earlier tokens whose `Read.kept` the forward needs."""

    def forward(self, hidden: Tensor, found: Any, past: Tensor | None) -> Read:
        """What is added at this layer.

        Args:
            hidden: [B, T, E] input of the FFN, or of the decoder layer.
            found: what the bank's forward returned.
            past: [B, n, D] `kept` of the last tokens, n <= history, zeros at padding; None before
                the first token.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What a bank may look at before it is trained."""

    examples: Sequence[Tensor]
    """Texts to be learned, [T] ids each."""
    generic: Sequence[Tensor]
    """Ordinary text, [T] ids each: for thresholds and background counts."""
    embedding: Tensor
    """[V, E] the model's frozen input embeddings."""
    tokenizer: Any = None


class MemoryBank(nn.Module):
    """Rows for a whole model, and the rule that says which of them a token reads."""

    reach = Reach("last", 0)
    """What `forward` reads of a row beside its new tokens."""
    has_routes: bool = False
    """Whether a conversation reads at a place that the user may pin (`Tokens.routes`)."""

    def __init__(self, tables: Mapping[str, Table]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(tables)

    def forward(self, tokens: Tokens) -> Any:
        """What the reads of all layers are given. Depends on a token and those before it alone."""
        raise NotImplementedError

    def addresses(self, tokens: Tokens) -> dict[str, Tensor]:
        """The rows of each table that these tokens read, unique numbers; {} where that depends on
        hidden states.
        """
        return {}

    def prefetch(self, tokens: Tokens) -> None:
        """Start to read what `forward` will ask for with these tokens, while something else is
        computed. What is read is the same without it.
        """
        for name, index in self.addresses(tokens).items():
            self.table(name).prefetch(index)

    def wrong_routes(self, tokens: Tokens) -> Tensor | None:
        """[B, depth] a route for each row that is not the one its text takes at its end, for
        controls; None: this bank has no routes.
        """
        return None

    def prepare(self, preparation: Preparation) -> None:
        """Fit what comes from data; called once, before training. Nothing by default."""

    def open_rows(self, texts: Sequence[Tensor]) -> int:
        """Let every row train that one of the texts [T] reads, and return how many there are.

        Raises:
            StateError: none is read: training would change nothing.
        """
        wanted: dict[str, list[Tensor]] = {}
        for text in texts:
            for name, index in self.addresses(Tokens.of(text)).items():
                wanted.setdefault(name, []).append(index)
        for name, found in wanted.items():
            self.table(name).open(torch.cat(found))
        opened = sum(table.opened for _, table in self.each_table())
        if not opened:
            raise StateError(
                f"None of {len(texts)} texts reads a row of this bank, so nothing would train. "
                "Prepare the bank on texts like them first."
            )
        return opened

    def meaning(self) -> str:
        """A hash of all that gives a row its number, tree or hash constants: rows that were learned
        under another one say something else.
        """
        return tensors_sha256(self.constants().items())

    def constants(self) -> dict[str, Tensor]:
        """The buffers that decide which rows are read; statistics are none of them."""
        tables = {id(x) for _, table in self.each_table() for x in table.buffers()}
        return {name: x for name, x in self.named_buffers() if id(x) not in tables}

    def table(self, name: str) -> Table:
        """One table by its name."""
        table = self.tables[name]
        assert isinstance(table, Table)
        return table

    def each_table(self) -> Iterator[tuple[str, Table]]:
        """All tables with their names."""
        return ((name, self.table(name)) for name in self.tables)


def is_real(tokens: Tokens) -> Tensor:
    """[B, T] bool: which of the new tokens there are."""
    return tokens.ids[:, tokens.ids.shape[1] - tokens.new :] != PAD
