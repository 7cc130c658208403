"""Product-key memory: beside one FFN, each token reads the few of many slots that its keys choose.

Lample et al., 2019, arXiv:1907.05242; beside the FFN of a pretrained model, not in its place: Kim
and Jung, 2020, arXiv:2010.03881.

Equations (one layer; x [E] the input of its FFN, n² slots with a value V_s [D] each; head i has
the keys A_i, B_i [n, K/2])::

    q_i   = LayerNorm(Q_i x + b_i), in two halves q_i' and q_i''                        [K]
    c_i,s = A_i,a . q_i' + B_i,b . q_i''                   of slot s = a n + b
    S_i   = top_k slots by c_i,s: exact, of equal ones the lower slot
    y     = sum_i sum_{s in S_i} softmax(c_i over S_i)_s V_s                            [D]
    FFN(x) <- FFN(x) + O y                                                              [E]

`null_slot=True` gives each head one more slot, with a learned score and no value: it takes its
share of the softmax, and what scores below it is not read. A token that reads nothing keeps its
bits. O = 0 at the start, and V random; or, with starts_at_zero="rows", V = 0 and O random: then a
token none of whose slots was opened or written keeps its bits too, and values alone can learn,
which writing a few rows needs (`memretrofit.training.sparse_rows`).

Differs from the paper: (1) a LayerNorm on the query of each head; there a BatchNorm over the tokens
of a batch, which sees later tokens and padding. (2) The map O: there V has the width of the model.
(3) The null slot is ours, after softmax sinks.

Reduces to: the base model at O = 0; `memory_plus` without its gate, for one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.placement import middle
from memretrofit.modules.product_key import (
    ProductKeyBank,
    ProductKeyRead,
    ProductKeys,
    own_table,
    slot_faults,
)
from memretrofit.patching.ffn import patch_banks

PAPER = "arXiv:1907.05242"
FAMILY = "banks"
IDENTITY = "full"


@dataclass(frozen=True, kw_only=True)
class ProductKeyConfig(MethodConfig):
    """How many slots there are, and how many a token reads."""

    num_slots: Annotated[int, Range(least=1)] = 65_536
    """Values of each layer; the square of the keys in a half."""
    num_heads: Annotated[int, Range(least=1)] = 4
    """Queries of a token; each chooses for itself, and all read the same values."""
    key_dim: Annotated[int, Range(least=2)] = 256
    """K of each head, both halves together."""
    top_k: int = 32
    """Slots that a head reads; at most the keys in a half."""
    value_dim: Annotated[int | None, Range(least=1)] = None
    """D; None for the width of the model."""
    null_slot: bool = False
    """Whether a head may read less than top_k slots, or none."""
    starts_at_zero: Literal["rows", "projection"] = "projection"
    """What is zero until it is trained: the values, or the map O."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers that read, each with values of its own; None for the middle one."""
    seed: Annotated[int, Range(least=0)] = 0
    """Of values that start at random."""
    hot_bytes: int = 0
    """Bytes on the device, for each layer, of values that were read last, if they lie elsewhere."""

    def problems(self) -> list[str]:
        """Slots are pairs of half keys."""
        return slot_faults(self.num_slots, self.key_dim, self.top_k)


LARGE_MEMORY_LAYER = ProductKeyConfig(num_slots=262_144, key_dim=512)
"""The published sizes."""

ABSTAINING = ProductKeyConfig(null_slot=True)
"""A token may read nothing."""


def patch_product_key(model: PreTrainedModel, config: ProductKeyConfig) -> None:
    """Put values beside the model, and keys beside some FFNs.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """
    silent = config.starts_at_zero == "projection"

    def make_bank(spec: ModelSpec) -> ProductKeyBank:
        value_dim = config.value_dim or spec.hidden_size
        return ProductKeyBank(
            names=[own_table(layer) for layer in spec.layers],
            num_slots=config.num_slots,
            value_dim=value_dim,
            std=value_dim**-0.5 if silent else 0.0,
            seed=config.seed,
            hot_bytes=config.hot_bytes,
        )

    def make_read(spec: ModelSpec, layer: int, number: int) -> ProductKeyRead:
        keys = ProductKeys(
            hidden_size=spec.hidden_size,
            num_slots=config.num_slots,
            num_heads=config.num_heads,
            key_dim=config.key_dim,
            top_k=config.top_k,
            null_slot=config.null_slot,
        )
        return ProductKeyRead(
            keys=keys,
            table=own_table(layer),
            hidden_size=spec.hidden_size,
            value_dim=config.value_dim or spec.hidden_size,
            silent=silent,
        )

    patch_banks(model, config, make_bank, make_read, place="ffn", choose=middle)
