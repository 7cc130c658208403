"""A store and a compressed state behind one window.

The store is read first, under one softmax with the window. What the two give is what the state then
takes for the window: a memory that adds its read adds it to both, one that shares the window's
normaliser shares that of window and recalled tokens.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from memretrofit.modules.memory import Accesses, AttentionMemory, Block, State
from memretrofit.modules.recall import RecallMemory
from memretrofit.modules.store import Store
from memretrofit.modules.stored import refuse_training
from memretrofit.ops.attend import merge


class ComposedMemory(AttentionMemory):
    """Every token that leaves goes into both, the store of `recall` and the state of `state`."""

    key_space = "pre_rope"
    shares_softmax = True

    def __init__(self, recall: RecallMemory, state: AttentionMemory) -> None:
        super().__init__(
            sliding_window=recall.sliding_window, num_sink_tokens=recall.num_sink_tokens
        )
        self.recall, self.state = recall, state
        self.sink_positions = recall.sink_positions
        self.state_heads = state.state_heads
        # not a second child: the parameters have one name, under `state`
        vars(self)["write_features"] = state.write_features

    @property
    def state_space(self) -> str:
        """That of the state."""
        return self.state.state_space

    def longest(self, positions: int) -> int | None:
        """That of the store: the state holds no distances."""
        return self.recall.longest(positions)

    def initial_state(self, batch_size: int, like: Tensor) -> State:
        """The store, then what the state holds."""
        parts = (self.recall, self.state)
        store, compressed = (part.initial_state(batch_size, like) for part in parts)
        return store + compressed

    def state_nbytes(self, tokens: int = 0, itemsize: int = 4) -> int:
        """Bytes of one row's store and state."""
        return self.recall.state_nbytes(tokens, itemsize) + self.state.state_nbytes(tokens)

    def tier_nbytes(self, tokens: int = 0, itemsize: int = 4) -> dict[str, int]:
        """Those of the store, and the state on the device."""
        found = self.recall.tier_nbytes(tokens, itemsize)
        return found | {"device": found["device"] + self.state.state_nbytes(tokens)}

    def forward(self, block: Block, state: State) -> tuple[Tensor | None, State]:
        """Fold what leaves into both; read the store, then the state beside window and recalled."""
        refuse_training(self, self.recall.placement)
        store = self.recall.filled(block, state[:1])
        output, compressed = self.state(self._behind(block, store), state[1:])
        return output, (store, *compressed)

    def accesses(self, block: Block) -> Accesses:
        """Those of the state; the store's blocks are no slots."""
        return self.state.accesses(self._in_its_space(block))

    def calibrate(self, query: Tensor, key: Tensor, scaling: float) -> None:
        """The state starts from the model's statistics; the store has none to start from."""
        self.state.calibrate(query, key, scaling)

    def _behind(self, block: Block, store: Store) -> Block:
        """`block` as the state meets it: what is seen exactly is window and recalled tokens."""
        inner = self._in_its_space(block)
        if block.query is None or not store.block_count():
            return inner

        def attend() -> tuple[Tensor, Tensor]:
            return merge(*block.attend(), *self.recall.far(block, store))

        def local() -> Tensor:
            return attend()[0].transpose(1, 2).to(block.leaving_value.dtype)

        return replace(inner, local=local, attend=attend)

    def _in_its_space(self, block: Block) -> Block:
        if self.state.key_space == self.key_space:
            return block
        query, key = block.rotated()
        return replace(block, query=query, leaving_key=key)
