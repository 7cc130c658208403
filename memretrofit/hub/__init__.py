"""Save a memory, load it onto its base model, publish it.

A saved memory is a folder (or a Hub repository) with `memory_config.json`, which names the method,
the base model, and every other file by its hash; `memory.safetensors`; a PEFT adapter where the
model had one; and a model card. The base model's weights are never in it.

What a cache of a patched model holds, one conversation, is saved by `save_memory`: see
`memory_file`.
"""

from memretrofit.hub.bank_file import open_bank, write_bank
from memretrofit.hub.base import load_base, load_tokenizer, tokenizer_of
from memretrofit.hub.fingerprint import check_tokenizer, tokenizer_fingerprint, weight_fingerprint
from memretrofit.hub.loading import attach_bank, from_pretrained, merge_delta
from memretrofit.hub.memory_file import load_memory, save_memory
from memretrofit.hub.memory_record import (
    Remembered,
    read_remembered,
    remembered_ids,
    verify_memory,
)
from memretrofit.hub.record import BaseRecord, Record, read_record
from memretrofit.hub.remote import push_to_hub
from memretrofit.hub.saving import read_results, save_pretrained, write_card
from memretrofit.hub.standalone import export_standalone

__all__ = [
    "BaseRecord",
    "Record",
    "Remembered",
    "attach_bank",
    "check_tokenizer",
    "export_standalone",
    "from_pretrained",
    "load_base",
    "load_memory",
    "load_tokenizer",
    "merge_delta",
    "open_bank",
    "push_to_hub",
    "read_record",
    "read_remembered",
    "read_results",
    "remembered_ids",
    "save_memory",
    "save_pretrained",
    "tokenizer_fingerprint",
    "tokenizer_of",
    "verify_memory",
    "weight_fingerprint",
    "write_bank",
    "write_card",
]
