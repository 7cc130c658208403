"""Attention over sinks and window in query blocks, with what leaves handed to the memory.

For a query at slot t: sinks and the slots in (t - W, t] are attended exactly; every other real
token before t is in the state, which token t - W enters as t arrives. So each token before t is
in exactly one of the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from memretrofit.errors import StateError, UnsupportedModelError
from memretrofit.modules.memory import Block
from memretrofit.ops.attend import attend, scores
from memretrofit.ops.window import window_mask
from memretrofit.patching.cache import gather_columns
from memretrofit.patching.generating import once
from memretrofit.patching.masks import as_base_mask, token_ranks
from memretrofit.patching.rotary import slot_steps, unrotate

if TYPE_CHECKING:
    from memretrofit.patching.attention import AttentionCall

MIN_BLOCK, MAX_BLOCK = 128, 512
"""Queries per block: a quarter of the window, within these bounds. A block of C queries scores
W + C columns, of which each query uses W."""


def windowed_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Sinks + window + memory for the new tokens of `call`; full attention while nothing has left
    the window.

    Raises:
        UnsupportedModelError: attention weights are asked for, which do not exist for a folded
        token.
    """
    memory, layer = call.seam.memory, call.layer
    columns = _Columns(call)
    trained = torch.is_grad_enabled() and any(p.requires_grad for p in memory.parameters())
    nothing_to_read = not trained and not (layer is not None and layer.carried)
    if columns.total <= columns.window + columns.sinks and nothing_to_read:
        # training takes the long way even here: every promised parameter takes part in every step
        if layer is not None:
            columns.keep_features()
            columns.keep_unrotated()
            columns.keep_unmet()
        return call.full()
    if call.kwargs.get("output_attentions"):
        raise UnsupportedModelError(
            "output_attentions=True with a memory: tokens that left the window have no attention "
            "weights. "
            "Use memretrofit.memory_disabled(model) to see the base model's weights."
        )
    columns.keep_features()
    columns.keep_unrotated()
    columns.keep_unmet()
    state = (
        layer.state
        if layer is not None and layer.state
        else memory.initial_state(call.query.shape[0], call.query)
    )
    start = columns.total - columns.new
    kept, settled = state, 0
    if layer is not None:
        settled = max(0, (layer.confirmed if layer.record_past else start) - columns.window)
        folded = columns.folded
        if settled > layer.folded:  # tokens that a crop could have taken back, and did not
            for block in columns.past(folded, settled):
                _, state = memory(block, state)
            folded = settled
        kept = state
        for block in columns.past(folded, start - columns.window):
            _, state = memory(block, state)
    outputs, silenced = [], call.seam.controls.silenced
    for low, high in columns.blocks():
        unwritten = start + high <= columns.window + columns.sinks
        if silenced or (unwritten and nothing_to_read and not memory.observes_queries):
            outputs.append(columns.local(low, high))
            continue
        leaving = start + low - columns.window
        output, state = memory(columns.block(low, high, leaving, leaving + high - low), state)
        outputs.append(output)
    if layer is not None:
        if layer.record_past:
            layer.commit(kept, max(settled, layer.folded), columns.ranks)
        else:
            # what is not folded can still be cropped: no state may have met it
            state = state if columns.total > columns.window else kept
            layer.commit(state, max(0, columns.total - columns.window), columns.ranks)
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)), None


def near_attention(call: AttentionCall) -> Tensor:
    """Base attention of `call` over sinks and window alone, whatever the memory holds."""
    columns = _Columns(call)
    outputs = [columns.local(low, high) for low, high in columns.blocks()]
    return torch.cat(outputs, dim=1)


