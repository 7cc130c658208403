"""Tokens behind embeddings: found exactly, in any dtype, without a score for each of the table."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from memretrofit.patching import lookup
from memretrofit.patching.lookup import NO_TOKEN, TokenLookup


def table(dtype=torch.float32, rows: int = 50) -> nn.Embedding:
    generator = torch.Generator().manual_seed(0)
    found = nn.Embedding(rows, 8)
    found.weight.data = torch.randn(rows, 8, generator=generator).to(dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_found_and_nothing_else(dtype, monkeypatch):
    monkeypatch.setattr(lookup, "NUMBERS", 24)  # three rows at a time
    embedding = table(dtype)
    ids = torch.arange(50).flip(0).view(2, 25)
    embeds = embedding(ids)
    assert torch.equal(TokenLookup(embedding)(embeds), ids)
    near = embeds.detach().clone()
    near[0, 3, 5] = torch.nextafter(near[0, 3, 5], near.new_tensor(9.0))  # its last bit
    near[1, 7] *= 2  # another length: as similar as the token itself
    found = TokenLookup(embedding)(near)
    assert found[0, 3] == found[1, 7] == NO_TOKEN
    assert int((found == NO_TOKEN).sum()) == 2


def test_of_equal_rows_the_first_and_both_zeros_are_one():
    embedding = table()
    embedding.weight.data[7] = embedding.weight.data[31]
    embedding.weight.data[12] = 0.0
    lookup = TokenLookup(embedding)
    assert lookup(embedding(torch.tensor([[31, 7]]))).tolist() == [[7, 7]]
    assert lookup(-torch.zeros(1, 1, 8)).tolist() == [[12]]


def test_rows_are_what_the_module_makes_of_its_weights():
    """Gemma scales them."""

    class Scaled(nn.Embedding):
        def forward(self, input):
            return 3.0 * super().forward(input)

    embedding = Scaled(20, 8)
    ids = torch.tensor([[3, 19]])
    assert torch.equal(TokenLookup(embedding)(embedding(ids)), ids)
    assert (TokenLookup(embedding)(embedding.weight[ids]) == NO_TOKEN).all()


def test_the_table_is_read_once_and_the_search_makes_little(monkeypatch):
    """No tensor of T times V numbers."""
    monkeypatch.setattr(lookup, "NUMBERS", 1024)
    embedding = table(rows=4000)
    lookup_of = TokenLookup(embedding)
    embeds = embedding(torch.randint(4000, (1, 500)))
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found is not embedding.weight:
                largest = max(largest, found.numel())
            return found

    with Watch():
        lookup_of(embeds)
    assert largest <= max(embeds.numel(), 4000)
