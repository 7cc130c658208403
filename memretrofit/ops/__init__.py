"""Pure functions of tensors: state rules, attention with its normaliser, window masks.

Every rule is called as `rule(q, k, v, g, beta, *, scale, initial_state) -> (o, final_state)`, with
the shapes of `memretrofit.ops.linear`. Row t of q may be another token than row t of k and v: the
caller decides who writes and who reads, and no rule knows about windows.
"""

from memretrofit.ops.attend import attend, merge
from memretrofit.ops.delta import chunk_delta, recurrent_delta
from memretrofit.ops.gated_delta import chunk_gated_delta, recurrent_gated_delta
from memretrofit.ops.kernels import chunk_rule
from memretrofit.ops.linear import chunk_linear, recurrent_linear
from memretrofit.ops.window import window_mask

RULES = {
    "gated_delta": (recurrent_gated_delta, chunk_gated_delta),
    "delta": (recurrent_delta, chunk_delta),
    "ssd": (recurrent_linear, chunk_linear),
}
"""Name of a state rule -> its definition, and the same in chunks."""

__all__ = [
    "RULES",
    "attend",
    "chunk_delta",
    "chunk_gated_delta",
    "chunk_linear",
    "chunk_rule",
    "merge",
    "recurrent_delta",
    "recurrent_gated_delta",
    "recurrent_linear",
    "window_mask",
]
