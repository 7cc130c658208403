"""Memories of the last segments, in order: all of them read, or one recalled from among them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from memretrofit.modules.memory_tokens import Carry, SinkTokens, TokenRows
from memretrofit.modules.segment_memory import Opening, Past, SegmentMemory, State
from memretrofit.ops.chunks import full_precision

QUEUE = "queue"
"""[B, N, E] the newest in the last columns."""
HELD = "held"
"""[B, N] 1 where a row has a memory, else 0."""
QUERY = "query"
"""[B, E]"""


def empty_queue(rows: int, length: int, like: Tensor) -> State:
    """A queue that holds nothing, of vectors as `like` [..., E]."""
    return {
        QUEUE: like.new_zeros(rows, length, like.shape[-1]),
        HELD: like.new_zeros(rows, length),
    }


def pushed(state: State, new: Tensor) -> State:
    """The queue with `new` [B, M, E] at its end; what is too old for it falls out."""
    queue, held, count = state[QUEUE], state[HELD], new.shape[1]
    return {
        QUEUE: torch.cat([queue[:, count:], new.to(queue)], dim=1),
        HELD: torch.cat([held[:, count:], held.new_ones(len(held), count)], dim=1),
    }


class SummaryVectors(SegmentMemory):
    """`[sinks ; queue ; tokens ; summary rows]`: each segment reads what all those before it, as
    far as the queue goes back, wrote at M rows of their own.
    """

    def __init__(
        self,
        *,
        segment_length: int,
        sinks: SinkTokens,
        rows: Tensor,
        queue_length: int,
        carry: Carry,
    ) -> None:
        """`rows` [M, E]: the summary tokens. `queue_length`: vectors, not segments."""
        super().__init__()
        self.spans, self.queue_length = (segment_length,), queue_length
        self.sinks, self.rows, self.carry = sinks, TokenRows(rows), carry

    def begin(self, rows: int, device: torch.device) -> State:
        """Nothing to read."""
        return empty_queue(rows, self.queue_length, self.rows().to(device))

    def opening(self, span: int, past: Past) -> Opening:
        """Sinks, then the summaries that there are."""
        held = past.state[HELD].bool().cpu()
        begin = self.queue_length - int(held.sum(-1).max())
        return _opening(self.sinks, past.state[QUEUE][:, begin:], held[:, begin:], past)

    def trailing(self, span: int, past: Past) -> Tensor:
        """The summary tokens."""
        return self.rows.like(past.embeds)

    def write(self, span: int, written: Tensor, past: Past) -> State:
        """The summary goes into the queue."""
        return pushed(past.state, self.carry(written.to(past.state[QUEUE]), self.rows()))


class QueueRecall(nn.Module):
    """p = softmax( (W_q q) (W_k Q)^T / sqrt(K) ) Q over what the queue Q holds, in the type of Q:
    autocast does not halve it.
    """

    def __init__(self, hidden_size: int, key_dim: int) -> None:
        super().__init__()
        self.query_map = nn.Linear(hidden_size, key_dim, bias=False)
        self.key_map = nn.Linear(hidden_size, key_dim, bias=False)

    def weights(self, query: Tensor, queue: Tensor, held: Tensor) -> Tensor:
        """[B, N] how much of each memory is recalled; an empty queue gives them all the same."""
        query, keys = self.query_map(query), self.key_map(queue)
        scores = torch.einsum("bk,bnk->bn", query, keys) / math.sqrt(keys.shape[-1])
        return scores.masked_fill(held == 0, torch.finfo(scores.dtype).min).softmax(-1)

    def forward(self, query: Tensor, queue: Tensor, held: Tensor) -> Tensor:
        """[B, E] of a query [B, E], a queue [B, N, E] and which of it is held [B, N]."""
        with full_precision(queue):
            return torch.einsum("bn,bne->be", self.weights(query, queue, held), queue)


class RecalledSummaries(SegmentMemory):
    """A segment in two spans of h and T - h tokens; p is recalled from the queue by the latest
    summary::

        [ sinks ; p ; the S tokens before the segment ; first h tokens ; summary row ]
        [ sinks ; p ; the S tokens before the segment ; first h tokens ; the others ; p ]

    What the summary row becomes is the query from there on; what the last p becomes is pushed.
    """

    def __init__(
        self,
        *,
        spans: tuple[int, int],
        num_sensory_tokens: int,
        queue_length: int,
        sinks: SinkTokens,
        first: Tensor,
        summary: Tensor,
        recall: QueueRecall,
    ) -> None:
        """`first` [1, E]: read while the queue is empty. `summary` [1, E]: the summary row."""
        super().__init__()
        self.spans, self.queue_length = spans, queue_length
        self.read_again = (num_sensory_tokens, num_sensory_tokens + spans[0])
        self.kept_tokens = max(self.read_again)
        self.sinks, self.recall = sinks, recall
        self.first, self.summary = TokenRows(first), TokenRows(summary)

    def begin(self, rows: int, device: torch.device) -> State:
        """An empty queue."""
        like = self.first().to(device)
        query = like.new_zeros(rows, like.shape[-1])
        return {QUERY: query, **empty_queue(rows, self.queue_length, like)}

    def opening(self, span: int, past: Past) -> Opening:
        """Sinks, the recalled memory, and tokens that are read again."""
        begin = max(past.embeds.shape[1] - self.read_again[span], 0)
        recalled = self._recalled(past)
        columns = torch.cat([recalled, past.embeds[:, begin:]], dim=1)
        real = torch.cat([past.real.new_ones(recalled.shape[:2]), past.real[:, begin:]], dim=1)
        return _opening(self.sinks, columns, real, past)

    def trailing(self, span: int, past: Past) -> Tensor:
        """The summary row behind the first span, the recalled memory behind the second."""
        if span:
            return self._recalled(past)
        return self.summary.like(past.embeds)

    def write(self, span: int, written: Tensor, past: Past) -> State:
        """The query, then the segment's memory."""
        if span:
            return pushed(past.state, written)
        return {QUERY: written[:, 0].to(past.state[QUERY])}

    def _recalled(self, past: Past) -> Tensor:
        """[B, 1, E]"""
        query, queue, held = (past.state[name] for name in (QUERY, QUEUE, HELD))
        found = self.recall(query, queue, held)[:, None]
        first = self.first().to(found)
        return torch.where(held.bool().any(-1)[:, None, None], found, first).to(past.embeds)


def _opening(sinks: SinkTokens, columns: Tensor, real: Tensor, past: Past) -> Opening:
    """Sinks, then `columns` [B, n, E] of which `real` [B, n] are there."""
    front = sinks(past.embeds)
    return Opening(
        embeds=torch.cat([front, columns.to(front)], dim=1),
        real=torch.cat([real.new_ones(front.shape[:2]), real], dim=1),
    ).together()
