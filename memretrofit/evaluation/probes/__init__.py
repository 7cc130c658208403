"""What a model reads and what its memory does, on any causal model, patched or not.

Each probe is a function of a model and token ids with a typed result. It leaves the model bit for
bit as it was, and no tensor of it is T x T: attention is computed for the asked queries alone, a
few at a time.

    retrieval_heads   which heads copy from far back
    attention_mass    how much attention falls outside sinks and window
    slot_access       how evenly the slots of a memory are written and read
    bank_access       how evenly the rows of a bank are read
    influence         which tokens made the next one likely
"""

from memretrofit.evaluation.probes.attention_mass import AttentionMass, attention_mass
from memretrofit.evaluation.probes.bank_access import bank_access
from memretrofit.evaluation.probes.head_plans import inverted_plan, plan_from_scores, random_plan
from memretrofit.evaluation.probes.influence import Influence, influence
from memretrofit.evaluation.probes.retrieval_heads import (
    RetrievalHeads,
    Trial,
    retrieval_heads,
    trials_of,
)
from memretrofit.evaluation.probes.slot_access import SlotAccess, SlotShares, slot_access

__all__ = [
    "AttentionMass",
    "Influence",
    "RetrievalHeads",
    "SlotAccess",
    "SlotShares",
    "Trial",
    "attention_mass",
    "bank_access",
    "influence",
    "inverted_plan",
    "plan_from_scores",
    "random_plan",
    "retrieval_heads",
    "slot_access",
    "trials_of",
]
