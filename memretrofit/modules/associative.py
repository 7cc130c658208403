"""An associative matrix in every layer: read by all tokens of a segment, written by the tokens that
trail it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memretrofit.modules.memory import widened
from memretrofit.modules.memory_tokens import TokenRows
from memretrofit.modules.segment_memory import (
    Columns,
    LayerMemory,
    Part,
    Past,
    SegmentMemory,
    State,
)
from memretrofit.ops.associative import associative_read, associative_write, dpfp
from memretrofit.ops.chunks import full_precision

MATRIX, NORM = "matrix", "norm"


class WriteTokens(SegmentMemory):
    """M trained tokens behind each segment, the same every time. What they become in each layer is
    what that layer writes; nothing stands in front of a segment.
    """

    def __init__(self, *, segment_length: int, rows: Tensor) -> None:
        """`rows` [M, E]: where the tokens begin."""
        super().__init__()
        self.spans = (segment_length,)
        self.rows = TokenRows(rows)

    def trailing(self, span: int, past: Past) -> Tensor:
        """The tokens [B, M, E]."""
        return self.rows.like(past.embeds)


class AssociativeLayer(LayerMemory):
    """One layer's matrix [D, E] and norm [D], D = 2 * num_shifts * memory_dim; see
    `memretrofit.ops.associative`. It adds nothing until the value projection has left zero.
    """

    def __init__(self, *, hidden_size: int, memory_dim: int, num_shifts: int) -> None:
        super().__init__()
        self.hidden_size, self.num_shifts = hidden_size, num_shifts
        self.num_features = 2 * num_shifts * memory_dim
        self.query = nn.Linear(hidden_size, memory_dim, bias=False)
        self.key = nn.Linear(hidden_size, memory_dim, bias=False)
        self.value = nn.Linear(hidden_size, hidden_size, bias=False)
        self.strength = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value.weight)

    def begin(self, rows: int, device: torch.device) -> State:
        """Zeros."""
        zeros = widened(self.value.weight.new_zeros((), device=device))
        return {
            MATRIX: zeros.expand(rows, self.num_features, self.hidden_size).clone(),
            NORM: zeros.expand(rows, self.num_features).clone(),
        }

    def read(self, hidden: Tensor, state: State, columns: Columns) -> Tensor:
        """Add what each column's query recalls; rows that have written nothing keep their bits."""
        if not columns.written:
            return hidden
        written = state[NORM].any(-1)
        with full_precision(hidden):
            query = dpfp(self.query(self._for_weights(hidden)), self.num_shifts)
            recalled = associative_read(query, state[MATRIX], state[NORM])
            found = (hidden + recalled).to(hidden.dtype)
        return torch.where(written[:, None, None], found, hidden)

    def write(self, inputs: Tensor, outputs: Tensor, state: State, closing: Part) -> State:
        """The delta rule over what the layer made of the trailing tokens."""
        with full_precision(outputs):
            tokens = self._for_weights(outputs[:, closing.begin : closing.end])
            matrix, norm = associative_write(
                dpfp(self.key(tokens), self.num_shifts),
                self.value(tokens),
                widened(self.strength(tokens)[..., 0]).sigmoid(),
                state[MATRIX],
                state[NORM],
            )
        return {MATRIX: matrix, NORM: norm}

    def _for_weights(self, hidden: Tensor) -> Tensor:
        """In the type of the projections: float32, whatever the model's is."""
        return hidden.to(self.value.weight.dtype)
