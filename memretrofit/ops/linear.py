"""Linear rule: an associative memory that fades and adds.

For each position t (one head; S is the state)::

    S_t = exp(g_t) · S_{t-1} + β_t · k_t v_tᵀ   [K, V]   fade, then write
    o_t = S_tᵀ (scale · q_t)                    [V]      read

Without g nothing fades; without β every write has strength 1. Mamba-2 (SSD) is this rule with
β_t = dt_t (or k already multiplied by it) and g_t = -A · dt_t: Dao and Gu, 2024, arXiv:2405.21060.
Reduces to: causal attention without softmax when g = 0 and β = 1.

q is [B, H, T, K]; k [B, G, T, K], v [B, G, T, V], g and beta [B, G, T]. H is a multiple of G: with
R = H / G, the query heads h·R … h·R + R − 1 read the state of KV head h, which is written once.
Outputs are [B, H, T, V], the final state [B, G, K, V]: float32, or float64 where an input has it.
`scale` is K**-0.5 unless given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memretrofit.ops.chunks import full_precision, operands


def recurrent_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The two lines above, one position at a time. This function is the definition.

    Raises:
        ValueError: shapes disagree, or H is no multiple of G.
    """
    with full_precision(q):
        x = operands(q, k, v, g, beta, scale, initial_state)
        state, reads = x.state, list[Tensor]()
        for q_t, k_t, v_t, decay_t, beta_t in x.steps():
            state = decay_t * state + k_t * (beta_t * v_t)
            reads.append(q_t @ state)
        return x.heads(reads), state


def chunk_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    chunk_size: int = 64,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same result from matrix products over chunks of at most `chunk_size` positions; any T.

    Raises:
        ValueError: as `recurrent_linear`; or `chunk_size` < 1.
    """
    if k.shape[2] <= 1:
        return recurrent_linear(q, k, v, g, beta, scale=scale, initial_state=initial_state)
    with full_precision(q):
        x = operands(q, k, v, g, beta, scale, initial_state)
        state, outputs = x.state, list[Tensor]()
        for chunks in x.blocks(chunk_size):
            writes = chunks.weigh(chunks.v)
            kept, added = chunks.kept_state(), chunks.kept_keys() @ writes
            states: list[Tensor] = []
            for n, added_n in enumerate(added.unbind(2)):
                states.append(state)
                state = added_n + (state if kept is None else kept[:, :, n] * state)
            outputs.append(chunks.read(torch.stack(states, 2), writes))
        return torch.cat(outputs, 2), state
