"""Importing memretrofit changes nothing in Transformers, and patching only adds names."""

from __future__ import annotations

import subprocess
import sys

IMPORT = """
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers import cache_utils, generation
def globals_of_transformers():
    return {
        "attention": dict(AttentionInterface._global_mapping),
        "masks": dict(AttentionMaskInterface._global_mapping),
        "dynamic": dict(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING),
        "static": dict(cache_utils.STATIC_LAYER_TYPE_MAPPING),
        "cache": dict(vars(cache_utils.Cache)),
        "layer": dict(vars(cache_utils.DynamicLayer)),
        "model": dict(vars(PreTrainedModel)),
        "generation": dict(vars(generation.GenerationMixin)),
    }
before = globals_of_transformers()
import memretrofit, memretrofit.retrofit
for name, info in memretrofit.available_methods().items():
    pass
import memretrofit.patching.attention, memretrofit.patching.cache, memretrofit.patching.surgery
after = globals_of_transformers()
for kind in before:
    assert before[kind] == after[kind], kind
from transformers import LlamaConfig, LlamaForCausalLM
model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, vocab_size=11, max_position_embeddings=64))
memretrofit.patch(model, memretrofit.WindowSinksConfig(sliding_window=8))
patched = globals_of_transformers()
for kind in before:  # names may be added; what was there is what it was
    assert {k: v for k, v in patched[kind].items() if k in before[kind]} == before[kind], kind
    added = patched[kind].keys() - before[kind].keys()
    assert all(name.startswith("memretrofit_") for name in added), (kind, added)
"""


def test_importing_changes_nothing_in_transformers():
    """In a process of its own: here everything is imported already. Patching adds names and
    replaces none."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