def state_inputs(call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Queries and keys of `call` as the state would meet them, in the space of `state_space`."""
    if call.seam.memory.state_space == "post_rope":
        return call.query, call.key
    columns = _Columns(call)
    columns.keep_unrotated()
    return columns.read_query, columns.leaving_key


@dataclass(eq=False)
class _Columns:
    """The kept and new tokens of one call, addressed by slot."""

    call: AttentionCall

    def __post_init__(self) -> None:
        call, memory = self.call, self.call.seam.memory
        self.layer = call.layer
        self.new = call.query.shape[2]
        self.total = self.new if self.layer is None else self.layer.seen
        self.first = 0 if self.layer is None else self.layer.first
        self.pinned = 0 if self.layer is None else self.layer.pinned
        self.window, self.sinks = memory.sliding_window, memory.num_sink_tokens
        if call.seam.controls.window is not None:
            self.window, self.sinks = call.seam.controls.window
            window = (self.window, self.sinks)
            if self.layer is not None and window != self.layer.window:
                raise StateError(
                    "window_override changes forwards without a cache; this one has a cache, "
                    "which is as large as the patch made it. Pass use_cache=False."
                )
        if call.seam.controls.shuffled and call.query.shape[0] < 2:
            raise StateError(
                "state_shuffled swaps the states of whole rows; found one row. Pass at least two."
            )
        self.features: Tensor | None = None
        self.leaving_key = call.key
        self.query = self.read_query = call.query

    @property
    def places(self) -> Tensor | None:
        """[B, columns, 1] place of each token in its event, where the text is read in pieces."""
        return None if self.layer is None else self.layer.streams["place"].view

    @once
    def ranks(self) -> Tensor | None:
        """[B, total] index of each token among its row's real tokens; None without padding."""
        return token_ranks(self.call.mask)

    @once
    def slots(self) -> Tensor:
        """[columns] slot of each kept column; pinned ones count as the first slots."""
        slots = torch.arange(self.first - self.pinned, self.total, device=self.call.query.device)
        slots[: self.pinned] = torch.arange(self.pinned, device=slots.device)
        return slots

    @once
    def column_ranks(self) -> Tensor | None:
        if self.ranks is None:
            return None
        return self.ranks if self.layer is None else self.layer.column_ranks(self.ranks)

    def blocks(self) -> list[tuple[int, int]]:
        """The new tokens in blocks of queries, first and last + 1 of each."""
        size = min(max(self.window // 4, MIN_BLOCK), MAX_BLOCK)
        return [(low, min(low + size, self.new)) for low in range(0, self.new, size)]

    def keep_features(self) -> None:
        """Compute what must be known of a token when it leaves, while its hidden state is at
        hand.
        """
        if self.call.seam.memory.write_features is not None:
            new = self.call.seam.memory.write_features(self.call.hidden)
            self.features = (
                new if self.layer is None else self.layer.streams["features"].append(new)
            )

    def keep_unrotated(self) -> None:
        """The same for keys before their rotation."""
        call = self.call
        if call.seam.memory.key_space == "pre_rope":
            self.read_query = unrotate(call.module, call.query, call.position_embeddings)
            new = unrotate(call.module, call.key[:, :, -self.new :], call.position_embeddings)
            self.leaving_key = (
                new if self.layer is None else self.layer.streams["unrotated"].append(new)
            )

    def keep_unmet(self) -> None:
        """The same for queries that the state has not met, in front of the new ones."""
        if self.call.seam.memory.observes_queries and self.layer is not None:
            if self.layer.unmet is not None:
                self.query = torch.cat([self.layer.unmet, self.call.query], dim=2)
            self.layer.unmet = self.read_query = self.query

    @property
    def folded(self) -> int:
        """The first slot that has not left; below 0 until a state that observes queries has any."""
        folded = 0 if self.layer is None else self.layer.folded
        return -self.window if self.call.seam.memory.observes_queries and not folded else folded

    def past(self, begin: int, end: int) -> Iterator[Block]:
        """Blocks in which the slots `begin` to `end` - 1 leave, for queries of earlier calls."""
        if not self.call.seam.memory.observes_queries:
            if end > begin:
                yield self.block(0, 0, begin, end)
            return
        ahead = self.window - (self.total - self.new)  # from a leaving slot to its query
        for low in range(begin, end, MAX_BLOCK):
            high = min(low + MAX_BLOCK, end)
            yield self.block(low + ahead, high + ahead, low, high)

    def _queries(self, of: Tensor, low: int, high: int) -> Tensor:
        """Of the queries `of`, new ones last: numbers `low` to `high` - 1, the first new one 0."""
        earlier = of.shape[2] - self.new
        return of[:, :, earlier + low : earlier + high]

    def block(self, low: int, high: int, leaving_from: int, leaving_to: int) -> Block:
        """Queries `low` to `high` (an empty range only folds), as the slots in
        `leaving_from:leaving_to` leave.
        """
        call, controls = self.call, self.call.seam.controls
        empty = max(
            0, min(-leaving_from, leaving_to - leaving_from)
        )  # before the first token nothing leaves
        begin, end = (
            self.pinned + max(x, self.first) - self.first for x in (leaving_from, leaving_to)
        )
        writes = torch.arange(leaving_from, leaving_to, device=call.query.device)[None] >= (
            self.sinks if controls.writes else self.total
        )
        if self.ranks is not None:
            rank = F.pad(
                self.ranks[:, max(leaving_from, 0) : max(leaving_to, 0)], (empty, 0), value=-1
            )
            writes = writes & (rank >= self.sinks)

        def cut(x: Tensor) -> Tensor:
            x = x[..., begin:end, :]
            x = F.pad(x, (0, 0, empty, 0)) if empty else x
            return x.roll(-1, dims=0) if controls.shuffled else x

        if controls.shuffled:
            writes = writes.roll(-1, dims=0)
        reads = high > low
        return Block(
            query=self._queries(self.read_query, low, high) if reads else None,
            hidden=call.hidden[:, low:high] if reads and low >= 0 else None,
            local=lambda: self.local(low, high),
            attend=lambda: self._attend(low, high),
            attend_to=self._attend_to,
            scores=self._scores,
            leaving_key=cut(self.leaving_key),
            rotated=lambda: (
                self._queries(self.query, low, high) if reads else None,
                cut(call.key),
            ),
            leaving_value=cut(call.value),
            leaving_features=None if self.features is None else cut(self.features),
            writes=writes,
            query_slots=torch.arange(
                self.total - self.new + low, self.total - self.new + high, device=writes.device
            ),
            leaving_slots=torch.arange(leaving_from, leaving_to, device=writes.device),
            rotate=self._rotate,
            leaving_places=None if self.places is None else cut(self.places)[..., 0],
        )

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        rotary = self.call.seam.rotary
        assert rotary is not None, "surgery gives pre_rope memories a rotary module"
        return rotary.rotate(self.call.module, x, positions)

    def _near(self, low: int, high: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Keys, values, slots and ranks of the sinks and of all that is in some window of queries
        `low` to `high`.
        """
        call = self.call
        begin = self.total - self.new + low
        end = self.total - self.new + high
        oldest = max(self.first, begin - self.window + 1)
        cut = slice(self.pinned + oldest - self.first, self.pinned + end - self.first)
        key, value, slots, ranks = (
            call.key[:, :, cut],
            call.value[:, :, cut],
            self.slots[cut],
            self.column_ranks,
        )
        head = self.pinned or self.sinks
        if ranks is not None:
            every, ranks = ranks, ranks[:, cut]
            if self.sinks:
                wanted = torch.arange(self.sinks, device=every.device)
                # the columns of each row's own sinks; any where a row has too few tokens
                sinks = (every[:, None, :] == wanted[None, :, None]).int().argmax(-1)
                held = every.max(-1, keepdim=True).values >= wanted
                outside = held & ((sinks < self.pinned) | (self.slots[sinks] < oldest))
                key = torch.cat([gather_columns(call.key, sinks), key], dim=2)
                value = torch.cat([gather_columns(call.value, sinks), value], dim=2)
                sink_ranks = torch.where(outside, torch.arange(self.sinks, device=sinks.device), -1)
                ranks = torch.cat([sink_ranks, ranks], dim=1)
                slots = torch.cat([slots.new_zeros(self.sinks), slots])
        elif cut.start <= head:
            key, value, slots = (
                call.key[:, :, : cut.stop],
                call.value[:, :, : cut.stop],
                self.slots[: cut.stop],
            )
        elif head:
            key = torch.cat([call.key[:, :, :head], key], dim=2)
            value = torch.cat([call.value[:, :, :head], value], dim=2)
            slots = torch.cat([self.slots[:head], slots])
        return key, value, slots, ranks

    def _visible(self, low: int, high: int, slots: Tensor, ranks: Tensor | None) -> Tensor:
        begin = self.total - self.new
        queries = torch.arange(begin + low, begin + high, device=slots.device)
        return window_mask(queries, slots, self.window, self.sinks, ranks)

    def local(self, low: int, high: int) -> Tensor:
        """Base attention of queries `low` to `high` over sinks and window: [B, C, H, V]."""
        from memretrofit.patching.attention import base_function

        call = self.call
        function, implementation = base_function(call.module)
        query = call.query[:, :, low:high]
        by_slot = call.seam.memory.sink_positions == "slot"
        if self.new == 1 and self.ranks is None and not by_slot:
            key, value, visible = call.key, call.value, self._all_but_left()
        else:
            key, value, slots, ranks = self._near(low, high)
            if by_slot:
                query, key = self._by_slot(query, key, low, high, slots if ranks is None else ranks)
            visible = self._visible(low, high, slots, ranks)
        mask = None if visible is None else as_base_mask(visible, query.dtype, implementation)
        return function(call.module, query, key, value, attention_mask=mask, **call.kwargs)[0]

    def _all_but_left(self) -> Tensor | None:
        """[1, 1, 1, columns] what one last query sees: every column but those that left the window.

        A mask, because a copy of the window without the one leaving column costs a decoding step
        more than its attention does.
        """
        columns, head = self.call.key.shape[2], self.pinned or self.sinks
        left = min(columns, self.window)
        if columns - left <= head:
            return None
        visible = torch.ones(1, 1, 1, columns, dtype=torch.bool, device=self.call.key.device)
        visible.narrow(-1, head, columns - left - head).fill_(False)
        return visible

    def _attend(self, low: int, high: int) -> tuple[Tensor, Tensor]:
        key, value, slots, ranks = self._near(low, high)
        visible = self._visible(low, high, slots, ranks)
        query = self._queries(self.query, low, high)
        if self.call.seam.memory.sink_positions == "slot":
            query, key = self._by_slot(query, key, low, high, slots if ranks is None else ranks)
        return self._attend_to(query, key, value, visible)

    def _attend_to(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor
    ) -> tuple[Tensor, Tensor]:
        return attend(query, key, value, visible, **self._softmax)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        return scores(query, key, **self._softmax)

    @property
    def _softmax(self) -> dict[str, Any]:
        return {
            "scale": self.call.kwargs.get("scaling"),
            "softcap": self.call.kwargs.get("softcap"),
        }

    def _by_slot(
        self, query: Tensor, key: Tensor, low: int, high: int, ranks: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sinks at their distance inside the cache: twice the head dims, one half for sinks and
        one for the window.

        The score of a window key is q . k as always, that of a sink is R(-steps) q . k, in one
        softmax.
        """
        begin = self.total - self.new
        positions = torch.arange(begin + low, begin + high, device=query.device)[None]
        if self.ranks is not None:
            positions = self.ranks[:, begin + low : begin + high]
        steps = slot_steps(positions, self.window + self.sinks)
        rotary = self.call.seam.rotary
        assert rotary is not None, "surgery gives slot positions a rotary module"
        turned = rotary.turn_back(self.call.module, query, steps)
        is_sink = ((ranks >= 0) & (ranks < self.sinks)).reshape(-1, 1, key.shape[2], 1)
        zero = key.new_zeros(())
        key = torch.cat([torch.where(is_sink, zero, key), torch.where(is_sink, key, zero)], dim=-1)
        return torch.cat([query, turned], dim=-1), key
