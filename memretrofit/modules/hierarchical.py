"""Blocks of FFN rows on the path from a tree's root to the leaf that a text belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memretrofit.errors import StateError
from memretrofit.modules.bank import PAD, BankRead, MemoryBank, Preparation, Read, Tokens, is_real
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
    """Places in `Blocks.rows`."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What the new tokens found."""

    rows: list[Tensor]
    """[layers, 3, R, E] of each distinct path: the blocks of its levels behind each other."""
    which: Tensor
    """[B, T] the path of each token; -1 where it reads none."""
    where: Tensor | None
    """[B, T] bool: tokens that read a path; None where all do."""
    parts: list[list[Part]]
    """Of each row, which cover its columns."""


@dataclass(kw_only=True)
class _Held:
    """Blocks that were joined before, and what they were joined from."""

    state: list[tuple[Any, ...]] = field(default_factory=list)
    blocks: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def same(self, other: _Held) -> bool:
        """Whether both were joined from the same rows; the objects themselves are compared."""
        mine, others = sum(self.state, ()), sum(other.state, ())
        return len(mine) == len(others) and all(
            x is y or (isinstance(x, int | torch.dtype | torch.device) and x == y)
            for x, y in zip(mine, others, strict=True)
        )


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
        nodes, pinned_from = self._nodes(tokens)
        real = is_real(tokens)
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
        parts = [_parts(row, begin) for row, begin in zip(which, pinned_from, strict=True)]
        where = which >= 0
        return Blocks(
            rows=self._gather([paths[n] for n in used]),
            which=which,
            where=None if where.all() else where,
            parts=parts,
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

    def _nodes(self, tokens: Tokens) -> tuple[Tensor, list[int]]:
        """Node numbers [B, T, levels] of the new tokens, -1 to abstain, and for each row the column
        from which on its path is fixed.
        """
        real, new = tokens.ids != PAD, tokens.new
        if tokens.routes is not None:
            nodes = nodes_of(self._checked(tokens.routes), self.branching)
            return nodes[:, None].expand(-1, new, -1).to(real.device), [0] * len(real)
        last = self.route_tokens - 1
        order = real.cumsum(-1) - 1
        first = real & (order <= last)
        prefixes = tokens.ids.new_full((len(real), last + 1), PAD)
        prefixes[first.nonzero()[:, 0], order[first]] = tokens.ids[first]
        order = order[:, order.shape[1] - new :]
        routed = self._routed(prefixes)
        place = order.clamp(0, last)[..., None].expand(-1, -1, routed.shape[-1])
        return routed.gather(1, place), (order < last).sum(-1).tolist()

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

    def _gather(self, paths: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """[layers, 3, R, E] of each path."""
        wanted = {path: self._rows_of(path) for path in paths}
        dtype, device = self._embedding().dtype, self.router.mean.device
        if torch.is_grad_enabled() and any(t.opened for _, t in self.each_table()):
            return [self._joined(rows, dtype, device) for rows in wanted.values()]
        # a conversation reads the same few paths at every token: those of the last forward are kept
        held = _Held(state=[*(_state(table) for _, table in self.each_table()), (dtype, device)])
        known = self._held.blocks if held.same(self._held) else {}
        for path, rows in wanted.items():
            ready = known.get(path)
            held.blocks[path] = self._joined(rows, dtype, device) if ready is None else ready
        self._held = held
        return list(held.blocks.values())

    def _joined(
        self, rows: list[tuple[str, int]], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        found = [
            self.table(name)(torch.tensor([row], device=device), dtype=dtype)[0]
            for name, row in rows
        ]
        return torch.cat(found, dim=2)

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


def _parts(which: Tensor, begin: int) -> list[Part]:
    """The columns before `begin`, where paths change, and those from there on."""
    ends = [begin, len(which)] if 0 < begin < len(which) else [len(which)]
    found, start = [], 0
    for end in ends:
        paths = which[start:end].unique().tolist()
        found.append(Part(end=end, paths=tuple(path for path in paths if path >= 0)))
        start = end
    return found


class HierarchicalRead(BankRead):
    """(f(x U1^T) * (x U2^T)) U3 for the rows U [R, E] of each token's path in this layer."""

    def __init__(self, number: int, activation: Callable[[Tensor], Tensor]) -> None:
        """`number`: which of the bank's layers this is. `activation`: the model's own f."""
        super().__init__()
        self.number, self._activation = number, activation

    def forward(self, hidden: Tensor, found: Blocks, past: Tensor | None) -> Read:
        """Rows of a batch are computed apart, and of each row a part at a time: what a token gets
        does not depend on what others read.
        """
        which = found.which.to(hidden.device)
        blocks = [rows[self.number].to(hidden) for rows in found.rows]
        added = [
            self._row(x, mine, parts, blocks)
            for x, mine, parts in zip(hidden, which, found.parts, strict=True)
        ]
        where = None if found.where is None else found.where.to(hidden.device)
        return Read(torch.stack(added), where)

    def _row(
        self, hidden: Tensor, which: Tensor, parts: list[Part], blocks: list[Tensor]
    ) -> Tensor:
        pieces, start = [], 0
        for part in parts:
            x, mine = hidden[start : part.end], which[start : part.end]
            piece = self._glu(x, blocks[part.paths[0]]) if part.paths else torch.zeros_like(x)
            for path in part.paths[1:]:
                one = self._glu(x, blocks[path])
                piece = torch.where((mine == path)[:, None], one, piece)
            pieces.append(piece)
            start = part.end
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _glu(self, x: Tensor, block: Tensor) -> Tensor:
        """`block` [3, R, E]."""
        gate, up = F.linear(x, block[:2].flatten(0, 1)).chunk(2, dim=-1)
        return (self._activation(gate) * up) @ block[2]
