"""Choosing between our chunk forms and the kernels of flash-linear-attention."""

from __future__ import annotations

import pytest
import torch
from rule_cases import difference, operands

from memretrofit.ops import RULES, chunk_rule
from memretrofit.ops.kernels import _run_kernel


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_it_is_our_chunk_form(rule, dtype):
    x = operands(rule, 130, dtype=dtype)
    for found, expected in zip(chunk_rule(rule)(**x), RULES[rule][1](**x), strict=True):
        assert torch.equal(found, expected)


def test_an_unknown_rule_is_an_error_when_it_is_chosen():
    with pytest.raises(KeyError, match="gated"):
        chunk_rule("gated")


def test_layouts_and_shared_heads_survive_the_way_to_a_kernel_and_back():
    """Transformers' reference takes the kernels' arguments and layout, and runs without a GPU."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    x = operands("gated_delta", 130, heads=6, groups=2, dtype=torch.float32)
    found = _run_kernel(torch_chunk_gated_delta_rule, "gated_delta", **x, scale=None)
    expected = RULES["gated_delta"][1](**x)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert difference(a, b) < 1e-5
    swapped = x | {"q": x["q"].unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2)}
    assert difference(RULES["gated_delta"][1](**swapped)[0], found[0]) > 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("scale", [None, 0.5])
def test_kernels_agree_to_half_precision(rule, scale):
    pytest.importorskip("fla")
    x = operands(rule, 200, heads=4, groups=2, key=64, value=64, decay=0.1)
    x = {n: None if t is None else t.bfloat16().cuda() for n, t in x.items()}
    exact = {n: None if t is None else t.double() for n, t in x.items()}
    for found, expected in zip(
        chunk_rule(rule)(**x, scale=scale), RULES[rule][0](**exact, scale=scale), strict=True
    ):
        assert found.dtype == torch.float32
        assert difference(found, expected) < 2e-2
    wrong, _ = RULES[rule][0](**exact | {"beta": None}, scale=scale)
    assert difference(chunk_rule(rule)(**x, scale=scale)[0], wrong) > 2e-2
