"""Fingerprints: whether this is the base model, and the tokenizer, that a memory was made for."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
from torch import Tensor, nn

from memretrofit.description import base_parameters
from memretrofit.errors import CheckpointError, StateError
from memretrofit.hub.record import BaseRecord

SAMPLE = 32768
"""Values of each tensor that are hashed: 64 KiB in bfloat16."""


@torch.no_grad()
def weight_fingerprint(model: nn.Module) -> str:
    """SHA-256 over the base model's own parameters: names, shapes, and values rounded to bfloat16.

    The same for a model before and after `patch`, with and without LoRA, on any device, and for
    float32 and bfloat16 loads of one checkpoint. (float16 loads agree where the checkpoint's values
    have no more than float16's range.)

    Of a tensor with more than `SAMPLE` values every s-th is hashed, with s prime to the tensor's
    size so that no column or row is left out. It detects another checkpoint, a further training
    run, a merged adapter, a permuted layer, other shapes; not an edit of single values between the
    samples, nor a change below bfloat16's 8 bits. Quantised weights are other weights.

    Raises:
        StateError: the weights are not here (meta device, offloaded).
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_parameters(model)):
        if parameter.device.type == "meta":
            raise StateError(
                f"The weights of this {type(model).__name__} are not in memory ({name} is on the "
                "meta device), so they cannot "
                "be compared. Load it without offloading."
            )
        kind = "" if parameter.is_floating_point() else f" {parameter.dtype}"
        digest.update(f"{name} {list(parameter.shape)}{kind}\n".encode())
        digest.update(_sampled(parameter))
    return digest.hexdigest()


def _sampled(values: Tensor) -> bytes:
    flat = values.reshape(-1)
    step = max(1, math.ceil(flat.numel() / SAMPLE))
    while math.gcd(step, flat.numel()) > 1:
        step += 1
    flat = flat[::step]
    flat = flat.bfloat16() if flat.is_floating_point() else flat
    return flat.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's sorted vocabulary, added tokens included: each with its id."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def check_tokenizer(tokenizer: Any, base: BaseRecord) -> None:
    """Refuse a tokenizer that is not that of `base` (`read_record(directory).base`).

    Raises:
        CheckpointError: its vocabulary is another one, or has ids that the model does not know.
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= base.vocab_size:
        raise CheckpointError(
            f"This tokenizer has ids up to {highest}; the base model, {base}, knows "
            f"{base.vocab_size}. "
            "Load the tokenizer of the base model."
        )
    if base.tokenizer_fingerprint is None:
        return
    found = tokenizer_fingerprint(tokenizer)
    if found != base.tokenizer_fingerprint:
        raise CheckpointError(
            "This tokenizer is not the one that the memory was saved with: a vocabulary of "
            f"{len(tokenizer)} tokens with fingerprint "
            f"{found[:12]}, recorded {base.tokenizer_fingerprint[:12]}. Load the tokenizer of the "
            f"base model, {base}."
        )
