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

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.placement import centred_stride
from memretrofit.modules.product_key import (
    SHARED,
    GatedProductKeyRead,
    ProductKeyBank,
    SlotSizes,
)
from memretrofit.patching.ffn import patch_banks

PAPER = "arXiv:2412.09764"
FAMILY = "banks"
IDENTITY = "full"


@dataclass(frozen=True, kw_only=True)
class MemoryPlusConfig(SlotSizes, MethodConfig):
    """How many slots the layers share, and how many a token reads in each."""

    layers_to_transform: tuple[int, ...] | None = None
    """Layers that read; None for three, a third of the depth apart and centred."""


MILLION_SLOTS = MemoryPlusConfig(num_slots=1_048_576, key_dim=512)
"""The published sizes."""

SPARSE_WRITING = MemoryPlusConfig(starts_at_zero="rows")
"""For rows that are written a few at a time into a model that is otherwise frozen."""


def patch_memory_plus(model: PreTrainedModel, config: MemoryPlusConfig) -> None:
    """Put a pool of values beside the model, and keys and a gate beside some FFNs.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    def make_bank(spec: ModelSpec) -> ProductKeyBank:
        return ProductKeyBank(config, names=[SHARED], hidden_size=spec.hidden_size)

    def make_read(spec: ModelSpec, layer: int, number: int) -> GatedProductKeyRead:
        return GatedProductKeyRead(config, table=SHARED, hidden_size=spec.hidden_size)

    patch_banks(model, config, make_bank, make_read, place="ffn", choose=centred_stride)
