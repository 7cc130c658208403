"""The chunk forms on a GPU: flash-linear-attention where it applies, ours everywhere else.

The kernels work in half precision with float32 states and refuse float32 operands. They serve
half-precision CUDA operands of at least one chunk, and agree with ours to half precision only;
everything else takes the float32 path of this package. Install them with `memretrofit[kernels]`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from memretrofit.ops.delta import chunk_delta
from memretrofit.ops.gated_delta import chunk_gated_delta
from memretrofit.ops.linear import chunk_linear

ChunkRule = Callable[..., tuple[Tensor, Tensor]]

SHORTEST = 64
"""Fewer positions than this are not worth a kernel launch, and the kernels warn when T < H."""


def chunk_rule(name: str) -> ChunkRule:
    """The chunk form of a rule ("gated_delta", "delta", "ssd"), called as `chunk_gated_delta` is.

    Which code runs is decided per call, from the operands. The kernels fix their own chunk size.

    Raises:
        KeyError: there is no rule of that name.
    """
    ours, module, function = {
        "gated_delta": (chunk_gated_delta, "gated_delta_rule", "chunk_gated_delta_rule"),
        "delta": (chunk_delta, "delta_rule", "chunk_delta_rule"),
        "ssd": (chunk_linear, "simple_gla", "chunk_simple_gla"),
    }[name]

    def run(
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
        if not (_suits(q, k, v) and _installed()) or (name == "delta" and g is not None):
            return ours(
                q, k, v, g, beta, chunk_size=chunk_size, scale=scale, initial_state=initial_state
            )
        kernel = getattr(import_module(f"fla.ops.{module}"), function)
        return _run_kernel(kernel, name, q, k, v, g, beta, scale, initial_state)

    return run


@cache
def _installed() -> bool:
    return find_spec("fla") is not None


def _suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    half = q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype
    return q.is_cuda and half and k.shape[2] >= max(SHORTEST, q.shape[1])


def _run_kernel(
    kernel: ChunkRule,
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Ours → [B, T, H, …] with one KV head per query head → ours."""
    batch, groups, time, _ = k.shape
    repeats = q.shape[1] // groups
    if beta is None:
        beta = k.new_ones(batch, groups, time)
    gates: dict[str, Tensor | None] = {}
    if name == "ssd":
        v = (beta[..., None] * v).to(v.dtype)  # simple GLA has no write strength
        gates["g"] = None if g is None else g.float()
    else:
        gates["beta"] = beta.to(k.dtype)
        if name == "gated_delta":
            g = k.new_zeros(batch, groups, time) if g is None else g
            gates["g"] = g.float()

    def theirs(x: Tensor) -> Tensor:
        return x.repeat_interleave(repeats, 1).transpose(1, 2).contiguous()

    o, state = kernel(
        q.transpose(1, 2).contiguous(),
        theirs(k),
        theirs(v),
        **{key: None if gate is None else theirs(gate) for key, gate in gates.items()},
        scale=k.shape[-1] ** -0.5 if scale is None else scale,
        initial_state=(
            None if initial_state is None else initial_state.float().repeat_interleave(repeats, 1)
        ),
        output_final_state=True,
    )
    # The query heads of one KV head hold equal states: keep the first of each.
    return o.transpose(1, 2).float(), state[:, ::repeats].float()
