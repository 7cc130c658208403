"""Register one attention function and one mask function per base implementation, on the first
patch.
"""

from __future__ import annotations

from transformers import AttentionInterface, AttentionMaskInterface

from memretrofit.patching.config_view import IMPLEMENTATIONS, PREFIX


def register() -> None:
    """Add our names to Transformers' interfaces. Models that do not ask for these names are not
    affected.
    """
    from memretrofit.patching.attention import memory_attention
    from memretrofit.patching.masks import padding_mask

    for implementation in IMPLEMENTATIONS:
        AttentionInterface.register(PREFIX + implementation, memory_attention)
        AttentionMaskInterface.register(PREFIX + implementation, padding_mask)
