"""Engram: rows named by hashed n-grams are added early in the model, gated by context.

Cheng et al., 2026, arXiv:2601.07372; hash constants and the gate's root from the authors' demo.

Equations (one layer; h its input, before attention; e the rows that the n-grams ending at t name,
of all orders and heads, one behind the other; D values each)::

    e_t = table[ hash_nk(x_t, x_{t-1}, ...) ]                      see `ops.ngram`
    k_t = K e_t,   v_t = V e_t                                     K, V: [orders * heads * D, E]
    a_t = sigmoid( root( norm(h_t) . norm(k_t) / sqrt(E) ) )       root(s) = sign(s) sqrt|s|
    u_t = a_t v_t
    h_t <- h_t + u_t + silu( sum_j c_j * norm(u_{t - j N}) )       N the largest order

Tokens are compressed first: those that differ only in case, accents or surrounding space are one.
That needs the tokenizer, so it happens when the bank is prepared; before, every token is its own.

Where the new part is silent at the start is a choice. `projection` is the published form: rows at
random, V and c zero. Every n-gram then has a row, and what training makes of V speaks for all of
them. `rows`, ours and the default: the rows are zero and V is not. An n-gram without a row that was
opened or written adds nothing, so that text which shares no row with the training text is the base
model's, bit for bit.

Differs from the paper: (1) the backbone has one residual stream, so there is one gate. (2) Before
a row begins stands the model's own padding id; the demo's is a constant. An n-gram that meets
padding reads padding from there on. (3) The demo adds biases to K and V; here, as in the paper's
equations, there are none.

Reduces to: the base model at V = 0, or with no row written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.modules.engram import EngramRead, NgramBank
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.placement import early
from memretrofit.patching.ffn import patch_banks

PAPER = "arXiv:2601.07372"
FAMILY = "banks"
IDENTITY = "full"


@dataclass(frozen=True, kw_only=True)
class EngramConfig(MethodConfig):
    """Which n-grams have rows, how many, and how they are read."""

    ngram_orders: Annotated[tuple[int, ...], Range(least=1)] = (2, 3)
    """Lengths of the n-grams, ascending."""
    num_heads: Annotated[int, Range(least=1)] = 8
    """Rows that an n-gram of one length reads. More make it less likely that two share all."""
    table_size: Annotated[int, Range(least=2)] = 50_000
    """Rows of a head, at least: each has the next prime. Rows cost disk, not time."""
    value_dim: Annotated[int, Range(least=1)] = 32
    """Values in a row."""
    starts_at_zero: Literal["rows", "projection"] = "rows"
    """What is zero until it is trained: the rows, so that text without a trained row stays as it
    is, or the value projection, as published.
    """
    conv_width: Annotated[int, Range(least=0)] = 0
    """Tokens that the convolution spans, the largest n-gram apart; 0 for none. It carries what a
    row says on to tokens that do not read it.
    """
    layers_to_transform: tuple[int, ...] | None = None
    """Layers that read; None for the second and the middle one, as published."""
    seed: Annotated[int, Range(least=0)] = 0
    """Of the hash constants and of rows that start at random."""
    hot_bytes: int = 0
    """Bytes on the device for rows that were read last."""

    def problems(self) -> list[str]:
        """Orders name places in the hash."""
        orders = self.ngram_orders
        if orders and list(orders) == sorted(set(orders)):
            return []
        return [f"ngram_orders={orders}: list each length once, ascending, such as (2, 3)"]


ENGRAM_27B = EngramConfig(
    table_size=2_262_400, value_dim=80, starts_at_zero="projection", conv_width=4
)
"""The published form with the sizes of Engram-27B."""


def patch_engram(model: PreTrainedModel, config: EngramConfig) -> None:
    """Put a table of n-grams beside the model, and a read before the attention of some layers.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """
    orders, silent = config.ngram_orders, config.starts_at_zero == "projection"

    def make_bank(spec: ModelSpec) -> NgramBank:
        return NgramBank(
            layers=spec.layers,
            vocab_size=spec.vocab_size,
            ngram_orders=orders,
            num_heads=config.num_heads,
            table_size=config.table_size,
            value_dim=config.value_dim,
            std=1.0 if silent else 0.0,  # the demo's rows are those of a plain embedding
            seed=config.seed,
            hot_bytes=config.hot_bytes,
        )

    def make_read(spec: ModelSpec, layer: int, number: int) -> EngramRead:
        return EngramRead(
            number=number,
            row_width=len(orders) * config.num_heads * config.value_dim,
            hidden_size=spec.hidden_size,
            conv_width=config.conv_width,
            dilation=max(orders),
            silent=silent,
        )

    patch_banks(model, config, make_bank, make_read, place="layer", choose=early)
