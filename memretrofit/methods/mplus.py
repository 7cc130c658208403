"""M+: what MemoryLLM's pools drop goes to a store in each layer, and a learned retriever takes rows
back.

Wang et al., 2025, arXiv:2502.00592; scores, ages and what is stored from the authors' code. The
pool is that of `memoryllm_pool`.

Equations (layer l; x_j the rows of its store, at most C; h_l its input at the first h tokens of the
segment)::

    k_j   = W_k' f(W_k norm(x_j)),   q_t = W_q' f(W_q norm(h_l,t))                         [D]
    s_j   = mean_t sigmoid(q_t . k_j)                                         t = 1 .. h
    read  layer_l([ s_l + b_l ; the top_k rows of best s_j, oldest first ; pool_l ; h_l ])
    write as a pool; the K rows that it drops go to the store

Differs from the paper: (1) The query is the first h tokens, and only what follows them reads what
they recall: these are read once with the pool alone and again, in a second span, behind what was
recalled. The authors score with all tokens of the prompt, which then see rows that were chosen by
tokens after them. (2) The retriever starts with W_q = W_k, so that rows are found that are like
the query. The authors train it with labels: which rows come from the same document. Here a score
gets the gradient of its row against the store's mean (`modules.long_term`), from the loss that
there is. (3) A full store loses the row that has been in it for longest. The authors' rows count
down from a frequency that recalling should raise, and in the released code never does: the same
order, with other numbers. (4) Every layer drops the same places, so that all layers' rows of a
token move together. (5) Copies that fill a pool at its first write do not go to the store. (6) A
store that holds fewer than top_k rows shows those it has, once each. (7) A layer whose sliding
window does not reach over the pool would never see what it recalls, and has a pool alone.

Reduces to: `memoryllm_pool` while the store is empty; the base model on each segment alone while
nothing is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range, larger_than_a_segment
from memretrofit.errors import UnsupportedModelError
from memretrofit.modules.long_term import LayerLongTerm, LongTermMemory
from memretrofit.modules.memory_tokens import sink_tokens
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.pool import LayerPool, PoolSizes
from memretrofit.patching.segments import patch_segments

PAPER = "arXiv:2502.00592"
FAMILY = "tokens"
IDENTITY = "segment"


@dataclass(frozen=True, kw_only=True)
class MPlusConfig(MethodConfig):
    """How long a segment is, how much of it stays, and how much is looked up."""

    segment_length: int = 512
    """Tokens read at a time."""
    query_length: Annotated[int, Range(least=1)] = 64
    """h: the first tokens of a segment, which look for rows. They are read twice more."""
    num_memory_tokens: int = 64
    """K: the last tokens of a segment, whose hidden states are kept."""
    num_blocks: Annotated[int, Range(least=1)] = 8
    """N / K: the pool in writes. More remember longer, and every segment attends them all."""
    top_k: int = 128
    """Rows that are recalled from the store of each layer."""
    long_term_size: Annotated[int, Range(least=1)] = 1024
    """C: rows that the store of a layer holds: 2 C E bytes in bfloat16, from the start."""
    key_dim: Annotated[int, Range(least=1)] = 64
    """D: width of keys and queries; the authors' is 256."""
    stored: Literal["input", "output"] = "input"
    """Whether a layer keeps what it read or, as published, what it gave out."""
    seed: Annotated[int, Range(least=0)] = 0
    """Of what is dropped."""

    def problems(self) -> list[str]:
        """What is kept, and what looks for it, are tokens of one segment."""
        found = larger_than_a_segment(self.num_memory_tokens, self.segment_length)
        if self.query_length >= self.segment_length:
            found.append(
                f"query_length={self.query_length}: no token of a segment of "
                f"{self.segment_length} follows it; lower it"
            )
        if self.top_k > self.long_term_size:
            found.append(
                f"top_k={self.top_k}: the store has {self.long_term_size} rows; lower it, or raise "
                "long_term_size"
            )
        return found


MPLUS_8B = MPlusConfig(
    num_memory_tokens=256,
    num_blocks=40,
    top_k=2560,
    long_term_size=150_000,
    key_dim=256,
    stored="output",
)
"""The sizes of M+ 8B: 10,240 rows in a pool, 2,560 recalled. A row of a batch has 47 GB of state in
32 layers 4,096 wide in bfloat16, from its first token on, and a read attends 13,400 columns: the
authors keep the store off the device. For less, lower long_term_size.
"""


def patch_mplus(model: PreTrainedModel, config: MPlusConfig) -> None:
    """Let the model read in segments, each layer with a pool and a store of its own.

    Raises:
        UnsupportedModelError, ConfigError, StateError: see `memretrofit.patch`.
    """
    sizes = PoolSizes(
        spans=(config.query_length, config.segment_length - config.query_length),
        num_memory_tokens=config.num_memory_tokens,
        num_blocks=config.num_blocks,
    )

    def make_memory(spec: ModelSpec) -> LongTermMemory:
        layer = _recalling(spec, sizes)[0]
        return LongTermMemory(sizes, top_k=config.top_k, sink=sink_tokens(spec, 1), layer=layer)

    def make_layer(spec: ModelSpec, layer: int, number: int) -> LayerPool:
        pool: dict[str, Any] = {
            "hidden_size": spec.hidden_size,
            "dtype": spec.dtype,
            "stored": config.stored,
            "seed": config.seed,
        }
        if layer not in _recalling(spec, sizes):
            return LayerPool(sizes, **pool)
        return LayerLongTerm(
            sizes,
            **pool,
            top_k=config.top_k,
            long_term_size=config.long_term_size,
            key_dim=config.key_dim,
            activation=spec.activation,
        )

    patch_segments(model, config, make_memory, make_layer)


def _recalling(spec: ModelSpec, sizes: PoolSizes) -> list[int]:
    """The layers whose tokens see over the pool in front of them.

    Raises:
        UnsupportedModelError: there is none.
    """
    windows = {layer: spec.windows[layer] for layer in spec.layers}
    found = [n for n, window in windows.items() if window is None or window > sizes.rows + 1]
    if not found:
        raise UnsupportedModelError(
            f"Every layer attends over at most {max(filter(None, windows.values()))} columns, and "
            f"recalled rows stand before a pool of {sizes.rows}: no token would see them. Lower "
            "num_blocks or num_memory_tokens, or use memoryllm_pool, which recalls nothing."
        )
    return found
