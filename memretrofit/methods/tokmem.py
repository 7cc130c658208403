"""TokMem: a procedure is one new token, which the model emits and then continues from.

Wu et al., 2025, arXiv:2510.00444; the lengths of rows after the authors' code.

Equations (V tokens and n open procedures; h_t the hidden state at the head; s what the model scales
its embeddings by)::

    e(V + i)      = s M_i                                   M: [l, E], the first n rows open
    logits_t      = [ base logits_t [V] ; h_t M^T [n] ]
    text          = [ query, V + i, response_i, V + j, response_j, ... ]

A row is a class, so that the model says which procedure a query asks for, and an embedding, so that
what follows is the procedure's. Everything else is frozen; the loss is over procedures and
responses. A procedure that is learned later moves no row of an earlier one: each row is a parameter
of its own, and `open_procedures` lets the new ones alone train::

    patch(model, TokMemConfig(num_procedures=100))
    ids = open_procedures(model, 50)                 # the ids of the first 50; train their rows
    ids = open_procedures(model, 60)                 # ten more; the 50 stay as they are
    with memory_silenced(model): ...                 # none is emitted; their ids are still read

How many are open is saved with the rows: a loaded model emits what it learned. To let a text begin
with a procedure whatever the query, append its id; to let the model choose among procedures only,
pass `generate` a `prefix_allowed_tokens_fn`.

Differs from the paper: (1) Procedures stand behind the vocabulary instead of in reserved tokens,
of which most models have few, and nothing is resized. `config.vocab_size` stays V. (2) Rows begin
like a row of the tables (mean and spread of each place), not as copies of reserved rows. (3) Rows
that do not train are frozen, where the code sets their gradients to zero and decays some. (4) The
rule for lengths (`renormalise_procedures`) is the caller's to apply after a step; the released
scripts never reach the round in which they would. (5) Only the open procedures count as classes.

Reduces to: the base model, as long as no procedure is open; at any time its own V logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig, Range
from memretrofit.errors import UnsupportedModelError
from memretrofit.modules.vocabulary_rows import VocabularyRows, like_rows_of
from memretrofit.patching.vocabulary import patch_vocabulary

PAPER = "arXiv:2510.00444"
FAMILY = "tokens"
IDENTITY = "full"


@dataclass(frozen=True, kw_only=True)
class TokMemConfig(MethodConfig):
    """How many procedures there is room for, and what a row is."""

    num_procedures: Annotated[int, Range(least=1)] = 100
    """Rows. Each costs E numbers; they become tokens when they are opened."""
    decouple_embeddings: bool = False
    """Whether a procedure has one row as an embedding and another one as a class."""


DECOUPLED = TokMemConfig(decouple_embeddings=True)
"""Two rows for each procedure, for a base model whose head is not its table of embeddings."""


def patch_tokmem(model: PreTrainedModel, config: TokMemConfig) -> None:
    """Put rows for procedures behind the vocabulary.

    Raises:
        UnsupportedModelError, StateError: see `memretrofit.patch`.
    """
    count = config.num_procedures

    def make(table: Tensor, head: Tensor) -> VocabularyRows:
        if config.decouple_embeddings:
            return VocabularyRows(like_rows_of(table, count), like_rows_of(head, count))
        if table.shape != head.shape:
            raise UnsupportedModelError(
                f"One row cannot be an embedding of {table.shape[1]} numbers and a class of "
                f"{head.shape[1]}. Set decouple_embeddings=true."
            )
        return VocabularyRows(like_rows_of(table, count))

    patch_vocabulary(model, config, make)
