"""Tensors in safetensors files, headers checked before anything is allocated. No pickle.

Layout: 8 bytes little-endian length n, n bytes of JSON {name: {dtype, shape, data_offsets}}, then
the data.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from memretrofit.errors import CheckpointError
from memretrofit.hub.record import TensorSpec, tensor_spec

MOST_HEADER_BYTES = 16 << 20
"""Above this it is no header of a memory or an adapter, which has some hundred bytes a tensor."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Type of each name that safetensors gives to one."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATING = frozenset(name for name, dtype in DTYPES.items() if dtype.is_floating_point)


def spec_of(tensor: Tensor) -> TensorSpec:
    """What a file will say of `tensor`."""
    return TensorSpec(tuple(tensor.shape), _NAMES.get(tensor.dtype, str(tensor.dtype)))


def sha256(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold nan or infinity."""
    return [
        name
        for name, x in tensors.items()
        if x.is_floating_point() and not bool(_of_two_bytes(x).isfinite().all())
    ]


def _of_two_bytes(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16) if x.itemsize == 1 else x  # isfinite does not know 8-bit floats


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write plain copies: contiguous, on the CPU, sharing nothing."""
    plain = {
        name: x.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, x in tensors.items()
    }
    save_file(plain, path, metadata={"format": "pt", **metadata})


class Header(NamedTuple):
    """What a safetensors file states."""

    specs: dict[str, TensorSpec]
    metadata: dict[str, str]
    offsets: dict[str, int]
    """Byte of the file at which each tensor begins."""


def read_header(path: Path) -> Header:
    """Tensors and metadata that a safetensors file states, when the statement fits the file.

    Raises:
        CheckpointError: truncated, or damaged in its header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MOST_HEADER_BYTES, size - 8):
                raise damaged(path, f"its header claims {length} bytes, the file has {size}")
            values = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"its header is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise damaged(path, "its header is not a JSON object")
    metadata = values.pop("__metadata__", {})
    specs: dict[str, TensorSpec] = {}
    offsets: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in values.items():
        entry = entry if isinstance(entry, dict) else {}
        spec, span = tensor_spec(entry.get("shape"), entry.get("dtype")), entry.get("data_offsets")
        if spec is None or span is None or spec.dtype not in DTYPES or not _is_span(span):
            raise damaged(path, f"its header has no legal dtype, shape and offsets for {name!r}")
        if span[1] - span[0] != math.prod(spec.shape) * DTYPES[spec.dtype].itemsize:
            raise damaged(path, f"{name!r} is {spec}, which does not fit {span[1] - span[0]} bytes")
        specs[name], offsets[name] = spec, 8 + length + span[0]
        spans.append((span[0], span[1]))
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != size - 8 - length:
        raise damaged(path, f"its tensors need {ends[-1]} bytes, the file has {size - 8 - length}")
    return Header(specs, metadata if isinstance(metadata, dict) else {}, offsets)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file whose header was checked.

    Raises:
        CheckpointError: damaged, or a value is nan or infinity.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(path, str(error)) from error
    if faulty := not_finite(tensors):
        raise CheckpointError(
            f"{path}: not finite in {', '.join(faulty[:5])}. Save or download it again."
        )
    return tensors


def differences(expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]) -> list[str]:
    """One line for each tensor that is missing, unexpected, or of another shape or dtype."""
    lines = [f"missing: {name}, {spec}" for name, spec in expected.items() if name not in found]
    lines += [f"unexpected: {name}, {spec}" for name, spec in found.items() if name not in expected]
    lines += [
        f"{name}: expected {spec}, found {found[name]}"
        for name, spec in expected.items()
        if name in found and found[name] != spec
    ]
    return lines


def listing(lines: list[str], most: int = 20) -> str:
    """Lines of an error message, the first of many."""
    rest = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "".join(f"\n  - {line}" for line in [*lines[:most], *rest])


def _is_span(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(n) is int and n >= 0 for n in value)
    )


def damaged(path: Path, why: str) -> CheckpointError:
    """The error for a file whose content is not what was written."""
    return CheckpointError(f"{path} is damaged or truncated: {why}. Save or download it again.")
