"""Random operands for the state rules, and the distance between two results."""

from __future__ import annotations

import torch
from torch import Tensor

from memretrofit.ops import RULES


def operands(
    rule: str,
    time: int,
    *,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    key: int = 8,
    value: int = 6,
    decay: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor | None]:
    """What a rule is called with: unit keys, strengths in (0, 1), log decays in (-decay, 0)."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=make, dtype=torch.float64)

    drawn = {
        "q": normal(batch, heads, time, key),
        "k": torch.nn.functional.normalize(normal(batch, groups, time, key), dim=-1),
        "v": normal(batch, groups, time, value),
        "g": -decay * uniform(batch, groups, time),
        "beta": uniform(batch, groups, time),
        "initial_state": normal(batch, groups, key, value),
    }
    cast: dict[str, Tensor | None] = {name: x.to(dtype) for name, x in drawn.items()}
    if rule == "delta":
        cast["g"] = None
    return cast


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, in units of the largest entry of `b`; NaN counts as infinite."""
    a, b = a.detach().double(), b.detach().double()
    if a.shape != b.shape:
        return float("inf")
    if a.numel() == 0:
        return 0.0
    gap = (a - b).abs().max() / b.abs().max().clamp(min=1e-300)
    return float(gap.nan_to_num(nan=float("inf")))


def results(form: int, rule: str, inputs: dict[str, Tensor | None], **options: object):
    """Output, final state, and the gradients of a fixed random sum of both, by name."""
    leaves = {n: None if x is None else x.clone().requires_grad_() for n, x in inputs.items()}
    o, state = RULES[rule][form](**leaves, **options)
    make = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=make, dtype=torch.float64)).sum() for x in (o, state)
    )
    loss.backward()
    found = {"o": o.detach(), "state": state.detach()}
    return found | {f"d{n}": x.grad for n, x in leaves.items() if x is not None}
