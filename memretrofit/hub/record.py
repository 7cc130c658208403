"""`memory_config.json`: what a saved memory is, for which base model, and in which files.

It is written last, so that it is the moment at which a save happens: it names every other file by
its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from memretrofit.config import Checked, MethodConfig, build
from memretrofit.errors import CheckpointError, ConfigError

CONFIG = "memory_config.json"
MEMORY = "memory.safetensors"
DELTA = "delta.safetensors"
"""What a bank's tables learned."""
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
CARD, REPORT, TASKS = "README.md", "report.json", "tasks"
NAMED = (MEMORY, DELTA, ADAPTER_CONFIG, ADAPTER)
"""Files that a record may name; no other name from a file is ever opened."""
SCHEMA_VERSION = 1
MOST_BYTES = 64 << 20
"""Size above which a JSON file of ours cannot be genuine."""
MOST_DIMENSIONS = 16
"""No tensor of ours has more; torch reads no more than 64."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class BaseRecord(Checked):
    """The base model that a memory was made for."""

    model: str
    """Hub id, folder, or `package:` name; empty for a model that was built, not loaded."""
    revision: str | None = None
    """Commit on the Hub, where known."""
    gguf_file: str | None = None
    """File of GGUF weights inside the folder or repository."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Type that the weights had."""
    model_type: str = ""
    """The architecture, as in the base model's config."""
    vocab_size: int = 0
    """Rows of the embedding, as in the base model's config."""
    weight_fingerprint: str
    """See `memretrofit.hub.weight_fingerprint`."""
    tokenizer_fingerprint: str | None = None
    """See `memretrofit.hub.tokenizer_fingerprint`; None when no tokenizer was given."""

    def __str__(self) -> str:
        """The base model in an error message."""
        name = self.model or f"an unnamed {self.model_type} model"
        parts = [name, self.gguf_file, self.revision and f"revision {self.revision}"]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class TensorSpec:
    """Shape of a tensor in a file, and its dtype in the words of safetensors (`F32`)."""

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        """Dtype and shape in an error message."""
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of `memory_config.json`."""

    method: MethodConfig
    base: BaseRecord
    tensors: Mapping[str, TensorSpec]
    files: Mapping[str, str]
    """File name -> SHA-256, for every file that loading reads."""
    recipe: Mapping[str, Any] | None = None
    results: Mapping[str, Any] | None = None
    version: str = field(default="")
    """The release of memretrofit that wrote it."""

    def to_json(self) -> str:
        """The file's text.

        Raises:
            ConfigError: the recipe or the results hold what JSON cannot.
        """
        values = {
            "schema_version": SCHEMA_VERSION,
            "memretrofit_version": self.version,
            "method": self.method.to_dict(),
            "base": self.base.to_dict(),
            "recipe": self.recipe,
            "results": self.results,
            "files": dict(self.files),
        }
        # one line a tensor: people read this file
        tensors = ",\n".join(
            f"    {json.dumps(name)}: {json.dumps([list(x.shape), x.dtype])}"
            for name, x in self.tensors.items()
        )
        try:
            text = json.dumps(values, indent=2).removesuffix("\n}")
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"save_pretrained: recipe and results must be plain JSON values: {error}. Pass "
                "for example recipe.to_dict()."
            ) from None
        return f'{text},\n  "tensors": {{\n{tensors}\n  }}\n}}\n'


def method_hash(method: MethodConfig) -> str:
    """SHA-256 of a method's config. `memory.safetensors` carries it: the two belong together."""
    return hashlib.sha256(json.dumps(method.to_dict(), sort_keys=True).encode()).hexdigest()


def read_record(directory: str | Path) -> Record:
    """The record of a saved memory; no other file is read.

    Raises:
        CheckpointError: there is none, or it is damaged or from another release.
    """
    path = Path(directory) / CONFIG
    values = read_json(path)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"{path}: schema_version={version!r}, written by memretrofit "
            f"{values.get('memretrofit_version')!r}; this "
            f"release reads {SCHEMA_VERSION}. Install the release that wrote it, or save again."
        )
    faults: list[str] = []

    def section(name: str, read: Any, optional: bool = False) -> Any:
        found = values.get(name)
        if found is None and optional:
            return None
        if not isinstance(found, dict):
            faults.append(f"{name}: {'missing' if found is None else 'not a JSON object'}")
            return None
        try:
            return read(found)
        except ConfigError as error:
            faults.extend(f"{name}.{problem}" for problem in error.problems)

    record = Record(
        method=section("method", MethodConfig.from_dict),
        base=section("base", lambda found: build(BaseRecord, found)),
        tensors=section("tensors", _tensors),
        files=section("files", _files),
        recipe=section("recipe", dict, optional=True),
        results=section("results", dict, optional=True),
        version=str(values.get("memretrofit_version", "")),
    )
    if faults:
        raise CheckpointError(
            "\n  - ".join([f"{path} is not a record that save_pretrained wrote:", *faults])
        )
    return record


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of ours.

    Raises:
        CheckpointError: missing, too large, damaged, or not an object.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes; not a file that save_pretrained wrote."
            )
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"No {CONFIG} in {path.parent}, so there is no memory to load. Pass a folder that "
            "save_pretrained wrote, "
            "or a Hub repository that push_to_hub made."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}. Save or download it again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is damaged: not a JSON object. Save or download it again.")
    return values


def _tensors(found: dict[str, Any]) -> dict[str, TensorSpec]:
    specs = {name: tensor_spec(*value) for name, value in found.items() if _is_pair(value)}
    faulty = [name for name in found if specs.get(name) is None]
    if faulty:
        raise ConfigError.listing(
            "tensors", [f"{name}: expected [shape, dtype]" for name in faulty]
        )
    return {name: spec for name, spec in specs.items() if spec is not None}


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def tensor_spec(shape: Any, dtype: Any) -> TensorSpec | None:
    """The spec that a JSON file states, or None when it is none."""
    legal = (
        isinstance(shape, list)
        and len(shape) <= MOST_DIMENSIONS
        and all(type(n) is int and n >= 0 for n in shape)
        # also of a tensor without values: torch counts in 64 bits
        and math.prod(n for n in shape if n) < 2**60
    )
    return TensorSpec(tuple(shape), dtype) if legal and isinstance(dtype, str) else None


def _files(found: dict[str, Any]) -> dict[str, str]:
    faults = [f"{name}: not a file of a memory" for name in found if name not in NAMED]
    faults += [
        f"{name}: not a SHA-256" for name, x in found.items() if not _SHA256.fullmatch(str(x))
    ]
    faults += [] if MEMORY in found else [f"{MEMORY}: missing"]
    if (ADAPTER in found) != (ADAPTER_CONFIG in found):
        faults.append(f"an adapter needs both {ADAPTER_CONFIG} and {ADAPTER}")
    if faults:
        raise ConfigError.listing("files", faults)
    return found
