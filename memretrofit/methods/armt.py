"""ARMT: every layer writes what trails a segment into a matrix, and the next segment reads it.

Rodkin et al., 2024, arXiv:2407.04841; sizes and the value projection's start from the authors'
code.

Equations (one layer; state A [D, E], z [D], zero at first; h its input at the T tokens of a segment
and the M write tokens behind them; phi = DPFP with nu shifts, D = 2 nu d)::

    h    <- h + A^T phi(W_q h) / (z . phi(W_q h) + eps)             W_q [d, E]; all columns
    m     = layer(h) at the M write tokens                          [M, E]
    k, v  = phi(W_k m), W_v m;   beta = sigmoid(w_b . m + b)        [M, D], [M, E], [M]
    v'    = A^T k / (z . k + eps)                                   what the key recalls by now
    A    <- A + sum over M of beta k (v - v')^T                     W_v starts at zero
    z    <- z + sum over M of clip(1 - z . k / (|k|^2 + eps), 0, 1) k

The M keys of a segment all meet the state before it. Write tokens are the same behind every segment
and change nothing in front of them. 2 E d + E^2 + E + 1 parameters and 4 D (E + 1) bytes of a
row's state in each layer, at any length.

Differs from the paper: (1) State and reads are float32 in any model. (2) Positions simply go on
behind the segment; the authors give write tokens rows of their own in GPT-2's table. (3) A segment
that fills up while generating is written, and the next begins; the authors' generation stays in the
last one.

Reduces to: the base model on each segment alone, bit for bit, while W_v is zero or nothing is
written. Where experts share the columns of a forward, the last bits differ: they add up trailing
tokens with the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range, larger_than_a_segment
from memretrofit.modules.associative import AssociativeLayer, WriteTokens
from memretrofit.modules.memory_tokens import STARTS, Start
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.patching.segments import patch_segments

PAPER = "arXiv:2407.04841"
FAMILY = "tokens"
IDENTITY = "segment"


@dataclass(frozen=True, kw_only=True)
class ARMTConfig(MethodConfig):
    """How long a segment is, and how large the matrix that it is written into."""

    segment_length: int = 512
    """Tokens that are read together."""
    num_memory_tokens: int = 10
    """M: write tokens behind a segment; at most so many things of one segment get keys."""
    memory_dim: Annotated[int, Range(least=2)] = 64
    """d: width of keys and queries before their feature map."""
    num_shifts: Annotated[int, Range(least=1)] = 3
    """nu of the feature map: the matrix has 2 nu d rows. More keep more keys apart."""
    starts_from: Start = "random"
    """Where the write tokens begin: at random, as published, or near the model's first token. What
    trails a segment disturbs nothing, and small models learned faster from rows that differ.
    """
    layers_to_transform: tuple[int, ...] | None = None
    """Layers with a matrix; None for all."""

    def problems(self) -> list[str]:
        """More write tokens than there is to write, or features that repeat."""
        found = larger_than_a_segment(self.num_memory_tokens, self.segment_length)
        if self.num_shifts >= self.memory_dim:
            found.append(
                f"num_shifts={self.num_shifts}: from memory_dim={self.memory_dim} on, features are "
                "zero or repeat; use fewer shifts, or raise memory_dim"
            )
        return found


ARMT_BABILONG = ARMTConfig()
"""The GPT-2 of the BABILong runs, trained on 2 to 32 segments."""
ARMT_WIKITEXT = ARMTConfig(segment_length=128, num_memory_tokens=16, memory_dim=96)
"""The language models on WikiText-103."""
ARMT_RETRIEVAL = ARMTConfig(segment_length=6, num_memory_tokens=4)
"""The 4-layer GPT-NeoX of associative retrieval: a segment is one pair with a key of 3 tokens."""


def patch_armt(model: PreTrainedModel, config: ARMTConfig) -> None:
    """Let the model read in segments, each layer with a matrix that is carried on.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    def make_memory(spec: ModelSpec) -> WriteTokens:
        rows = STARTS[config.starts_from](spec, config.num_memory_tokens)
        return WriteTokens(segment_length=config.segment_length, rows=rows)

    def make_layer(spec: ModelSpec, layer: int, number: int) -> AssociativeLayer:
        return AssociativeLayer(
            hidden_size=spec.hidden_size,
            memory_dim=config.memory_dim,
            num_shifts=config.num_shifts,
        )

    patch_segments(model, config, make_memory, make_layer)
