"""Two-level attention over a store: a landmark per block is weighed first, then the tokens in it.

For one query (one head), with near tokens j, full blocks b that it fetched, and tokens i of b::

    o_b, lse_b = attention inside block b
    a          = softmax over { s_j } and { landmark_b }
    out        = sum_j a_j v_j + sum_b a_b o_b

A block that is not full has no landmark: its tokens are near ones. Since `merge` of parts weighs
each by its normaliser, this is ordinary attention in which landmark_b stands in the place of lse_b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from memretrofit.modules.memory import Block, State, widened
from memretrofit.modules.recall import RecallMemory
from memretrofit.modules.store import Store
from memretrofit.modules.stored import Asking
from memretrofit.ops.chunks import full_precision


def two_level(
    logits: Tensor, visible: Tensor, landmarks: Tensor, full: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over blocks, each with the weight that its landmark has: o and its normaliser.

    Args:
        logits: s of tokens, [..., R, C, U, S] for U blocks of S tokens.
        visible: what each query may see of them, bool [..., 1, C, U, S].
        landmarks: logit of each block, [..., R, C, U].
        full: whether the query's block has a landmark, bool [..., 1, C, U]; elsewhere the
            log-sum-exp of what is visible stands for the block, as in ordinary attention.
        values: [..., U, S, V].

    Returns:
        o [..., R, C, V] and lse [..., R, C] for `ops.attend.merge`; 0 and -inf where a query sees
        nothing.
    """
    seen = visible.any(-1)
    # A row of -inf has NaN gradients: rows that see nothing see all here, and are emptied below.
    logits = logits.masked_fill(~(visible | ~seen[..., None]), -torch.inf)
    inside = logits.logsumexp(-1)
    blocks = torch.where(full, landmarks, inside).masked_fill(~seen, -torch.inf)
    blind = ~seen.any(-1)
    blocks = blocks.masked_fill(blind[..., None], 0.0)
    lse = blocks.logsumexp(-1)
    weights = (logits + (blocks - inside - lse[..., None])[..., None]).exp()
    with full_precision(logits):
        o = weights.flatten(-2).flatten(-3, -2) @ values.to(weights.dtype).flatten(-3, -2)
    o = o.view(*lse.shape, -1).masked_fill(blind[..., None], 0.0)
    return o, lse.masked_fill(blind, -torch.inf)


class Landmark(nn.Module):
    """One key for the keys of a block: l = sum_i softmax_i(u . k_i / sqrt(K)) R (k_i + d).

    u and d, [K] per KV head, start at zero: l is then the mean key.
    """

    def __init__(self, num_key_value_heads: int, key_dim: int) -> None:
        super().__init__()
        self.pooling = nn.Parameter(torch.zeros(num_key_value_heads, key_dim))
        self.offset = nn.Parameter(torch.zeros(num_key_value_heads, key_dim))

    def forward(self, keys: Tensor, place: Callable[[Tensor], Tensor]) -> Tensor:
        """Keys before the rotary embedding [n, G, S, K] to [n, G, K]; `place` rotates."""
        keys = widened(keys)
        logits = torch.einsum("ngsk,gk->ngs", keys, widened(self.pooling))
        weights = (logits * keys.shape[-1] ** -0.5).softmax(-1)
        placed = place(keys + widened(self.offset)[:, None])
        return (weights[..., None] * placed).sum(-2)


class LandmarkMemory(RecallMemory):
    """Recall in which a learned landmark decides which blocks a query fetches, and how much each
    of them weighs.
    """

    def __init__(self, *, num_heads: int, **shape: Any) -> None:
        super().__init__(granularity="kv_head", **shape)
        self.landmark = Landmark(self.state_heads, self.key_dim)
        # uniform weights inside a block: its log-sum-exp is then mean logit + log S
        self.bias = nn.Parameter(torch.full((num_heads,), math.log(self.block_size)))

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Store what leaves, and attend over the window and the landmarks' blocks."""
        output, state = super().forward(block, state)
        if output is not None and torch.is_grad_enabled():
            # processes must agree on what has a gradient, also where no block is full yet
            none = block.leaving_key.new_empty(0, *block.leaving_key.shape[1:])
            silent = self.landmark(none, lambda keys: keys).sum() + 0 * self.bias.sum()
            output = output + silent.to(output.dtype)
        return output, state

    def summary(self, keys: Tensor, places: Tensor, block: Block) -> Tensor:
        """The landmarks of full blocks: [n, B, G, K]."""
        flat = places.flatten(0, 1)
        landmarks = self.landmark(keys.flatten(0, 1), lambda x: self.searched(x, flat, block))
        return landmarks.view_as(keys[..., 0, :])

    def _attend(
        self, asking: Asking, wanted: Tensor, store: Store, block: Block
    ) -> tuple[Tensor, Tensor]:
        count = store.summaries.shape[0]
        if not count:
            return super()._attend(asking, wanted, store, block)
        far = self.fetched(wanted, asking, store, block)
        rows, groups = far.keys.shape[:2]
        row = torch.arange(rows, device=wanted.device)[:, None, None]
        head = torch.arange(groups, device=wanted.device)[:, None]
        # a block that is not full yet may have no summary, and reads none
        landmarks = store.summaries[far.blocks.clamp(max=count - 1), row, head]  # [B, G, U, K]
        heads = asking.query.shape[1]
        attended = far.attended(heads)
        logits = self.logits(asking, far.keys, attended, block)
        of_blocks = self.logits(asking, landmarks[:, :, :, None], attended, block)[..., 0]
        of_blocks = of_blocks + widened(self.bias)[:, None, None]
        o, lse = two_level(
            logits.unflatten(1, (groups, -1)),
            attended.unflatten(1, (groups, -1)),
            of_blocks.unflatten(1, (groups, -1)),
            far.left.all(-1)[:, :, None],
            far.values,
        )
        return o.flatten(1, 2), lse.flatten(1, 2)
