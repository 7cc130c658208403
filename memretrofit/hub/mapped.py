"""Tensors that may be larger than memory: streamed into a safetensors file, and told from others.

The data begin at a page and every tensor at a multiple of its item size, so that it can be used as
it lies in the file. A large file is told from another by a sample of its pages: to read all of it
would take longer than what it is opened for.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memretrofit.errors import CheckpointError
from memretrofit.hub.record import TensorSpec
from memretrofit.hub.tensors import DTYPES, Header, damaged, spec_of

PAGE = 4096
SAMPLED_PAGES = 64
WHOLE = 1 << 20
"""Bytes up to which a sample is all of the file."""
PIECE = 8 << 20
"""Bytes that are in memory twice while they are written."""


FETCHED = (".keys", ".values")
"""Ends of the names of tensors that are read in small parts, anywhere."""


@dataclass(frozen=True)
class Written:
    """A tensor to be written, made a piece at a time."""

    spec: TensorSpec
    pieces: Callable[[], Iterable[Tensor]]
    """Cuts along the first axis, in order, on any device."""

    @classmethod
    def whole(cls, tensor: Tensor) -> Written:
        """A tensor that is there already."""
        return cls.joined([tensor])

    @classmethod
    def joined(cls, parts: Sequence[Tensor]) -> Written:
        """Tensors one behind the other along the first axis."""
        spec = spec_of(parts[0])
        if parts[0].ndim:
            spec = TensorSpec((sum(map(len, parts)), *spec.shape[1:]), spec.dtype)
        return cls(spec, lambda: (piece for part in parts for piece in _cut(part.detach())))


def _cut(tensor: Tensor) -> Iterable[Tensor]:
    if not tensor.ndim or not tensor.numel():
        return [tensor]
    return tensor.split(max(1, PIECE // tensor[:1].nbytes))


def write_pieces(path: Path, tensors: Mapping[str, Written], metadata: Mapping[str, str]) -> str:
    """Write tensors, a piece at a time and never a second copy of one; returns the SHA-256."""
    # the widest items first: what follows them is aligned to its own
    order = sorted(tensors, key=lambda name: -DTYPES[tensors[name].spec.dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    place = 0
    for name in order:
        spec = tensors[name].spec
        end = place + nbytes(spec)
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [place, end],
        }
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in _parts(text, [tensors[name] for name in order]):
            file.write(part)
            digest.update(part)
        if file.tell() != 8 + len(text) + place:
            raise AssertionError(f"{path}: pieces of another size than their tensors")
    return digest.hexdigest()


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor in a file."""
    return math.prod(spec.shape) * DTYPES[spec.dtype].itemsize


def _parts(header: bytes, tensors: Iterable[Written]) -> Iterator[bytes]:
    yield len(header).to_bytes(8, "little")
    yield header
    for tensor in tensors:
        for piece in tensor.pieces():
            yield piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def map_tensors(path: Path, header: Header) -> dict[str, Tensor]:
    """The tensors of a file whose header was read, mapped: what is not used is not read, and
    what is written to one stays in memory. Of `.keys` and `.values` pages are read one by one.

    Raises:
        CheckpointError: the file cannot be mapped, or a tensor lies where it cannot be used.
    """
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be mapped: {error.strerror}.") from error
    tensors: dict[str, Tensor] = {}
    for name, spec in header.specs.items():
        dtype, low, size = DTYPES[spec.dtype], header.offsets[name], nbytes(spec)
        if low % dtype.itemsize:
            raise damaged(path, f"{name!r} does not begin at a multiple of {dtype.itemsize} bytes")
        if not size:
            tensors[name] = torch.empty(spec.shape, dtype=dtype)
            continue
        if name.endswith(FETCHED) and hasattr(mmap, "MADV_RANDOM"):
            start = low - low % mmap.PAGESIZE
            content.madvise(mmap.MADV_RANDOM, start, low + size - start)
        flat = torch.frombuffer(content, dtype=dtype, offset=low, count=math.prod(spec.shape))
        tensors[name] = flat.view(spec.shape)
    return tensors


def sample_sha256(path: Path) -> str:
    """SHA-256 of a file's size and of pages spread over it; of all of a file up to 1 MiB.

    It detects another file, a truncated one and an edit of its header; of a large one not every
    edit of single values.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            for number in range(SAMPLED_PAGES):
                file.seek(number * (size - PAGE) // (SAMPLED_PAGES - 1))
                digest.update(file.read(PAGE))
    return digest.hexdigest()
