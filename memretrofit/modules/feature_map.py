"""Linear attention with learned feature maps that shares one normaliser with the exact window."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memretrofit.modules.memory import AttentionMemory, Block, State
from memretrofit.ops import chunk_rule


class FeatureMap(nn.Module):
    """phi(x) = [softmax(x W), softmax(-x W)], one W [K, F] per head, starting at the identity."""

    def __init__(self, num_heads: int, key_dim: int) -> None:
        super().__init__()
        self.map = nn.Parameter(torch.eye(key_dim).repeat(num_heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, heads, T, K] to [B, heads, T, 2F], positive, float32."""
        logits = x.float() @ self.map.float()
        return torch.cat([logits.softmax(-1), (-logits).softmax(-1)], dim=-1)


class StateWeight(nn.Module):
    """What a unit of the state weighs beside the whole window: c exp(b + u q - gamma lse) per
    head, c >= 0.

    c starts at zero (neutral), b, u and gamma too. gamma = 1 puts both sides on the scale of the
    window's own scores.
    """

    def __init__(self, num_heads: int, key_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_heads))
        self.bias = nn.Parameter(torch.zeros(num_heads))
        self.direction = nn.Parameter(torch.zeros(num_heads, key_dim))
        self.lse_slope = nn.Parameter(torch.zeros(num_heads))

    def forward(self, query: Tensor, lse: Tensor) -> Tensor:
        """Query [B, H, C, K] and window log-sum-exp [B, H, C] to [B, H, C]."""
        weight = self.weight.float()
        weight = (
            weight + (weight.clamp(min=0) - weight).detach()
        )  # at zero the gradient can still lift it
        scale = torch.einsum("bhck,hk->bhc", query.float(), self.direction.float())
        scale = scale + self.bias.float()[:, None] - self.lse_slope.float()[:, None] * lse
        return weight[:, None] * scale.exp()


class FeatureMapMemory(AttentionMemory):
    """out = (window + w phi(q)^T S) / (1 + w phi(q)^T z): one normaliser, in units of the
    window's own mass.
    """

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
        return (like.new_zeros(shape, dtype=torch.float32),)

    def state_nbytes(self) -> int:
        """Bytes of one row's state."""
        return 4 * self.state_heads * self.features * (self.value_dim + 1)

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Fold what leaves, and attend over window and state under one normaliser."""
        key = self.key_map(self._per_state_head(block.leaving_key))
        value = self._per_state_head(block.leaving_value).float()
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
        weight = self.state_weight(block.query, lse)[..., None]
        output = (local + weight * far) / (1 + weight * mass)
        return output.transpose(1, 2).to(block.leaving_value.dtype), (new_state,)

    def _per_state_head(self, x: Tensor) -> Tensor:
        repeats = self.state_heads // x.shape[1]
        return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)
