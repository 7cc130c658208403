"""What one process does for one type: build it, hold it to every promise, answer in plain data."""

from __future__ import annotations

import contextlib
import io
import warnings

import torch
import transformers

from memretrofit.evaluation.coverage.seams import SEAMS, Verdict, examine
from memretrofit.evaluation.coverage.tiny import NoTinyModel, tiny_model


def examine_type(name: str) -> dict[str, dict[str, object]]:
    """By seam: status, reason, how many places were patched, and what could not be asked."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of Transformers, about configs that nobody trains
        try:
            verdicts = examine(tiny_model(name))
        except NoTinyModel as reason:
            status = "unsupported" if reason.expected else "broken"
            words = " ".join(str(reason).split())
            verdicts = dict.fromkeys(SEAMS, Verdict(status, f"not tried: {words}"))
    return {seam: verdict.to_dict() for seam, verdict in verdicts.items()}
