"""Token lookup: every token of the vocabulary has a row with a part for each layer.

Jaiswal et al., 2026, arXiv:2602.00398 (MemoryLLM: FFNs of the embedding alone, kept as a table);
Gemma-3n's per-layer embeddings from its code in Transformers.

Equations (layer j; h the input of its FFN, x the token, D values in a part)::

    additive:  y_j = FFN_j(h) + T[x]_j                                         T: [vocabulary, L, E]
    gated:     p_j = ( norm(A_j e_x) + T[x]_j ) / sqrt(2)                      T: [vocabulary, L, D]
               y_j = FFN_j(h) + w_j * norm( B_j ( f(G_j h) * p_j ) )           f: that of the FFN

T is zero at the start, and w. In the additive form a token without a row that was opened or written
keeps the bits of the base model; in the gated form A gives every token a part.

Differs from the papers: (1) MemoryLLM puts its table in the place of the FFN, in models that were
trained so. Here the FFN stays, and the table may be trained, or hold what was computed elsewhere.
(2) Gemma-3n adds behind the layer and gates by what left the FFN; here by what enters it. The scale
of its table is part of the rows. (3) w begins at zero, there at one.

Reduces to: the base model at T = 0 (additive) or w = 0 (gated).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.modules.bank import BankRead
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.placement import uniform
from memretrofit.modules.token_rows import AddedRow, GatedRow, ProjectedTokenBank, TokenBank
from memretrofit.patching.ffn import patch_banks

PAPER = "arXiv:2602.00398"
FAMILY = "banks"
IDENTITY = "full"


@dataclass(frozen=True, kw_only=True)
class TokenLookupConfig(MethodConfig):
    """What a row holds, and how it is read."""

    form: Literal["additive", "gated"] = "additive"
    """Whether a part is added as it is, or the hidden state chooses from it."""
    value_dim: Annotated[int, Range(least=1)] = 256
    """Values in a part of `gated`. What is added as it is has as many as the hidden states."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers that read; None for all."""
    hot_bytes: int = 0
    """Bytes on the device for rows that were read last."""


GEMMA3N = TokenLookupConfig(form="gated", value_dim=256)
"""Per-layer embeddings with Gemma-3n's width."""


def patch_token_lookup(model: PreTrainedModel, config: TokenLookupConfig) -> None:
    """Put a table of tokens beside the model, and a read at each FFN.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    gated = config.form == "gated"

    def make_bank(spec: ModelSpec) -> TokenBank:
        sizes = {
            "vocab_size": spec.vocab_size,
            "layers": len(spec.layers),
            "value_dim": config.value_dim if gated else spec.hidden_size,
            "hot_bytes": config.hot_bytes,
        }
        return (
            ProjectedTokenBank(embedding=spec.embedding, **sizes) if gated else TokenBank(**sizes)
        )

    def make_read(spec: ModelSpec, layer: int, number: int) -> BankRead:
        if not gated:
            return AddedRow(number)
        return GatedRow(
            number=number,
            hidden_size=spec.hidden_size,
            value_dim=config.value_dim,
            activation=spec.activation,
        )

    patch_banks(model, config, make_bank, make_read, place="ffn", choose=uniform)
