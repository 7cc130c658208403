"""Linear attention with learned feature maps that shares one normaliser with the exact window."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from memretrofit.modules.memory import (
    Accesses,
    AttentionMemory,
    Block,
    State,
    energy,
    widened,
)
from memretrofit.ops import chunk_rule

LARGEST = 15.0
"""Largest exponent: e^15 leaves float32 sums their digits."""


class FeatureMap(nn.Module):
    """phi(x) = exp(s (x - m)) [softmax((x - m) U), softmax(-(x - m) U)] per head.

    U [K, K] starts at the identity, the mean m and the scale s at zero; `calibrate` sets both.
    """

    def __init__(self, num_heads: int, key_dim: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.eye(key_dim).repeat(num_heads, 1, 1))
        self.mean = nn.Parameter(torch.zeros(num_heads, key_dim))
        self.scale = nn.Parameter(torch.zeros(num_heads, key_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, heads, T, K] to [B, heads, T, 2K], positive, float32."""
        x = widened(x) - widened(self.mean)[:, None]
        logits = x @ widened(self.map)
        features = torch.cat([logits.softmax(-1), (-logits).softmax(-1)], dim=-1)
        size = (x * widened(self.scale)[:, None]).sum(-1, keepdim=True)
        return features * size.clamp(-LARGEST, LARGEST).exp()


class StateWeight(nn.Module):
    """w = 10 c exp(b - gamma lse) per head: a unit of state beside the whole window.

    c starts at zero, so that the memory is silent, and counts in tens, so that a learning rate
    that suits the maps suits it too. gamma starts at 1: both sides on the scale of the scores.
    """

    def __init__(self, num_heads: int, key_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads))
        self.bias = nn.Parameter(torch.full((num_heads,), math.log(key_dim / 2)))
        self.lse_slope = nn.Parameter(torch.ones(num_heads))

    def forward(self, lse: Tensor) -> Tensor:
        """Log-sum-exp of the window's scores [B, H, C] to [B, H, C]."""
        weight = 10 * widened(self.weight)
        weight = weight + (weight.clamp(min=0) - weight).detach()  # at zero it can still rise
        exponent = widened(self.bias)[:, None] - widened(self.lse_slope)[:, None] * lse
        return weight[:, None] * exponent.clamp(max=LARGEST).exp()


class FeatureMapMemory(AttentionMemory):
    """out = (window + w phi(q)^T S) / (1 + w phi(q)^T z): one normaliser, in units of the
    window's own mass.
    """

    shares_softmax = True

    def __init__(
        self,
        *,
        num_heads: int,
        num_state_heads: int,
        key_dim: int,
        value_dim: int,
        sliding_window: int,
        num_sink_tokens: int,
        key_space: str,
    ) -> None:
        super().__init__(sliding_window=sliding_window, num_sink_tokens=num_sink_tokens)
        self.key_space, self.state_heads = key_space, num_state_heads
        self.features, self.value_dim = 2 * key_dim, value_dim
        self.query_map = FeatureMap(num_heads, key_dim)
        self.key_map = FeatureMap(num_state_heads, key_dim)
        self.state_weight = StateWeight(num_heads, key_dim)

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """S and z side by side: [B, state heads, 2F, V + 1], zero."""
        shape = (batch_size, self.state_heads, self.features, self.value_dim + 1)
        return (widened(like.new_zeros(shape)),)

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's state: the same for any text."""
        return 4 * self.state_heads * self.features * (self.value_dim + 1)

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Fold what leaves, and attend over window and state under one normaliser."""
        key = self.key_map(self.per_state_head(block.leaving_key))
        value = widened(self.per_state_head(block.leaving_value))
        value = torch.cat(
            [value, torch.ones_like(value[..., :1])], dim=-1
        )  # the last column accumulates z
        beta = block.writes[:, None].to(key.dtype).expand(*key.shape[:3])
        query = key if block.query is None else self.query_map(block.query)
        read, new_state = chunk_rule("ssd")(
            query, key, value, None, beta, scale=1.0, initial_state=state[0]
        )
        if block.query is None:
            return None, (new_state,)
        local, lse = block.attend()  # [B, H, C, V], [B, H, C]
        lse = lse.masked_fill(lse.isinf(), 0.0)  # a padding query sees nothing
        far, mass = read.split((self.value_dim, 1), dim=-1)
        weight = self.state_weight(lse)[..., None]
        output = (local + weight * far) / (1 + weight * mass)
        return output.transpose(1, 2).to(block.leaving_value.dtype), (new_state,)

    def accesses(self, block: Block) -> Accesses:
        """Writes of strength 1 under the features of the key; a slot is one feature."""
        writes = energy(self.key_map(self.per_state_head(block.leaving_key)))
        writes = writes * block.writes[:, None, :, None]
        reads = None if block.query is None else energy(self.query_map(block.query))
        return Accesses(writes, reads)

    @torch.no_grad()
    def calibrate(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Split q k into parts: with means m_q and m_k, q k = q m_k + m_q (k - m_k) + the rest.

        The first two become the scales of the two maps, so that features only have to learn the
        rest. Keys of pretrained models share most of their length: the rest is what tells them
        apart.
        """
        key = widened(self.per_state_head(key))
        key_mean, query_mean = key.mean((0, 2)), widened(query).mean((0, 2))
        sharing = query_mean.shape[0] // key_mean.shape[0]
        self.key_map.mean.copy_(key_mean)
        self.key_map.scale.copy_(query_mean.unflatten(0, (-1, sharing)).mean(1) * scaling)
        self.query_map.mean.copy_(query_mean)
        self.query_map.scale.copy_(key_mean.repeat_interleave(sharing, dim=0) * scaling)
        along = (query_mean * key_mean.repeat_interleave(sharing, dim=0)).sum(-1) * scaling
        self.state_weight.bias.copy_(along + math.log(self.features / 4))
