"""What a memory is worth: likelihood past the window against its controls, and its cost."""

from memretrofit.evaluation.cost import cache_bytes, decode_ms_per_token, prefill
from memretrofit.evaluation.likelihood import Scores, compare_arms, score_rows
from memretrofit.evaluation.report import evaluate
from memretrofit.evaluation.statistics import ARMS, Interval, Summary, paired_bootstrap, summarise

__all__ = [
    "ARMS",
    "Interval",
    "Scores",
    "Summary",
    "cache_bytes",
    "compare_arms",
    "decode_ms_per_token",
    "evaluate",
    "paired_bootstrap",
    "prefill",
    "score_rows",
    "summarise",
]
