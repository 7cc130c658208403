"""Blocks of FFN rows on the path from a tree's root to the leaf that a text belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
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
    first_tokens,
    is_real,
)
from memretrofit.modules.router import Router, Separation
from memretrofit.modules.table import FreshRows, Table
from memretrofit.ops.tree import children_of, nodes_of

GENERIC = "generic"
MATRICES = 3
"""Gate, up and output; the last one is zero at the start."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some new tokens of one row, all of which read one of a few paths."""

    end: int
    """The column behind the last one; it begins where the part before ends."""
    paths: tuple[int, ...]
    """Numbers of paths in `LayerBlocks`."""


class LayerBlocks(NamedTuple):
    """Of one layer, the blocks of U distinct paths: those of a path's levels behind each other, and
    zeros behind those of a path that is shorter than the longest one that there may be.
    """

    inner: Tensor
    """[U, E, 2 R] gate and up."""
    output: Tensor
    """[U, R, E]"""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What the new tokens found."""

    layers: tuple[LayerBlocks, ...]
    where: Tensor | None
    """[B, T] bool: tokens that read a path; None where all do."""
    each: Tensor | None = None
    """[B] the path of each row, where no row reads two; None: row b reads path b of B, or all rows
    the only one.
    """
    which: Tensor | None = None
    """[B, T] the path of each token, -1 where it reads none, where a row may read several."""
    parts: tuple[tuple[Part, ...], ...] = ()
    """Of each row, which cover its columns; none where no row reads two paths."""


Path = tuple[int, ...]
"""A node of each level, -1 behind the last one."""


@dataclass(kw_only=True)
class _Held:
    """Blocks that were joined before, and what they were joined from."""

    state: tuple[Any, ...] = ()
    layers: tuple[LayerBlocks, ...] = ()

    def of(self, state: tuple[Any, ...]) -> tuple[LayerBlocks, ...]:
        """The blocks, if they were joined from the same rows: the very objects are compared."""
        same = len(self.state) == len(state) and all(
            x is y or (not isinstance(x, Tensor) and x == y)
            for x, y in zip(self.state, state, strict=True)
        )
        return self.layers if same else ()


class HierarchicalBank(MemoryBank):
    """One table per level, of a block for each of its nodes, and a router that names the path.

    A block is [layers, 3, r, E] for all layers, so that a node is read at once. Levels without
    rows have no table.
    """

    has_routes = True

    def __init__(
        self,
        *,
        embedding: Callable[[], Tensor],
        layers: int,
        branching: tuple[int, ...],
        block_sizes: tuple[int, ...],
        generic_size: int,
        route_tokens: int,
        seed: int,
        hot_bytes: int,
    ) -> None:
        width = embedding().shape[1]

        def table(rows: int, size: int, number: int) -> Table:
            shape = (layers, MATRICES, size, width)
            source = FreshRows(rows, shape, torch.float32, seed + number, width**-0.5, (1, 2))
            return Table(source, hot_bytes=hot_bytes)

        tables, nodes = {}, 1
        for number, (count, size) in enumerate(zip(branching, block_sizes, strict=True), start=1):
            nodes *= count
            if size:
                tables[f"level_{number}"] = table(nodes, size, number)
        if generic_size:
            tables[GENERIC] = table(1, generic_size, 0)
        super().__init__(tables)
        self.branching, self.route_tokens = branching, route_tokens
        self.reach = Reach("first", route_tokens)
        self.longest = max(sum(block_sizes), generic_size)
        """R of the longest path."""
        self.router = Router(
            embedding=embedding, branching=branching, route_tokens=route_tokens, seed=seed
        )
        self._embedding = embedding
        self._held = _Held()
        self._last: tuple[Tensor, int, Tensor, Tensor] | None = None
        self.separation: Separation | None = None
        """Of the last `prepare`."""

    @property
    def fetched(self) -> int:
        """Numbers that one token's path holds."""
        return sum(_numel(table) for name, table in self.each_table() if name != GENERIC)

    @property
    def size(self) -> int:
        """Numbers in all rows."""
        return sum(table.rows * _numel(table) for _, table in self.each_table())

    def prepare(self, preparation: Preparation) -> None:
        """Fit the router; `separation` says how well it tells the examples from ordinary text.

        Raises:
            StateError: rows are open: they would be other texts' rows afterwards. Or there are no
                examples, or no ordinary text.
        """
        opened = sum(table.opened for _, table in self.each_table())
        if opened:
            raise StateError(
                f"{opened} rows of this bank are open, and another tree gives them to other texts. "
                "Prepare the bank before rows are opened."
            )
        self.separation = self.router.fit(preparation)

    def forward(self, tokens: Tokens) -> Blocks | None:
        """The blocks of the new tokens; None where all of them abstain."""
        nodes, order = self._nodes(tokens)
        real = is_real(tokens)
        changing = self._changing(order) if tokens.routes is None and tokens.new > 1 else []
        if any(changing):
            return self._of_tokens(nodes, real, changing)
        return self._of_rows(nodes[:, -1], real)

    def _of_rows(self, nodes: Tensor, real: Tensor) -> Blocks | None:
        """Of rows, each of which reads the path [B, levels] at all its new tokens."""
        paths = [tuple(path) for path in nodes.tolist()]
        reads = [bool(self._rows_of(path)) for path in paths]
        used = list(dict.fromkeys(path for path, one in zip(paths, reads, strict=True) if one))
        if not used:
            return None
        where = each = None
        if not (all(reads) and real.all()):
            where = real & torch.tensor(reads, device=real.device)[:, None]
        if len(used) > 1 and used != paths:
            place = [used.index(path) if path in used else 0 for path in paths]
            each = torch.tensor(place, device=real.device)
        return Blocks(layers=self._gather(used), where=where, each=each)

    def _of_tokens(self, nodes: Tensor, real: Tensor, changing: list[int]) -> Blocks | None:
        """Of tokens [B, T, levels], the path of which is fixed from the columns `changing` on."""
        distinct, which = nodes.flatten(0, 1).unique(dim=0, return_inverse=True)
        which = which.view(real.shape)
        paths = [tuple(path) for path in distinct.tolist()]
        reads = torch.tensor([bool(self._rows_of(path)) for path in paths], device=which.device)
        used = sorted(which[reads[which] & real].unique().tolist())
        if not used:
            return None
        place = torch.full((len(paths),), -1, device=which.device)
        place[used] = torch.arange(len(used), device=which.device)
        which = place[which].masked_fill(~real, -1)
        where = which >= 0
        return Blocks(
            layers=self._gather([paths[n] for n in used]),
            where=None if where.all() else where,
            which=which,
            parts=tuple(_parts(row, begin) for row, begin in zip(which, changing, strict=True)),
        )

    def addresses(self, tokens: Tokens) -> dict[str, Tensor]:
        """The nodes of the paths of the new tokens."""
        nodes = self._nodes(tokens)[0][is_real(tokens)].unique(dim=0)
        found: dict[str, set[int]] = {}
        for path in nodes.tolist():
            for name, row in self._rows_of(tuple(path)):
                found.setdefault(name, set()).add(row)
        return {name: torch.tensor(sorted(rows)) for name, rows in found.items()}

    def wrong_routes(self, tokens: Tokens) -> Tensor | None:
        """For each row a leaf half a tree away from its own."""
        leaves = self.router.levels[-1].numbers
        if len(leaves) < 2:
            return None
        own = self._nodes(tokens)[0][:, -1, -1]
        place = torch.searchsorted(leaves, own.clamp(min=0)).clamp(max=len(leaves) - 1)
        leaf = leaves[(place + len(leaves) // 2) % len(leaves)]
        steps = [leaf]
        for count in reversed(self.branching[1:]):
            steps.insert(0, steps[0] // count)
        return children_of(torch.stack(steps, dim=-1), self.branching)

    def _rows_of(self, path: tuple[int, ...]) -> list[tuple[str, int]]:
        """The table and the row of each block on a path; up to the first -1, or the generic one."""
        if path[0] < 0:
            return [(GENERIC, 0)] if GENERIC in self.tables else []
        levels = ((f"level_{n}", node) for n, node in enumerate(path, start=1) if node >= 0)
        return [(name, node) for name, node in levels if name in self.tables]

    def _nodes(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Node numbers [B, T, levels] of the new tokens, -1 to abstain, and how many tokens of
        their rows came before each of them [B, T]; of many, no fewer than `route_tokens`.
        """
        real, new, last = tokens.ids != PAD, tokens.new, self.route_tokens - 1
        order = real.cumsum(-1) - 1
        if tokens.routes is not None:
            nodes = nodes_of(self._checked(tokens.routes), self.branching)
            return nodes[:, None].expand(-1, new, -1).to(real.device), order[:, -new:]
        routed, order = self._routed(first_tokens(tokens.ids, last + 1)), order[:, -new:]
        place = order.clamp(0, last)[..., None].expand(-1, -1, routed.shape[-1])
        return routed.gather(1, place), order

    def _changing(self, order: Tensor) -> list[int]:
        """For each row the column from which on its path is fixed."""
        return (order < self.route_tokens - 1).sum(-1).tolist()

    def _routed(self, prefixes: Tensor) -> Tensor:
        """A conversation asks for the same beginnings at every token."""
        router, last = self.router, self._last
        fitted = (router.weights, _version(router.threshold))
        if last is None or last[0] is not fitted[0] or last[1] != fitted[1]:
            last = None
        if last is None or not torch.equal(last[2], prefixes):
            last = self._last = (*fitted, prefixes, router(prefixes))
        return last[3]

    def _checked(self, routes: Tensor) -> Tensor:
        most = torch.tensor(self.branching, device=routes.device)
        if (
            routes.is_floating_point()
            or routes.shape[-1] != len(most)
            or bool(((routes < -1) | (routes >= most)).any())
        ):
            raise StateError(
                f"A route {routes.tolist()} does not fit a tree with branching {self.branching}: "
                f"give {len(most)} numbers of children, each below its branching; -1 abstains."
            )
        return routes

    def _gather(self, paths: Sequence[Path]) -> tuple[LayerBlocks, ...]:
        """The blocks of distinct paths, for each layer."""
        dtype, device = self._embedding().dtype, self.router.mean.device
        if torch.is_grad_enabled() and any(t.opened for _, t in self.each_table()):
            return self._joined(paths, dtype, device)
        # a conversation reads the same few paths at every token: those of the last forward are kept
        tables = (_state(table) for _, table in self.each_table())
        state = (*chain.from_iterable(tables), dtype, device, tuple(paths))
        layers = self._held.of(state)
        if not layers:
            layers = self._joined(paths, dtype, device)
            self._held = _Held(state=state, layers=layers)
        return layers

    def _joined(
        self, paths: Sequence[Path], dtype: torch.dtype, device: torch.device
    ) -> tuple[LayerBlocks, ...]:
        blocks = [self._rows_of(path) for path in paths]
        wanted: dict[str, set[int]] = {}
        for name, row in chain.from_iterable(blocks):
            wanted.setdefault(name, set()).add(row)
        found: dict[tuple[str, int], Tensor] = {}
        for name, rows in wanted.items():
            index = torch.tensor(sorted(rows), device=device)
            values = self.table(name)(index, dtype=dtype)
            found |= {(name, row): x for row, x in zip(sorted(rows), values, strict=True)}
        each = [torch.cat([found[block] for block in path], dim=2) for path in blocks]
        joined = torch.stack([F.pad(x, (0, 0, 0, self.longest - x.shape[2])) for x in each])
        return tuple(
            LayerBlocks(block[:, :2].flatten(1, 2).transpose(1, 2), block[:, 2])
            for block in joined.unbind(1)
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be read again, for a copy."""
        return {**self.__dict__, "_held": _Held(), "_last": None}


def _numel(table: Table) -> int:
    return int(torch.Size(table.shape).numel())


def _state(table: Table) -> tuple[Any, ...]:
    """Another one whenever a row may be another one."""
    delta = table.delta
    return (table.source, delta, None if delta is None else _version(delta))


def _version(x: Tensor) -> int:
    """How often `x` was changed; tensors made in inference mode do not count it."""
    return 0 if x.is_inference() else x._version


def _parts(which: Tensor, begin: int) -> tuple[Part, ...]:
    """The columns before `begin`, where paths change, and those from there on."""
    ends = [begin, len(which)] if 0 < begin < len(which) else [len(which)]
    found, start = [], 0
    for end in ends:
        paths = which[start:end].unique().tolist()
        found.append(Part(end=end, paths=tuple(path for path in paths if path >= 0)))
        start = end
    return tuple(found)


class HierarchicalRead(BankRead):
    """(f(x U1^T) * (x U2^T)) U3 for the rows U [R, E] of each token's path in this layer.

    Where no row reads two paths, as in decoding, that is two batched products for all rows at once.
    Elsewhere rows are computed apart, and of each row a part at a time. Either way sizes depend on
    those of the batch alone: what a token gets does not depend on what others read.
    """

    def __init__(self, number: int, activation: Callable[[Tensor], Tensor]) -> None:
        """`number`: which of the bank's layers this is. `activation`: the model's own f."""
        super().__init__()
        self.number, self._activation = number, activation

    def forward(self, hidden: Tensor, found: Blocks, past: Tensor | None) -> Read:
        """Added to the FFN's output."""
        blocks = LayerBlocks(*(x.to(hidden) for x in found.layers[self.number]))
        where = None if found.where is None else found.where.to(hidden.device)
        if found.which is None:
            if found.each is not None:
                blocks = LayerBlocks(*(x[found.each.to(x.device)] for x in blocks))
            return Read(self._glu(hidden, blocks), where)
        which = found.which.to(hidden.device)
        added = [
            self._row(x, mine, parts, blocks)
            for x, mine, parts in zip(hidden, which, found.parts, strict=True)
        ]
        return Read(torch.stack(added), where)

    def _row(
        self, hidden: Tensor, which: Tensor, parts: tuple[Part, ...], blocks: LayerBlocks
    ) -> Tensor:
        pieces, start = [], 0
        for part in parts:
            x, mine = hidden[start : part.end], which[start : part.end]
            piece = torch.zeros_like(x)
            for number, path in enumerate(part.paths):
                own = LayerBlocks(*(block[path : path + 1] for block in blocks))
                one = self._glu(x[None], own)[0]
                piece = torch.where((mine == path)[:, None], one, piece) if number else one
            pieces.append(piece)
            start = part.end
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _glu(self, x: Tensor, blocks: LayerBlocks) -> Tensor:
        """Of x [B, T, E], row b with path b of B, or all with the only one."""
        if len(x) > len(blocks.inner):
            blocks = LayerBlocks(*(block.expand(len(x), -1, -1) for block in blocks))
        gate, up = torch.bmm(x, blocks.inner).chunk(2, dim=-1)
        return torch.bmm(self._activation(gate) * up, blocks.output)
