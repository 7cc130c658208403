"""Delta rule: an associative memory that overwrites by key and does not fade.

For each position t (one head; S is the state)::

    e_t = v_t − S_{t-1}ᵀ k_t                   [V]      what this key does not yet recall
    S_t = S_{t-1} + β_t · k_t e_tᵀ             [K, V]   write the difference
    o_t = S_tᵀ (scale · q_t)                   [V]      read

Reduces to: the linear rule when keys are orthonormal, β = 1 and each key is written once; a key
written again with β = 1 (unit norm) recalls its last value only.
Yang et al., 2024, arXiv:2406.06484. Shapes and precision: as in `memretrofit.ops.linear`.
"""

from __future__ import annotations

from torch import Tensor

from memretrofit.ops.chunks import full_precision, operands
from memretrofit.ops.gated_delta import chunk_gated_delta


def recurrent_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The three lines above, one position at a time. This function is the definition.

    `g` has its place so that all rules are called alike; it must be None.

    Raises:
        ValueError: a decay was given, shapes disagree, or H is no multiple of G.
    """
    _refuse_decay(g)
    with full_precision(q):
        x = operands(q, k, v, None, beta, scale, initial_state)
        state, reads = x.state, list[Tensor]()
        for q_t, k_t, v_t, _, beta_t in x.steps():
            error = v_t - k_t.mT @ state
            state = state + k_t * (beta_t * error)
            reads.append(q_t @ state)
        return x.heads(reads), state


def chunk_delta(
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

    The gated form without a gate computes no decay, so it serves here at no cost.

    Raises:
        ValueError: as `recurrent_delta`; or `chunk_size` < 1.
    """
    _refuse_decay(g)
    return chunk_gated_delta(
        q, k, v, None, beta, chunk_size=chunk_size, scale=scale, initial_state=initial_state
    )


def _refuse_decay(g: Tensor | None) -> None:
    if g is not None:
        raise ValueError(
            "The delta rule was given a decay g, and it does not fade. Use gated_delta."
        )
