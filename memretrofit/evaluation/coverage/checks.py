"""What a tiny model is asked, patched or not, and how far apart two answers are."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from memretrofit.evaluation.coverage.tiny import tokens
from memretrofit.patching.controls import ATTRIBUTE
from memretrofit.retrofit import memory_parameters

LENGTH = 24
CUTS = (9, 10, 17, 22, 23)
"""Where the pieces of a text end; two of one token, and one that begins behind window and sinks."""
STEPS = (12, *range(13, LENGTH))
"""The same for models that go on with single tokens only: some recurrent layers begin anew with a
longer piece.
"""
SHORT = 15
"""Tokens of the row that is padded."""

REORDERED = 2e-4
"""The same sums in another order, in standard deviations of the base model's logits."""
WRONG = 5e-3
"""What a change that is meant changes at the least."""
AMPLIFIED = 20
"""A model that moves its own logits by more than `REORDERED` when its sums are reordered may move
this many times as much when a memory's are."""


class Fault(Exception):
    """A promise that a patched model does not keep."""


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference between two logits [B, T, vocabulary], in units of their spread."""
    if a.shape != b.shape:
        raise Fault(f"logits of shape {list(a.shape)}, expected {list(b.shape)}")
    known = b.abs() < 1e4  # some models put a constant where a token must not be chosen
    if not torch.equal(known, a.abs() < 1e4):
        return float("inf")
    spread = b[known].std().item()
    return (a[known] - b[known]).abs().max().item() / spread


@dataclass(eq=False)
class Subject:
    """One tiny model, and what it answered before anything was done to it."""

    model: PreTrainedModel
    cuts: Sequence[int] = field(init=False)
    """Pieces that the base model reads as one pass."""
    split: float = field(init=False)
    """How far pieces are from one pass."""
    padded: float = field(init=False)
    """How far a left padded row is from that row alone."""
    speaks: bool = field(init=False)
    """Whether `generate` says what one pass says."""

    def __post_init__(self) -> None:
        """Run the model once.

        Raises:
            Fault: it does not run on token ids, or its logits are not numbers.
        """
        self.ids = tokens(2, LENGTH)
        parameters = inspect.signature(self.model.forward).parameters
        self.takes = {n for n in ("attention_mask", "position_ids") if n in parameters}
        self.weights = {name: x.clone() for name, x in self.model.state_dict().items()}
        try:
            self.base = self.one_pass(self.ids)
        except Exception as error:
            raise Fault(f"does not run: {type(error).__name__}: {error}") from error
        self.modules = dict(self.model.named_modules())  # some models choose theirs in a forward
        if not bool(self.base.isfinite().any()) or bool(self.base.isnan().any()):
            raise Fault("its logits are not numbers")
        # what the base model itself does not keep cannot be asked of a patched one
        for self.cuts in (CUTS, STEPS):
            self.split = _difference(lambda: apart(self.in_pieces(self.ids), self.base))
            if self.split < WRONG:
                break
        self.padded = _difference(self.padding_error)
        self.speaks = self._speaks()

    @torch.no_grad()
    def one_pass(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocabulary] of one forward without a cache."""
        return self.model(ids, use_cache=False, **self._padding(mask, 0, ids.shape[1])).logits

    @torch.no_grad()
    def in_pieces(
        self, ids: Tensor, ends: Sequence[int] | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The same of forwards over one piece after another, on one cache."""
        ends = self.cuts if ends is None else ends
        logits, begin, cache = [], 0, None
        for end in (*(end for end in ends if end < ids.shape[1]), ids.shape[1]):
            output = self.model(
                ids[:, begin:end],
                past_key_values=cache,
                use_cache=True,
                **self._padding(mask, begin, end),
            )
            cache, begin = output.get("past_key_values"), end
            if not isinstance(cache, Cache):
                raise Fault(f"keeps its conversation in {type(cache).__name__}, no Cache")
            logits.append(output.logits)
        return torch.cat(logits, dim=1)

    def _padding(self, mask: Tensor | None, begin: int, end: int) -> dict[str, Tensor]:
        if mask is None:
            return {}
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        return {name: x for name, x in given.items() if name in self.takes}

    @torch.no_grad()
    def spoken(self, ids: Tensor, count: int) -> Tensor:
        """`ids` and as many tokens more as greedy decoding says."""
        model: Any = self.model
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )

    def padding_error(self) -> float:
        """How far a left padded row is from that row alone.

        Raises:
            Fault: the model is not told what is padding.
        """
        if "attention_mask" not in self.takes:
            raise Fault("takes no attention mask")
        short = self.ids[1:, -SHORT:]
        batch, mask = self.ids.clone(), torch.ones_like(self.ids)
        batch[1, :-SHORT], mask[1, :-SHORT] = 7, 0
        found = self.one_pass(batch, mask)
        pieces = self.in_pieces(batch, mask=mask)
        alone = self.one_pass(short)
        return max(
            apart(found[1:, -SHORT:], alone),
            apart(pieces[1:, -SHORT:], alone),
            apart(found[:1], self.one_pass(self.ids[:1])),
        )

    def _speaks(self) -> bool:
        """Whether `generate` says what one pass says."""
        try:
            return self.follows(self.spoken(self.ids, 4))
        except Exception:
            return False

    def follows(self, spoken: Tensor) -> bool:
        """Whether the last 4 tokens are the most likely ones, up to rounding."""
        logits = self.one_pass(spoken)[:, -5:-1]
        chosen = logits.gather(-1, spoken[:, -4:, None])[..., 0]
        return bool((chosen >= logits.amax(-1) - WRONG * logits.std()).all())

    def unchanged(self) -> None:
        """The model is as it was, module by module and bit by bit.

        Raises:
            Fault: it is not.
        """
        if hasattr(self.model, ATTRIBUTE) or dict(self.model.named_modules()) != self.modules:
            raise Fault("modules are not those from before")
        weights = self.model.state_dict()
        if weights.keys() != self.weights.keys() or any(
            not torch.equal(weights[name], x) for name, x in self.weights.items()
        ):
            raise Fault("weights are not those from before")
        hooked = [n for n, m in self.modules.items() if m._forward_hooks or m._forward_pre_hooks]
        if hooked:
            raise Fault(f"hooks stay on {', '.join(hooked)}")
        if not torch.equal(self.one_pass(self.ids), self.base):
            raise Fault("logits are not those from before")


def _difference(measure: Any) -> float:
    try:
        return measure()
    except Exception:
        return float("inf")


def activate(model: PreTrainedModel) -> None:
    """Move every memory parameter away from where it starts: a branch that starts at zero hides its
    faults. Vectors (gates, norms, biases) move up only, so that no gate is closed by chance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in memory_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * (noise.abs() if parameter.ndim == 1 else noise))
