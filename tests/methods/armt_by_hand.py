"""ARMT as its docstring defines it: one row, one segment and one layer at a time, with the stock
layers of a Llama and one vector at a time in the memory.
"""

from __future__ import annotations

import torch
from contract.runs import additive
from torch import Tensor

from memretrofit.ops.associative import EPSILON, dpfp


class ByHand:
    """A text read with the parameters of a patched model and the layers of a stock one."""

    def __init__(self, stock, patched, config, *, wrong=""):
        """`wrong` makes a witness: keys and values from the layer's "input", a write with "no
        delta" to what its key recalls, a norm that grows with every write for "no correction".
        """
        self.stock, self.head = stock.model, stock.lm_head
        self.rows = patched.model.memory.rows.weight
        self.parts = [layer.memory for layer in patched.model.layers]
        self.length, self.shifts = config.segment_length, config.num_shifts
        self.wrong = wrong
        features = 2 * config.num_shifts * config.memory_dim
        self.matrix = [torch.zeros(features, self.rows.shape[1]) for _ in self.parts]
        self.norm = [torch.zeros(features) for _ in self.parts]

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Of a text [n]."""
        return torch.cat([self.segment(x) for x in ids.split(self.length)])

    def segment(self, ids: Tensor) -> Tensor:
        closes = len(ids) == self.length
        embeds = self.stock.embed_tokens(ids)
        h = torch.cat([embeds, self.rows] if closes else [embeds])[None]
        turn = self.stock.rotary_emb(h, torch.arange(h.shape[1])[None])
        mask = additive(torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril(), ids[None])
        for index, layer in enumerate(self.stock.layers):
            recalled = [
                self.recalled(index, self.features(self.parts[index].query, x)) for x in h[0]
            ]
            h = h + torch.stack(recalled)
            before = h
            h = layer(h, attention_mask=mask, position_embeddings=turn)
            if closes:
                self.write(index, (before if self.wrong == "input" else h)[0, len(ids) :])
        return self.head(self.stock.norm(h))[0, : len(ids)]

    def features(self, projection, x: Tensor) -> Tensor:
        return dpfp(projection(x), self.shifts)

    def recalled(self, index: int, query: Tensor) -> Tensor:
        return query @ self.matrix[index] / (self.norm[index] @ query + EPSILON)

    def write(self, index: int, tokens: Tensor) -> None:
        part, matrix, norm = self.parts[index], self.matrix[index], self.norm[index]
        for m in tokens:
            k, beta = self.features(part.key, m), part.strength(m).sigmoid()
            error = part.value(m) - (self.wrong != "no delta") * self.recalled(index, k)
            known = (self.wrong != "no correction") * self.norm[index] @ k / (k @ k + EPSILON)
            matrix = matrix + torch.outer(k, beta * error)
            norm = norm + (1 - known).clamp(0, 1) * k
        self.matrix[index], self.norm[index] = matrix, norm
