"""What a recipe may say of stages that teach a memory of the tokens family."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Annotated, Literal

from memretrofit.config import Checked, Range

Count = Annotated[int, Range(least=1)]
Counts = Annotated[tuple[int, ...], Range(least=1)]
Positive = Annotated[float, Range(above=0)]


@dataclass(frozen=True, kw_only=True)
class RecurrenceSection(Checked):
    """The one stage of a memory between segments: answer what earlier segments said."""

    texts: Literal[
        "recall",
        "dialogue",
        "babilong_qa1",
        "babilong_qa2",
        "babilong_qa3",
        "babilong_qa4",
        "babilong_qa5",
    ] = "recall"
    """What is read: who likes what, talks with one person, or small stories scattered through the
    prose of `data.sources`; the last segment ends with a question.
    """
    facts: Count | None = None
    """Of a text in `recall`, of each session in `dialogue` (null: 2); one of them all is asked for.
    The small stories have as many as they need.
    """
    steps: Count = 600
    batch_size: Count = 8
    """Texts of one step."""
    learning_rate: Positive = 1e-3
    """AdamW's for the memory at its peak; the same warm-up and cosine as distillation."""
    lora_learning_rate: Positive = 3e-4
    """The same for adapters, where `trainable` has them."""
    segments: Counts = (1, 2)
    """A curriculum: in its stage i, texts have as many segments as one of the first i says. In a
    text of one segment the question follows its facts.
    """
    shares: Annotated[tuple[float, ...], Range(above=0)] = ()
    """Of the steps, for each stage; empty gives all the same."""
    credit: Literal["full", "truncated", "replay"] = "full"
    """How gradient gets through segments: `replay` is as `full`, with the activations of one
    segment and one forward more; `truncated` stops.
    """
    credit_segments: Count = 1
    """After how many segments `truncated` stops."""

    def relations(self, faulty: Set[str]) -> list[str]:
        """A share for each stage, and facts where they can be counted."""
        found = []
        if not faulty & {"texts", "facts"} and self.facts and self.texts.startswith("babilong"):
            found.append(
                f"facts={self.facts}: a story of {self.texts} has as many as it needs; leave it out"
            )
        if faulty & {"segments", "shares"}:
            return found
        if not self.segments:
            found.append("segments: is empty")
        if self.shares and len(self.shares) != len(self.segments):
            found.append(
                f"shares={list(self.shares)}: {len(self.shares)} for {len(self.segments)} stages "
                "of segments; give each one, or none"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class ProceduresSection(Checked):
    """The one stage of rows behind the vocabulary: `data.procedures` by example."""

    steps: Count = 300
    batch_size: Count = 8
    """Examples of one step."""
    learning_rate: Positive = 1e-2
    """AdamW's for the rows at its peak; the same warm-up and cosine as distillation."""
