"""A state per head that leaving pairs are written into by a rule, and that queries read beside
the window.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memretrofit.modules.memory import (
    Accesses,
    AttentionMemory,
    Block,
    State,
    energy,
    widened,
)
from memretrofit.ops import chunk_rule

Rule = Literal["gated_delta", "delta", "ssd"]
EPSILON = 1e-5


class Decay(nn.Module):
    """Log decay g = -exp(A) softplus(a + b) <= 0 per head, and its step size softplus(a + b)
    (Mamba-2's dt).
    """

    def __init__(self, num_heads: int, rule: Rule) -> None:
        super().__init__()
        if rule == "ssd":
            rate, step = torch.arange(1.0, num_heads + 1), torch.ones(num_heads)
        else:
            rate = torch.empty(num_heads).uniform_(1e-3, 16)
            step = torch.exp(torch.empty(num_heads).uniform_(math.log(1e-3), math.log(1e-1)))
            step = step + torch.log(-torch.expm1(-step))  # softplus of this is the step
        self.log_rate = nn.Parameter(rate.log())
        self.step_bias = nn.Parameter(step)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, heads, T] to (g, dt), float32."""
        step = F.softplus(widened(logits) + widened(self.step_bias)[:, None])
        return -widened(self.log_rate).exp()[:, None] * step, step


class WriteGate(nn.Linear):
    """Logits of decay and write strength from hidden states of any type: [B, T, E] to [B, T, F]."""

    def forward(self, input: Tensor) -> Tensor:
        """A linear map in the type of its own weights."""
        return super().forward(input.to(self.weight.dtype))


class ReadOut(nn.Module):
    """y = A_h (norm(r) silu(w x)) per head; A starts at zero, so that the memory is silent until
    it is trained.
    """

    def __init__(self, hidden_size: int, num_heads: int, value_dim: int, rule: Rule) -> None:
        super().__init__()
        self.joint = rule == "ssd"  # Mamba-2 gates before its norm, which spans all heads
        self.read_gate = nn.Linear(hidden_size, num_heads, bias=self.joint)
        self.norm_weight = nn.Parameter(
            torch.ones(num_heads * value_dim if self.joint else value_dim)
        )
        self.out_map = nn.Parameter(torch.zeros(num_heads, value_dim, value_dim))

    def forward(self, read: Tensor, hidden: Tensor) -> Tensor:
        """Reads [B, H, C, V] and hidden states [B, C, E] to [B, C, H, V]."""
        gate = self.read_gate(hidden.to(self.read_gate.weight.dtype))
        gate = widened(F.silu(gate))[..., None]  # [B, C, H, 1]
        read = widened(read.transpose(1, 2))
        shape, norm_weight = read.shape, widened(self.norm_weight)
        if self.joint:
            read = F.rms_norm(
                (read * gate).flatten(2), (norm_weight.numel(),), norm_weight, EPSILON
            ).view(shape)
        else:
            read = F.rms_norm(read, shape[-1:], norm_weight, EPSILON) * gate
        return (read.transpose(1, 2) @ widened(self.out_map)).transpose(1, 2)


class RecurrentMemory(AttentionMemory):
    """Window attention plus a gated read of the state: out = local + ReadOut(S q, x)."""

    def __init__(
        self,
        *,
        rule: Rule,
        hidden_size: int,
        num_heads: int,
        num_state_heads: int,
        key_dim: int,
        value_dim: int,
        sliding_window: int,
        num_sink_tokens: int,
        key_space: str,
        center_keys: bool,
    ) -> None:
        super().__init__(sliding_window=sliding_window, num_sink_tokens=num_sink_tokens)
        self.traceable = True
        self.rule, self.key_space, self.state_heads = rule, key_space, num_state_heads
        self.scale = 1.0 if rule == "ssd" else key_dim**-0.5  # the scales of the authors' kernels
        self.key_dim, self.value_dim = key_dim, value_dim
        gates = 2 if rule == "gated_delta" else 1
        self.write_features = WriteGate(hidden_size, gates * num_state_heads, bias=rule == "ssd")
        if rule != "delta":
            self.decay = Decay(num_state_heads, rule)
        self.read_out = ReadOut(hidden_size, num_heads, value_dim, rule)
        if center_keys:
            self.key_center = Center(num_state_heads, key_dim)

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """S = 0: [B, state heads, K, V]."""
        shape = (batch_size, self.state_heads, self.key_dim, self.value_dim)
        return (widened(like.new_zeros(shape)),)

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's state: the same for any text."""
        return 4 * self.state_heads * self.key_dim * self.value_dim

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Write what leaves, read with each query, add to the window's attention."""
        key = self._normalised(self.per_state_head(block.leaving_key))
        value = self.per_state_head(block.leaving_value)
        g, beta = self._gates(block.leaving_features, block.writes[:, None])  # type: ignore[arg-type]
        query = key if block.query is None else self._normalised_query(block.query)
        read, new_state = chunk_rule(self.rule)(
            query, key, value, g, beta, scale=self.scale, initial_state=state[0]
        )
        if block.query is None:
            return None, (new_state,)
        local = block.local()
        return local + self.read_out(read, block.hidden).to(local.dtype), (new_state,)

    def accesses(self, block: Block) -> Accesses:
        """Writes of strength beta under the normalised key; a slot is a row of S."""
        key = self._normalised(self.per_state_head(block.leaving_key))
        _, beta = self._gates(block.leaving_features, block.writes[:, None])  # type: ignore[arg-type]
        query = block.query
        reads = None if query is None else energy(self._normalised_query(query))
        return Accesses(beta[..., None] * energy(key), reads)

    @torch.no_grad()
    def calibrate(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Start the learned mean of the keys at their mean."""
        if hasattr(self, "key_center"):
            mean = widened(self.per_state_head(key)).mean((0, 2))
            self.key_center.mean.copy_(mean[:, None])

    def _normalised(self, key: Tensor) -> Tensor:
        key = self.key_center(key) if hasattr(self, "key_center") else key
        return F.normalize(widened(key), dim=-1, eps=1e-6).to(key.dtype)

    def _normalised_query(self, query: Tensor) -> Tensor:
        return F.normalize(widened(query), dim=-1, eps=1e-6).to(query.dtype)

    def _gates(self, features: Tensor, writes: Tensor) -> tuple[Tensor | None, Tensor]:
        """(g, beta) [B, heads, C]; both zero where nothing leaves, which leaves the state as it
        is.
        """
        first, *rest = features.mT.split(self.state_heads, dim=1)
        if self.rule == "delta":
            return None, widened(first).sigmoid() * writes
        g, step = self.decay(first)
        beta = step if self.rule == "ssd" else widened(rest[0]).sigmoid()
        return g * writes, beta * writes


class Center(nn.Module):
    """Subtract a learned mean per head: keys of a pretrained model share a large common part."""

    def __init__(self, num_heads: int, key_dim: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(num_heads, 1, key_dim))

    def forward(self, key: Tensor) -> Tensor:
        """Keys [B, heads, T, K] without their mean."""
        return key - self.mean.to(key.dtype)
