"""MemoryLLM: every layer keeps a pool of hidden states, and each segment replaces a random part.

Wang et al., 2024, arXiv:2402.04624; what is stored and read from the authors' code. Another paper,
on context-free FFNs, has the same name.

Equations (layer l; N = num_blocks * K rows; h_l the layer's input at the tokens, s_l at a sink)::

    read    layer_l([ s_l + b_l ; pool_l ; h_l ])        positions 0, 1 .. N, N + 1 ..     [E]
    write   x_l = [ s_l + b_l ; last K of pool_l ; h_l + p_l at the last K tokens ]
            e_l = the last K of x_l (input) or of layer_l(x_l) (output)                 [K, E]
            pool_l <- [ pool_l without K random rows ; e_l ]

The write is a second pass over a segment that is closed. A first write fills the pool with copies.
A row survives t writes with probability (1 - K/N)^t.

`stored` says which hidden states are kept. `output`, as published: layer l then reads at its input
what it once gave out, and must be trained to. `input`, ours and the default: keys and values of a
row are those that its token had, so that a pool filled with a text is that text in the cache.

Differs from the paper: (1) the vector b_l in front is added to what the layer makes of the model's
own sink token, and starts at zero; the published one is drawn at random, and attention has nowhere
to rest until it is trained. (2) p_l starts at zero as published, one for each layer; the authors'
is one for all. (3) Rows and sink also form queries, whose results are dropped: the authors leave
them out, to the same effect and cheaper. (4) Segments are of equal length and at least K tokens;
the released code drops the same rows in all layers or draws for each, here it is always the same.
(5) Rows have the type of the model. A layer with a sliding window sees of them what it reaches, as
it does of a text.

Reduces to: the base model on each segment alone while nothing is written. A pool that holds the
layer inputs of N tokens behind a sink token gives the logits of the whole text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range, larger_than_a_segment
from memretrofit.modules.memory_tokens import sink_tokens
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.pool import LayerPool, PoolMemory, PoolSizes
from memretrofit.patching.segments import patch_segments

PAPER = "arXiv:2402.04624"
FAMILY = "tokens"
IDENTITY = "segment"


@dataclass(frozen=True, kw_only=True)
class MemoryLLMPoolConfig(MethodConfig):
    """How long a segment is, and how much of it stays."""

    segment_length: int = 512
    """Tokens read at a time. Each is read twice: once, and once more to be written."""
    num_memory_tokens: int = 64
    """K: the last tokens of a segment, whose hidden states are kept."""
    num_blocks: Annotated[int, Range(least=1)] = 8
    """N / K: the pool in writes. More remember longer, and every segment attends them all."""
    stored: Literal["input", "output"] = "input"
    """Whether a layer keeps what it read or, as published, what it gave out."""
    seed: Annotated[int, Range(least=0)] = 0
    """Of what is dropped."""

    def problems(self) -> list[str]:
        """What is kept are tokens of one segment."""
        return larger_than_a_segment(self.num_memory_tokens, self.segment_length)


MEMORYLLM_7B = MemoryLLMPoolConfig(num_memory_tokens=256, num_blocks=30, stored="output")
"""The pool of MemoryLLM-7B: 7,680 rows in each layer."""
MEMORYLLM_8B = MemoryLLMPoolConfig(num_memory_tokens=256, num_blocks=50, stored="output")
"""The pool of MemoryLLM-8B: 12,800 rows in each layer."""


def patch_memoryllm_pool(model: PreTrainedModel, config: MemoryLLMPoolConfig) -> None:
    """Let the model read in segments, each layer with a pool of its own.

    Raises:
        UnsupportedModelError, ConfigError, StateError: see `memretrofit.patch`.
    """
    sizes = PoolSizes(
        spans=(config.segment_length,),
        num_memory_tokens=config.num_memory_tokens,
        num_blocks=config.num_blocks,
    )

    def make_memory(spec: ModelSpec) -> PoolMemory:
        return PoolMemory(sizes, sink=sink_tokens(spec, 1), layer=spec.layers[0])

    def make_layer(spec: ModelSpec, layer: int, number: int) -> LayerPool:
        return LayerPool(
            sizes,
            hidden_size=spec.hidden_size,
            dtype=spec.dtype,
            stored=config.stored,
            seed=config.seed,
        )

    patch_segments(model, config, make_memory, make_layer)
