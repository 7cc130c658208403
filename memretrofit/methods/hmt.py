"""HMT: one memory is recalled from a queue by a summary of the segment's first half.

He et al., 2024, arXiv:2405.06067; code of the authors.

Equations (segment s of T tokens in two spans of h and T - h; q_0 = 0; Q holds the memories of the
last N segments; S sensory tokens are those just before the segment; the model's own token in front
as a sink)::

    r(q) = softmax( (W_q q) (W_k Q)^T / sqrt(K) ) Q        [E]; a learned row while Q is empty
    q_s  = decoder([ sink ; r(q_{s-1}) ; sensory ; x_s[:h] ; t ])[-1]           t a learned row
    Y_s  = decoder([ sink ; r(q_s) ; sensory ; x_s[:h] ; x_s[h:] ; r(q_s) ])
    Q    <- the last N of [ Q ; Y_s[-1] ]

Tokens of the first half are answered by the first forward, the others by the second.

Differs from the paper: (1) There the second forward answers the whole segment, with a memory in
front that was recalled by a summary of its first half: a token's output depends on tokens after it,
up to h. Here the first half is answered before it is summed up, and reads what the summary of the
segment before recalls. (2) So the forward that sums up has memory and sensory tokens in front, not
t; t is behind only. (3) A sink is in front. (4) Scores are divided by sqrt(K) always; the code
divides by K in training where both widths are 4096 or more, and by its root when it generates.

Reduces to: `rmt` with one memory token and carry="raw" where N = 1, S = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.modules.memory_tokens import STARTS, sink_tokens
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.summary_queue import QueueRecall, RecalledSummaries
from memretrofit.patching.segments import patch_segments

PAPER = "arXiv:2405.06067"
FAMILY = "tokens"
IDENTITY = "none"
"""What is in front of a segment changes it."""


@dataclass(frozen=True, kw_only=True)
class HMTConfig(MethodConfig):
    """How long a segment is, and what is carried from one to the next."""

    segment_length: Annotated[int, Range(least=2)] = 256
    """Tokens of a segment."""
    num_sink_tokens: int = 1
    """Copies of the model's first token in front of each forward."""
    summary_fraction: Annotated[float, Range(above=0, most=1)] = 0.5
    """Share of a segment that is summed up and read again: 0.5 costs half a forward more."""
    num_sensory_tokens: Annotated[int, Range(least=0)] = 32
    """Tokens just before a segment that are read again in front of it."""
    queue_length: Annotated[int, Range(least=1)] = 100
    """Memories that can be recalled, one of each segment; the oldest go."""
    key_dim: Annotated[int, Range(least=1)] = 1536
    """Width in which a summary and the memories meet."""

    @property
    def spans(self) -> tuple[int, int]:
        """Tokens that are summed up, and the others; at least one of each."""
        first = round(self.summary_fraction * self.segment_length)
        first = min(max(first, 1), self.segment_length - 1)
        return first, self.segment_length - first


HMT_SMOLLM = HMTConfig(segment_length=1024)
"""Sizes of the released SmolLM-135M checkpoints."""


def patch_hmt(model: PreTrainedModel, config: HMTConfig) -> None:
    """Let the model read in segments, with a memory recalled for each from those before it.

    Raises:
        UnsupportedModelError, ConfigError, StateError: see `memretrofit.patch`.
    """

    def make_memory(spec: ModelSpec) -> RecalledSummaries:
        return RecalledSummaries(
            spans=config.spans,
            num_sensory_tokens=config.num_sensory_tokens,
            queue_length=config.queue_length,
            sinks=sink_tokens(spec, config.num_sink_tokens),
            first=STARTS["random"](spec, 1),
            summary=STARTS["random"](spec, 1),
            recall=QueueRecall(spec.hidden_size, config.key_dim),
        )

    patch_segments(model, config, make_memory)
