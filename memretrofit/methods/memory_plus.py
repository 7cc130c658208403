"""Memory+: product keys in a few layers that share one pool of values, with a gate by the input.

Berges et al., 2024, arXiv:2412.09764. What writes a few rows of it: Lin et al., 2025,
arXiv:2510.15103 (`memretrofit.training.sparse_rows`).

Equations (one layer; x [E] the input of its FFN; y [D] as in `product_key`, with keys and queries
of this layer and the values V of all)::

    FFN(x) <- FFN(x) + W2 ( y * silu(W1 x + b1) ) + b2

W2 = 0 and b2 = 0 at the start, and V random; or, with starts_at_zero="rows", V = 0 and W2 random:
then values can learn while all else is frozen, and a token none of whose slots was opened or
written keeps its bits, b2 included. `null_slot` as in `product_key`.

Differs from the paper: (1) beside the FFN; there in its place, which a pretrained model would have
to recover from. (2) A LayerNorm on the query, for which the paper says "when needed". (3) The
gradient of the pool is sparse: the released one is dense, so that Adam moves values that were not
read.

Reduces to: the base model at W2 = 0, b2 = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.placement import centred_stride
from memretrofit.modules.product_key import (
    SHARED,
    GatedProductKeyRead,
    ProductKeyBank,
    ProductKeys,
    slot_faults,
)
from memretrofit.patching.ffn import patch_banks

PAPER = "arXiv:2412.09764"
FAMILY = "banks"
IDENTITY = "full"


@dataclass(frozen=True, kw_only=True)
class MemoryPlusConfig(MethodConfig):
    """How many slots the layers share, and how many a token reads in each."""

    num_slots: Annotated[int, Range(least=1)] = 65_536
    """Values of all layers together; the square of the keys in a half."""
    num_heads: Annotated[int, Range(least=1)] = 4
    """Queries of a token in a layer; each chooses for itself."""
    key_dim: Annotated[int, Range(least=2)] = 256
    """K of each head, both halves together."""
    top_k: int = 32
    """Slots that a head reads; at most the keys in a half."""
    value_dim: Annotated[int | None, Range(least=1)] = None
    """D; None for the width of the model, which served best at equal parameters."""
    null_slot: bool = False
    """Whether a head may read less than top_k slots, or none."""
    starts_at_zero: Literal["rows", "projection"] = "projection"
    """What is zero until it is trained: the values, or the map W2."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers that read; None for three, a third of the depth apart and centred."""
    seed: Annotated[int, Range(least=0)] = 0
    """Of values that start at random."""
    hot_bytes: int = 0
    """Bytes on the device of values that were read last, if they lie elsewhere."""

    def problems(self) -> list[str]:
        """Slots are pairs of half keys."""
        return slot_faults(self.num_slots, self.key_dim, self.top_k)


MILLION_SLOTS = MemoryPlusConfig(num_slots=1_048_576, key_dim=512)
"""The published sizes."""

SPARSE_WRITING = MemoryPlusConfig(starts_at_zero="rows")
"""For rows that are written a few at a time into a model that is otherwise frozen."""


def patch_memory_plus(model: PreTrainedModel, config: MemoryPlusConfig) -> None:
    """Put a pool of values beside the model, and keys and a gate beside some FFNs.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """
    silent = config.starts_at_zero == "projection"

    def make_bank(spec: ModelSpec) -> ProductKeyBank:
        value_dim = config.value_dim or spec.hidden_size
        return ProductKeyBank(
            names=[SHARED],
            num_slots=config.num_slots,
            value_dim=value_dim,
            std=value_dim**-0.5 if silent else 0.0,
            seed=config.seed,
            hot_bytes=config.hot_bytes,
        )

    def make_read(spec: ModelSpec, layer: int, number: int) -> GatedProductKeyRead:
        keys = ProductKeys(
            hidden_size=spec.hidden_size,
            num_slots=config.num_slots,
            num_heads=config.num_heads,
            key_dim=config.key_dim,
            top_k=config.top_k,
            null_slot=config.null_slot,
        )
        return GatedProductKeyRead(
            keys=keys,
            table=SHARED,
            hidden_size=spec.hidden_size,
            value_dim=config.value_dim or spec.hidden_size,
            silent=silent,
        )

    patch_banks(model, config, make_bank, make_read, place="ffn", choose=centred_stride)
