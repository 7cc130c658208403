"""A model small enough to score in milliseconds, and rows for it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROWS = torch.randint(0, 101, (5, 150), generator=torch.Generator().manual_seed(1))


def tiny(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()
