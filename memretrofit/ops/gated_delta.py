"""Gated delta rule: an associative memory that fades, and overwrites by key.

For each position t (one head; S is the state)::

    S'  = exp(g_t) · S_{t-1}                   [K, V]   fade
    e_t = v_t − S'ᵀ k_t                        [V]      what this key does not yet recall
    S_t = S' + β_t · k_t e_tᵀ                  [K, V]   write the difference
    o_t = S_tᵀ (scale · q_t)                   [V]      read

The state stays bounded for unit keys and 0 ≤ β ≤ 2: callers normalise k (and usually q) themselves.
Reduces to: the delta rule at g = 0; a plain decaying sum of k vᵀ when keys are orthonormal and
β = 1.
Yang et al., 2024, arXiv:2412.06464. Shapes and precision: as in `memretrofit.ops.linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from memretrofit.ops.chunks import Chunks, Operands, full_precision, operands


def recurrent_gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The four lines above, one position at a time. This function is the definition.

    A position with g = 0 and β = 0 leaves the state as it is, bit for bit.

    Raises:
        ValueError: shapes disagree, or H is no multiple of G.
    """
    with full_precision(q):
        x = operands(q, k, v, g, beta, scale, initial_state)
        state, reads = x.state, list[Tensor]()
        for q_t, k_t, v_t, decay_t, beta_t in x.steps():
            state = decay_t * state
            error = v_t - k_t.mT @ state
            state = torch.addcmul(state, k_t, beta_t * error)
            reads.append(q_t @ state)
        return x.heads(reads), state


def chunk_gated_delta(
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

    With u_i = β_i e_i and the letters of `memretrofit.ops.chunks`, the definition inside a chunk
    is ::

        u_i + β_i Σ_{j<i} D_ij (k_i · k_j) u_j = β_i v_i − β_i exp(γ_i) Sᵀ k_i

    a unit lower-triangular system in all u at once. It is solved for both terms on the right before
    S is known: u = fresh − stale S. The state then walks by one product per chunk.

    Raises:
        ValueError: as `recurrent_gated_delta`; or `chunk_size` < 1.
    """
    if k.shape[2] == 0:
        return recurrent_gated_delta(q, k, v, g, beta, scale=scale, initial_state=initial_state)
    with full_precision(q):
        x = operands(q, k, v, g, beta, scale, initial_state)
        if k.shape[2] == 1:
            return _step(x)
        state, outputs = x.state, list[Tensor]()
        for chunks in x.blocks(chunk_size):
            fresh, stale = _solve(chunks)
            states, state = _walk(chunks, fresh, stale, state)
            outputs.append(chunks.read(states, fresh - stale @ states))
        return torch.cat(outputs, 2), state


def _step(x: Operands) -> tuple[Tensor, Tensor]:
    """One position: the lines of the definition without a walk, for decoding."""
    state = x.state if x.g is None else x.g.exp()[..., None] * x.state
    error = x.v - x.k @ state
    if x.beta is not None:
        error = x.beta[..., None] * error
    state = torch.addcmul(state, x.k.mT, error)
    return (x.q.flatten(2, 3) @ state).flatten(1, 2)[:, :, None], state


def _solve(chunks: Chunks) -> tuple[Tensor, Tensor]:
    """The writes into an empty state [B,G,N,C,V], and what a state takes off them [B,G,N,C,K]."""
    keys = chunks.weigh(chunks.k)
    system = (keys @ chunks.k.mT) * chunks.pairs
    right = torch.cat((chunks.weigh(chunks.v), chunks.fade(keys)), -1)
    # The diagonal counts as 1 whatever it holds, and what lies above it is not read.
    solve = cast(Callable[..., Tensor], torch.linalg.solve_triangular)  # pyright: ignore
    solved = solve(system, right, upper=False, unitriangular=True)
    width = chunks.v.shape[-1]
    return solved[..., :width], solved[..., width:]


def _walk(chunks: Chunks, fresh: Tensor, stale: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states before each chunk [B,G,N,K,V] and the one after the last [B,G,K,V]."""
    keys, kept = chunks.kept_keys(), chunks.kept_state()
    same = torch.eye(state.shape[2], dtype=state.dtype, device=state.device)
    step = (same if kept is None else kept * same) - keys @ stale  # [B, G, N, K, K]
    added = keys @ fresh  # [B, G, N, K, V]
    states: list[Tensor] = []
    for step_n, added_n in zip(step.unbind(2), added.unbind(2), strict=True):
        states.append(state)
        state = added_n + step_n @ state
    return torch.stack(states, 2), state
