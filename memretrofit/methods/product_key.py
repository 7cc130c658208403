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

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.placement import middle
from memretrofit.modules.product_key import (
    ProductKeyBank,
    ProductKeyRead,
    SlotSizes,
    own_table,
)
from memretrofit.patching.ffn import patch_banks

PAPER = "arXiv:1907.05242"
FAMILY = "banks"
IDENTITY = "full"


@dataclass(frozen=True, kw_only=True)
class ProductKeyConfig(SlotSizes, MethodConfig):
    """How many slots each layer has, and how many a token reads."""

    layers_to_transform: tuple[int, ...] | None = None
    """Layers that read, each with values of its own; None for the middle one."""


LARGE_MEMORY_LAYER = ProductKeyConfig(num_slots=262_144, key_dim=512)
"""The published sizes."""

ABSTAINING = ProductKeyConfig(null_slot=True)
"""A token may read nothing."""


def patch_product_key(model: PreTrainedModel, config: ProductKeyConfig) -> None:
    """Put values beside the model, and keys beside some FFNs.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    def make_bank(spec: ModelSpec) -> ProductKeyBank:
        names = [own_table(layer) for layer in spec.layers]
        return ProductKeyBank(config, names=names, hidden_size=spec.hidden_size)

    def make_read(spec: ModelSpec, layer: int, number: int) -> ProductKeyRead:
        return ProductKeyRead(config, table=own_table(layer), hidden_size=spec.hidden_size)

    patch_banks(model, config, make_bank, make_read, place="ffn", choose=middle)
