"""What an attention memory is: the contract between a method's parameters and the attention seam.

The seam cuts the new tokens into blocks of queries. For each block it offers exact attention over
the sinks and the window, and the tokens that leave the window: row t of `leaving_*` is the token
that leaves when query t arrives. The memory folds them into its state, reads, and returns the
attention output. Letters: see `memretrofit.__doc__`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memretrofit.errors import UnsupportedModelError

if TYPE_CHECKING:
    from memretrofit.modules.store import Store

State = tuple["Tensor | Store", ...]
"""Tensors with the batch first, at least float32, and stores. They live in the cache, never on a
module.
"""


def with_rows(state: State, function: Callable[[Tensor], Tensor]) -> State:
    """`state` with `function`, which reorders or repeats rows, applied to all that it holds."""
    return tuple(function(x) if isinstance(x, Tensor) else x.apply(function) for x in state)


def widened(x: Tensor) -> Tensor:
    """At least float32: what is summed over a whole text is not kept in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class Block:
    """C consecutive queries, what they see exactly, and what leaves the window as they arrive."""

    query: Tensor | None
    """[B, H, C, K] in the memory's key space; None when tokens are only folded, not read."""
    hidden: Tensor | None
    """[B, C, E] input of the attention module at the queries."""
    local: Callable[[], Tensor]
    """The base model's own attention over sinks and window: [B, C, H, V]."""
    attend: Callable[[], tuple[Tensor, Tensor]]
    """The same with its log-sum-exp: [B, H, C, V], [B, H, C]; for memories that share one softmax
    with the window.
    """
    attend_to: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """The model's softmax (its scale and soft cap) over other tokens: queries [B, H, C, K], keys
    [B, G, S, K], values [B, G, S, V] and visible [B | 1, 1 | H, C, S], as `ops.attend.attend`.
    """
    scores: Callable[[Tensor, Tensor], Tensor]
    """The logits of that softmax: queries [B, H, C, K] and keys [B, G, S, K] to [B, H, C, S], at
    least float32.
    """
    leaving_key: Tensor
    """[B, G, C, K] in the memory's key space."""
    rotated: Callable[[], tuple[Tensor | None, Tensor]]
    """`query` and `leaving_key` after the rotary embedding, as the model made them, whatever the
    memory's key space; for a part of a memory that takes keys in another space than the rest.
    """
    leaving_value: Tensor
    """[B, G, C, V]."""
    leaving_features: Tensor | None
    """[B, C, F] what `write_features` said about the leaving tokens when they arrived."""
    writes: Tensor
    """[B | 1, C] bool: whether a token really leaves here (not a sink, not padding, not before
    the first token).
    """
    query_slots: Tensor
    """[C] place of each query in its (padded) row."""
    leaving_slots: Tensor
    """[C] the same for the leaving tokens; below 0 where nothing leaves."""
    rotate: Callable[[Tensor, Tensor], Tensor]
    """The model's own rotary embedding, at positions of the memory's choice: x [B, h, T, K] not
    rotated, positions [B | 1, T]. Only for memories in the `pre_rope` key space.
    """
    leaving_places: Tensor | None = None
    """[B, C] place of each leaving token in its event, 0 where one begins (`ops.segment.places`);
    only where the text is read in pieces (`patching.pieces`).
    """


class Accesses(NamedTuple):
    """How the writes and reads of one block spread over the slots of each head's state.

    What a slot is, is the memory's to say; of a state S [K, V] it is one key dimension, a row of S.
    """

    writes: Tensor
    """[B, state heads, C, slots]; a token's sum is the strength of its write, 0 where nothing is
    written.
    """
    reads: Tensor | None
    """[B, H, C, slots]; a query's sum is 1, or 0 where it has no direction. None: nothing reads."""


def energy(x: Tensor) -> Tensor:
    """Squares of x [..., K] as shares of their sum: how an access under x spreads over a state
    S [K, V]. Zeros stay zeros.
    """
    return F.normalize(widened(x), dim=-1, eps=1e-30).square()


class AttentionMemory(nn.Module):
    """Sinks and window alone; subclasses add a state.

    Parameters are read only inside `forward` of the module that owns them, so that offloading and
    sharding can move them.
    """

    write_features: nn.Module | None
    """Maps hidden states [B, T, E] to [B, T, F], kept in the cache beside each token until the
    token leaves.
    """
    key_space: str = "post_rope"
    """Whether queries and leaving keys are taken after (`post_rope`) or before (`pre_rope`) the
    rotary embedding.
    """
    shares_softmax: bool = False
    """Whether the read enters the window's normaliser (`Block.attend`), not its output."""
    observes_queries: bool = False
    """Whether the state depends on the queries, so that it must meet each of them, in order: then
    `Block.query` is there in every block (post_rope), and what the read returns may be discarded.
    """
    traceable: bool
    """Whether `torch.compile` can trace a step of one token: `forward` reads tensors and numbers
    alone, and its shapes do not depend on what the tensors hold. A subclass that is says so.
    """
    sink_positions: str = "absolute"
    """Where sinks stand for the rotary embedding: `absolute`, or by `slot` in the cache
    (StreamingLLM).
    """

    state_heads: int
    """Heads that hold a state; set by memories that have one."""
    growing: Mapping[int, int] = MappingProxyType({})
    """Of each tensor of a packed state that is as long as the text makes it, its place in the
    state: the axis that grows.
    """

    def __init__(self, *, sliding_window: int, num_sink_tokens: int) -> None:
        super().__init__()
        self.traceable = type(self) is AttentionMemory
        self.write_features = None
        self.sliding_window = sliding_window
        self.num_sink_tokens = num_sink_tokens

    @property
    def state_space(self) -> str:
        """The key space of the queries and keys that `calibrate` is given."""
        return self.key_space

    def longest(self, positions: int) -> int | None:
        """Tokens of the longest text in which no query of this layer stands further from what it
        attends than `positions`; None for any text.
        """
        return None if self.sink_positions == "slot" else positions

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """The empty state for `batch_size` rows, on the device of `like`."""
        return ()

    def packed(self, state: State) -> State:
        """`state` without the room in which it holds nothing yet: what a file keeps."""
        return state

    def unpacked(self, state: State) -> State:
        """A state that goes on as the one that `packed` was given.

        Raises:
            StateError: its sizes or numbers contradict each other.
        """
        return state

    def per_state_head(self, x: Tensor) -> Tensor:
        """Keys or values [B, G, ...] for the heads that hold a state: [B, state heads, ...]."""
        repeats = self.state_heads // x.shape[1]
        return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's state after so many tokens have left the window; `itemsize` is that
        of keys and values, for memories that hold these as they are.
        """
        return 0

    def tier_nbytes(self, tokens: int = 0, itemsize: int = 4) -> dict[str, int]:
        """`state_nbytes` by where they lie: `device`, and `host` or `disk` where a store does."""
        return {"device": self.state_nbytes(tokens, itemsize)}

    def accesses(self, block: Block) -> Accesses:
        """How `block` writes and reads the slots of the state; for measurements alone.

        Raises:
            UnsupportedModelError: the memory does not say how its slots are addressed.
        """
        raise UnsupportedModelError(
            f"{type(self).__name__} does not say how its slots are addressed: it has no `accesses`"
        )

    def calibrate(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """Set what should start from the model's own statistics; called once before training.

        Queries [B, H, T, K] and keys [B, G, T, K] in `state_space`, and the factor on their scores.
        A memory that starts the same for every model leaves this as it is.
        """

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Fold what leaves and read: the attention output [B, C, H, V] and the new state."""
        return (None if block.query is None else block.local()), state
