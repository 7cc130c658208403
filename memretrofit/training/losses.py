"""What training lowers: the distance of a student from its teacher, without a second copy of the
logits in float32, and the loss of lessons.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memretrofit.data.lessons import IGNORED

ROWS_AT_ONCE = 256
"""Positions whose distributions exist in float32 at one time: 48 MiB each at V = 49152."""


def forward_kl(student: Tensor, teacher: Tensor, *, rows_at_once: int = ROWS_AT_ONCE) -> Tensor:
    """Mean over positions of KL(teacher || student), in nats, at temperature 1.

    ::

        KL = sum_v p_v (log p_v - log q_v),    p = softmax(teacher), q = softmax(student)

    Args:
        student: logits with gradient.                                          [B, P, V]
        teacher: logits of the same positions; no gradient flows into them.     [B, P, V]
        rows_at_once: positions computed at a time; each piece is recomputed in the backward pass.
    """
    student, teacher = student.flatten(0, -2), teacher.detach().flatten(0, -2)
    total = student.new_zeros((), dtype=torch.float32)
    pieces = zip(student.split(rows_at_once), teacher.split(rows_at_once), strict=True)
    for logits, target in pieces:
        total = total + checkpoint(
            _summed_kl, logits, target, use_reentrant=False, preserve_rng_state=False
        )
    return total / max(1, len(student))


def _summed_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q = student.float().log_softmax(-1)
    log_p = teacher.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def lesson_logits(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, T, V] of a padded batch, as `memretrofit.data.lessons.batch` makes it."""
    inputs = {name: given[name].to(model.device) for name in ("input_ids", "attention_mask")}
    return model(**inputs, use_cache=False).logits


def lesson_loss(model: Any, given: Mapping[str, Tensor]) -> Tensor:
    """Mean over the learned tokens of a batch of -log p(token | what comes before it), in nats."""
    labels = given["labels"][:, 1:].to(model.device)
    learned = labels != IGNORED
    logits = lesson_logits(model, given)[:, :-1]
    return F.cross_entropy(logits[learned].float(), labels[learned])
