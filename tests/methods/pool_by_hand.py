"""MemoryLLM and M+ as their docstrings define them: one row, one segment and one layer at a time,
with the stock layers of a Llama and Python lists.
"""

from __future__ import annotations

import torch
from contract.runs import additive
from torch import Tensor
from torch.nn import functional as F

from memretrofit.modules.pool import dropped_places


class ByHand:
    """A text read with the parameters of a patched model and the layers of a stock one."""

    def __init__(self, stock, patched, config, *, seed=None, stored=None, oldest_first=True):
        """The last three make witnesses: other draws, other states, another order."""
        self.stock, self.config = stock.model, config
        self.head = stock.lm_head
        self.parts = [layer.memory for layer in patched.model.layers]
        self.seed = config.seed if seed is None else seed
        self.stored = config.stored if stored is None else stored
        self.oldest_first = oldest_first
        self.pools = [None for _ in self.parts]
        self.stores = [[] for _ in self.parts]
        self.ages = [[] for _ in self.parts]
        self.writes = 0

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Of a text [n]."""
        return torch.cat([self.segment(x) for x in ids.split(self.config.segment_length)])

    def segment(self, ids: Tensor) -> Tensor:
        query = getattr(self.config, "query_length", len(ids))
        found = self.read(ids[:query])
        if len(ids) > query:
            found = torch.cat([found, self.read(ids, query)[query:]])
        if len(ids) == self.config.segment_length:
            self.write(ids)
        return found

    def read(self, ids: Tensor, query: int = 0) -> Tensor:
        """Logits; `query` tokens look for rows, 0 for none."""

        def front(index, h):
            rows = self.pools[index]
            if rows is None:
                return None
            return torch.cat([self.recalled(index, h[:query]), rows]) if query else rows

        h = self.layers(ids, front, marked=False)[0]
        return self.head(self.stock.norm(h))

    def write(self, ids: Tensor) -> None:
        count, blocks = self.config.num_memory_tokens, self.config.num_blocks

        def front(index, h):
            return None if self.writes == 0 else self.pools[index][-count:]

        _, inputs, outputs = self.layers(ids, front, marked=True)
        new = inputs if self.stored == "input" else outputs
        done = torch.tensor([float(self.writes)])
        stay, leave = (
            x[0].tolist() for x in dropped_places(done, count * blocks, count, self.seed)
        )
        for index in range(len(self.parts)):
            rows, block = self.pools[index], new[index][-count:]
            fresh = list(range(count - 1, -1, -1))
            if rows is None:
                self.pools[index] = torch.cat([block] * blocks)
                self.ages[index] = [None] * count * (blocks - 1) + fresh
                continue
            ages = [None if age is None else age + count for age in self.ages[index]]
            store = [(row, age + count) for row, age in self.stores[index]]
            store += [(rows[n], ages[n]) for n in leave if ages[n] is not None]
            self.stores[index] = store[-getattr(self.config, "long_term_size", 1) :]
            self.pools[index] = torch.cat([rows[stay], block])
            self.ages[index] = [ages[n] for n in stay] + fresh
        self.writes += 1

    def layers(self, ids: Tensor, front, *, marked: bool):
        """Last hidden states of the tokens, and what each layer read and gave out there."""
        sink = self.stock.embed_tokens(torch.tensor([self.stock.config.bos_token_id]))
        h, inputs, outputs = self.stock.embed_tokens(ids), [], []
        for index, (layer, part) in enumerate(zip(self.stock.layers, self.parts, strict=True)):
            rows = front(index, h)
            if marked:
                last = self.config.num_memory_tokens
                h = torch.cat([h[:-last], h[-last:] + part.mark_written.vector])
            before = [] if rows is None else [sink + part.move_sink.vector, rows]
            x = torch.cat([*before, h])[None]
            mask = additive(torch.ones(x.shape[1], x.shape[1]).tril().bool(), x[..., 0])
            turned = self.stock.rotary_emb(x, torch.arange(x.shape[1])[None])
            y = layer(x, attention_mask=mask, position_embeddings=turned)[0]
            inputs.append(h)
            sink, h = y[:1], y[-len(ids) :]
            outputs.append(h)
        return h, inputs, outputs

    def recalled(self, index: int, h: Tensor) -> Tensor:
        """The rows of the store [k, E] that the hidden states `h` [h, E] find."""
        part, scored = self.parts[index], []
        for row, age in self.stores[index]:
            key = projected(part.key_map, row)
            queries = [projected(part.query_map, x) for x in h]
            score = sum(1 / (1 + (-(q @ key)).exp()) for q in queries) / len(queries)
            scored.append((float(score), age, row))
        best = sorted(scored, key=lambda x: -x[0])[: self.config.top_k]
        best.sort(key=lambda x: -x[1] if self.oldest_first else x[1])
        return torch.stack([row for _, _, row in best]) if best else h[:0]


def projected(part, x: Tensor) -> Tensor:
    normed = x / (x.square().mean() + torch.finfo(x.dtype).eps).sqrt()
    return part.outer.weight @ F.silu(part.inner.weight @ normed)
