"""How long a text may be before a model meets distances that it was never trained on."""

from __future__ import annotations

from typing import Any

from memretrofit.patching.controls import ATTRIBUTE
from memretrofit.patching.segment_visit import SegmentLedger
from memretrofit.patching.surgery import AttentionLedger
from memretrofit.patching.wrapping import positions_of, unwrapped


def longest_text(model: Any) -> int | None:
    """Tokens of the longest text in which no query stands further from a key than the base model
    has positions; None for any text.

    One layer that attends everything at its own distance bounds the whole model.
    """
    inner = unwrapped(model)
    ledger, positions = getattr(inner, ATTRIBUTE, None), positions_of(inner)
    if isinstance(ledger, SegmentLedger) or positions is None:
        return None
    if not isinstance(ledger, AttentionLedger) or _attends_all(inner, ledger):
        return positions
    reaches = [seam.memory.longest(positions) for seam in ledger.seams.values()]
    return min((reach for reach in reaches if reach is not None), default=None)


def _attends_all(model: Any, ledger: AttentionLedger) -> bool:
    """Whether a layer without memory attends everything that a text holds."""
    config = model.config.get_text_config(decoder=True)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    patched = {seam.layer_idx for seam in ledger.seams.values()}
    return any(kind == "full_attention" and n not in patched for n, kind in enumerate(kinds))
