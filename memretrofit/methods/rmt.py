"""RMT: memory tokens in front of a segment are read, the same behind it are written.

Bulatov et al., 2022, arXiv:2207.06881; 2023, arXiv:2304.11062; the write slots from the authors'
code.

Equations (segment s of T tokens; E(x_s) their embeddings [T, E]; m_0 learned rows)::

    Y_s = decoder([ sink ; m_{s-1} ; E(x_s) ; m_{s-1} ])      [N + M + T + M, E]
    w_s = Y_s[-M:]                                            after the decoder's norm
    m_s = w_s                                                 carry="raw", the published form
    m_s = m_0 + g w_s |E| / |w_s|                             carry="added", ours and the default
    logits of segment s = head(Y_s[N + M : N + M + T])

Positions begin at 0 in each segment. The last token of a segment predicts the first of the next.

retention="accumulate" is AutoCompressors (Chevalier et al., 2023, arXiv:2305.14788; code of the
authors): M summary rows c of their own are behind each segment, and every segment reads the
vectors of all those before it, as far as `queue_length` goes::

    Y_s = decoder([ sink ; m_1 ; ... ; m_{s-1} ; E(x_s) ; c ])      c for m_0 with carry="added"

Differs from the papers: (1) N = 1 sink, the model's own token that begins a text, stands in front.
Without it attention rests on the memory, which then cannot be changed without harm. (2) Hidden
states are many times longer than embeddings, and a pretrained model that reads ten of them is
harmed still. They are rescaled by the mean norm |E| of embeddings and a trained g, small at first,
and added to rows that it reads without harm. `RMT_PUBLISHED` has neither change. (3)
AutoCompressors' queue has an end here, their rows begin near the sink's and not exactly there, and
each closed segment writes, the last one of a text too.

Reduces to: the base model on each segment alone with neither memory nor sink; a prompt of
trained rows in front of each segment at g = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range, larger_than_a_segment
from memretrofit.modules.memory_tokens import (
    STARTS,
    MemoryTokens,
    Start,
    carry_of,
    sink_tokens,
)
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.segment_memory import SegmentMemory
from memretrofit.modules.summary_queue import SummaryVectors
from memretrofit.patching.segments import patch_segments

PAPER = "arXiv:2207.06881"
FAMILY = "tokens"
IDENTITY = "none"
"""What is in front of a segment changes it; `segment` holds for no number of memory tokens."""


@dataclass(frozen=True, kw_only=True)
class RMTConfig(MethodConfig):
    """How long a segment is, and what is carried from one to the next."""

    segment_length: int = 512
    """Tokens that are read together."""
    num_memory_tokens: int = 10
    """Vectors that a segment writes."""
    num_sink_tokens: int = 1
    """Copies of the model's first token in front of each segment."""
    retention: Literal["replace", "accumulate"] = "replace"
    """Whether a segment reads what the last one wrote, or what all of them did."""
    queue_length: Annotated[int, Range(least=1)] = 500
    """With "accumulate": vectors that are read at most; the oldest go."""
    starts_from: Start = "random"
    """Where the trained rows begin: at random, with the spread of embeddings, or near the model's
    first token. Of that token a row of copies harms more.
    """
    carry: Literal["added", "raw", "rescaled"] = "added"
    """How what was written is read: added to the trained rows, as it is (published), or with the
    norm of embeddings.
    """

    def problems(self) -> list[str]:
        """A memory larger than what it is to hold, or a queue too short for one segment."""
        count = self.num_memory_tokens
        found = larger_than_a_segment(count, self.segment_length)
        if self.retention == "accumulate" and count > self.queue_length:
            found.append(
                f"queue_length={self.queue_length}: below the {count} vectors that one segment "
                "writes; raise it, best to a multiple of them"
            )
        return found


RMT_PUBLISHED = RMTConfig(num_sink_tokens=0, carry="raw")
"""The published form with the sizes of the BABILong runs. It harms a pretrained model at first."""
AUTOCOMPRESSOR = RMTConfig(
    segment_length=1536,
    num_memory_tokens=50,
    retention="accumulate",
    starts_from="sink",
    carry="raw",
)
"""AutoCompressors: fifty summary vectors of each segment, all of them read as they are."""


def patch_rmt(model: PreTrainedModel, config: RMTConfig) -> None:
    """Let the model read in segments, and carry memory tokens from one to the next.

    Raises:
        UnsupportedModelError, ConfigError, StateError: see `memretrofit.patch`.
    """
    patch_segments(model, config, lambda spec: MEMORIES[config.retention](spec, config))


def _replaced(spec: ModelSpec, config: RMTConfig) -> MemoryTokens:
    return MemoryTokens(
        segment_length=config.segment_length,
        sinks=sink_tokens(spec, config.num_sink_tokens),
        first=STARTS[config.starts_from](spec, config.num_memory_tokens),
        carry=carry_of(spec, config.carry),
    )


def _accumulated(spec: ModelSpec, config: RMTConfig) -> SummaryVectors:
    return SummaryVectors(
        segment_length=config.segment_length,
        sinks=sink_tokens(spec, config.num_sink_tokens),
        rows=STARTS[config.starts_from](spec, config.num_memory_tokens),
        queue_length=config.queue_length,
        carry=carry_of(spec, config.carry),
    )


MEMORIES: dict[str, Callable[[ModelSpec, RMTConfig], SegmentMemory]] = {
    "replace": _replaced,
    "accumulate": _accumulated,
}
