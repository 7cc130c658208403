"""Attention over the window and over modes, into which what leaves is consolidated.

A mode is the mean pair of tokens whose keys look alike (`ops.consolidate`). It has no place of its
own in the text: means are taken over keys before the rotary embedding (the mean of two rotations is
none), and every mode stands at the border of the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memretrofit.modules.memory import AttentionMemory, Block, State, widened
from memretrofit.ops.attend import merge
from memretrofit.ops.consolidate import Modes, Written, consolidate, versions_seen


class ModesMemory(AttentionMemory):
    """out_t = merge(attend(q_t, window), attend(q_t, modes after the token that leaves at t))."""

    key_space = "pre_rope"
    shares_softmax = True
    sink_positions = "slot"  # nearer than they are, as modes do: no distance is untrained

    def __init__(
        self,
        *,
        num_modes: int,
        threshold: float,
        num_key_value_heads: int,
        key_dim: int,
        value_dim: int,
        sliding_window: int,
        num_sink_tokens: int,
    ) -> None:
        super().__init__(sliding_window=sliding_window, num_sink_tokens=num_sink_tokens)
        self.num_modes, self.threshold = num_modes, threshold
        self.state_heads, self.key_dim, self.value_dim = num_key_value_heads, key_dim, value_dim

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """Empty modes: mean pairs [B, G, M, K + V], counts and ages [B, G, M], zero."""
        shape = (batch_size, self.state_heads, self.num_modes)
        pairs = widened(like.new_zeros(*shape, self.key_dim + self.value_dim))
        return Modes(pairs, pairs.new_zeros(shape), pairs.new_zeros(shape))

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's state: the same for any text."""
        return 4 * self.state_heads * self.num_modes * (self.key_dim + self.value_dim + 2)

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Write what leaves, and attend over the window and the modes as each query finds them."""
        before = Modes(*state)  # type: ignore[arg-type]
        written, after = consolidate(
            block.leaving_key, block.leaving_value, block.writes, before, self.threshold
        )
        if block.query is None:
            return None, tuple(after)
        output, _ = merge(*block.attend(), *self._far(block, before, written))
        return output.transpose(1, 2).to(block.leaving_value.dtype), tuple(after)

    def _far(self, block: Block, before: Modes, written: Written) -> tuple[Tensor, Tensor]:
        """Attention over modes alone: o [B, H, C, V] and lse [B, H, C].

        A write replaces one mode, so a block of queries meets the modes it found and the versions
        that its own writes made; each query sees those that stand as it arrives.
        """
        assert block.query is not None
        versions = torch.cat([before.pairs, written.pairs], dim=2)
        key, value = versions.split((self.key_dim, self.value_dim), dim=-1)
        border = (block.query_slots - block.leaving_slots)[None]
        query = block.rotate(block.query, border)
        key = block.rotate(key, border.new_zeros(1, key.shape[2]))
        visible = versions_seen(before, written)
        visible = visible.repeat_interleave(query.shape[1] // self.state_heads, dim=1)
        return block.attend_to(query, key, value, visible)
