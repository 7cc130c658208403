"""Hierarchical FFN memory: blocks of extra FFN rows on the path of a text in a tree of topics.

Pouransari et al., 2025, arXiv:2510.02375; its post-hoc form, beside a frozen model.

Equations (one token; tree of p levels with b_l children a node, block size r_l)::

    x_t    = embedding of the first min(t + 1, route_tokens) tokens of the row: `Router`
    n_1..p = greedy descent for x_t; none where x_t . c_(n_p) is not above the threshold
    U      = [W_1[n_1]; ...; W_p[n_p]]            3 x [R, E] in each layer, R = r_1 + ... + r_p
    ffn_t += (f(h_t U1^T) * (h_t U2^T)) U3        f: the model's own activation; U3 starts at 0

A token fetches 3 E layers sum r_l numbers of the bank's 3 E layers sum r_l b_1 ... b_l.

Differs from the paper: (1) Routes are causal: a token's route is that of what was read up to it,
and after `route_tokens` it is pinned for the rest of the conversation, so a text in one pass and
in any pieces is the same. There the whole document, or the question, is embedded at once: for
perplexity that looks ahead. (2) A text that belongs to nothing abstains: the original forward, bit
for bit. There the nearest leaf is always read, or a generic block: `generic_size`, which is read
by what would abstain. (3) The embedding is made from the model's own input embeddings and n-gram
counts, there by a sentence encoder. None is offered: a causal route needs the embedding of every
prefix, and the text of the tokens, which a bank does not have. (4) Rows start normal with deviation
E^-1/2, cut at two.

Reduces to: the base model where a text abstains, and wherever U3 = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.modules.hierarchical import HierarchicalBank, HierarchicalRead
from memretrofit.modules.model_spec import ModelSpec
from memretrofit.modules.placement import late_third, uniform
from memretrofit.patching.ffn import patch_banks

PAPER = "arXiv:2510.02375"
FAMILY = "banks"
IDENTITY = "full"


@dataclass(frozen=True, kw_only=True)
class HierarchicalFFNConfig(MethodConfig):
    """The tree, what each level holds, and where it is read."""

    branching: Annotated[tuple[int, ...], Range(least=1)] = (16,)
    """Children of a node at each level."""
    block_sizes: Annotated[tuple[int, ...], Range(least=0)] = (32,)
    """Rows of the FFN that a node of each level adds; 0 for none."""
    generic_size: Annotated[int, Range(least=0)] = 0
    """Rows of a block that is read by what belongs to nothing; 0: it abstains."""
    route_tokens: Annotated[int, Range(least=1)] = 24
    """First tokens of a conversation, by which it is routed."""
    placement: Literal["uniform", "late_third"] = "uniform"
    """Layers that read, unless `layers_to_transform` names them."""
    layers_to_transform: tuple[int, ...] | None = None
    """Layers that read; None for those of `placement`."""
    seed: Annotated[int, Range(least=0)] = 0
    """Of the rows at the start, and of the clustering."""
    hot_bytes: int = 0
    """Bytes on the device, for each level, of blocks that were read last."""

    def problems(self) -> list[str]:
        """One size for each level, and something to read."""
        if len(self.branching) != len(self.block_sizes) or not self.branching:
            return [
                f"block_sizes={self.block_sizes} and branching={self.branching}: give one of each "
                "for every level of the tree, at least one level"
            ]
        if not any(self.block_sizes):
            return [f"block_sizes={self.block_sizes}: at least one level needs rows"]
        return []


HIERARCHICAL_160M = HierarchicalFFNConfig(branching=(16, 16, 16, 16), block_sizes=(256, 64, 16, 0))
"""The published tree, with the blocks of the 160M model."""


def patch_hierarchical_ffn(model: PreTrainedModel, config: HierarchicalFFNConfig) -> None:
    """Put a tree of FFN blocks beside the model, and a read at the FFN of some layers.

    Raises:
        UnsupportedModelError, ConfigError, NoTargetError, StateError: see `memretrofit.patch`.
    """

    def make_bank(spec: ModelSpec) -> HierarchicalBank:
        return HierarchicalBank(
            embedding=spec.embedding,
            layers=len(spec.layers),
            branching=config.branching,
            block_sizes=config.block_sizes,
            generic_size=config.generic_size,
            route_tokens=config.route_tokens,
            seed=config.seed,
            hot_bytes=config.hot_bytes,
        )

    def make_read(spec: ModelSpec, layer: int, number: int) -> HierarchicalRead:
        return HierarchicalRead(number, spec.activation)

    choose = {"uniform": uniform, "late_third": late_third}[config.placement]
    patch_banks(model, config, make_bank, make_read, place="ffn", choose=choose)
