"""Adapters in the layout in which the authors of AHN publish theirs (ByteDance-Seed/AHN).

Fang et al., 2025, arXiv:2510.07318. A folder or Hub repository holds `config.json`, that of the
base with fields of AHN, and `model.safetensors` with, for each layer i (E hidden size, H query
heads, V head dim)::

    model.layers.{i}.ahn.fn.*
    GatedDeltaNet  a_proj.weight, b_proj.weight, g_proj.weight [H, E]; A_log, dt_bias, D [H];
                   o_norm.weight [V]; o_proj.weight [H, V, V]
    DeltaNet       b_proj.weight, g_proj.weight [H, E]; o_norm.weight [V]; o_proj.weight [H, V, V]
    Mamba2         dt_proj.weight, g_proj.weight [H, E]; dt_proj.bias, g_proj.bias, A_log,
                   dt_bias [H]; norm.weight [H V]; o_proj.weight [H, V, V]

Nothing reads `D`: it is checked, dropped, and written as ones, which it starts as. The other
tensors are ours under other names, bit for bit and in their types; a_proj and b_proj are one of
ours.

Their config says nothing of the base's weights, so an adapter of another model of the same shape
(Instruct or not) cannot be told from the right one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.files import replacing, write_json
from memretrofit.hub.record import TensorSpec, read_json
from memretrofit.hub.saving import check_savable
from memretrofit.hub.tensors import (
    FLOATING,
    differences,
    listing,
    read_header,
    read_tensors,
    write_tensors,
)
from memretrofit.methods.ahn import AHNConfig
from memretrofit.patching.ledger import Ledger, ledger_of
from memretrofit.patching.wrapping import unwrapped
from memretrofit.retrofit import patch, unpatch

CONFIG, WEIGHTS = "config.json", "model.safetensors"

_DELTA_READ = {
    "read_out.read_gate.weight": ("g_proj.weight",),
    "read_out.norm_weight": ("o_norm.weight",),
    "read_out.out_map": ("o_proj.weight",),
}
_DECAY = {"decay.log_rate": ("A_log",), "decay.step_bias": ("dt_bias",)}
_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "GatedDeltaNet": {
        "write_features.weight": ("a_proj.weight", "b_proj.weight"),
        **_DECAY,
        **_DELTA_READ,
    },
    "DeltaNet": {"write_features.weight": ("b_proj.weight",), **_DELTA_READ},
    "Mamba2": {
        "write_features.weight": ("dt_proj.weight",),
        "write_features.bias": ("dt_proj.bias",),
        **_DECAY,
        "read_out.read_gate.weight": ("g_proj.weight",),
        "read_out.read_gate.bias": ("g_proj.bias",),
        "read_out.norm_weight": ("norm.weight",),
        "read_out.out_map": ("o_proj.weight",),
    },
}
"""Their class -> our name of a tensor -> their names, stacked along the first dimension."""
_RULES = {"GatedDeltaNet": "gated_delta", "DeltaNet": "delta", "Mamba2": "ssd"}
_UNREAD = "D"
_LAYERS = {"qwen2": "Qwen2MemDecoderLayer", "qwen3": "Qwen3MemDecoderLayer"}
"""Architectures that the authors' code has -> its decoder layer."""
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_COPIED = (
    *_SIZES,
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def import_ahn(
    model: PreTrainedModel,
    release: str | Path,
    *,
    sliding_window: int | None = None,
    num_sink_tokens: int | None = None,
) -> PreTrainedModel:
    """Patch `model` with a published AHN adapter, in place, and return it.

    Args:
        model: the base that the adapter was made for, not patched.
        release: folder with `config.json` and `model.safetensors`; from the Hub:
            `hf download ByteDance-Seed/AHN-GDN-for-Qwen-2.5-Instruct-3B --local-dir FOLDER`.
        sliding_window: tokens attended exactly, sinks not counted; None takes what the config
            says, a value of training (256 in the authors' script, which drew windows at random);
            they evaluate LongBench with 8,064, LV-Eval with 32,640.
        num_sink_tokens: first tokens that stay; None takes the config's, 0 where it has none. The
            authors evaluate with 128.

    Raises:
        CheckpointError: a file is missing or damaged; tensors are missing, unexpected or of another
            shape; it was made for another base; it has parts that the published adapters do not.
        StateError, UnsupportedModelError, ConfigError: see `memretrofit.patch`. The model is as it
            was.
    """
    folder = Path(release).expanduser()
    values = _read_config(folder)
    _check_base(values, model, folder)
    config = _method(values, model, folder, sliding_window, num_sink_tokens)
    patch(model, config)
    try:
        _assign(ledger_of(model), values["_ahn_implementation"], folder / WEIGHTS)
    except BaseException:
        unpatch(model)
        raise
    return model


def export_ahn(model: PreTrainedModel, directory: str | Path) -> None:
    """Write the memory of an AHN model in the authors' layout, for their `merge_weights.py`.

    Their decoding takes cache slot 128 for the one that leaves, so that it is right with
    `num_sink_tokens=128` alone.

    Args:
        model: a Qwen2 or Qwen3 model patched with `AHNConfig`.
        directory: made where it is missing; `model.safetensors` and `config.json` in it are
            replaced.

    Raises:
        StateError: not patched, patched with another method, inside a PEFT adapter, or a parameter
            is nan or infinite.
        ConfigError: the layout has no place for what the method or the model has.
        CheckpointError: the directory cannot be written to.
    """
    ledger = ledger_of(model)
    if not isinstance(ledger.config, AHNConfig):
        raise StateError(
            f"The authors' layout holds AHN memories; this {type(model).__name__} is patched with "
            f"{ledger.config}."
        )
    if unwrapped(model) is not model:
        raise StateError(
            "The authors' layout has no place for the PEFT adapter around this model. Export the "
            "model inside it, or save both with save_pretrained."
        )
    check_savable(model)
    kind = _kind(ledger.config, model)
    tensors: dict[str, Tensor] = {}
    for seam in ledger.seams.values():
        prefix, own = _prefix(seam.layer_idx), seam.memory.state_dict()
        for name, theirs in _NAMES[kind].items():
            parts = own[name].chunk(len(theirs))
            tensors |= {prefix + part: x for part, x in zip(theirs, parts, strict=True)}
        if kind == "GatedDeltaNet":
            tensors[prefix + _UNREAD] = torch.ones_like(own["decay.log_rate"])
    directory = Path(directory).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / WEIGHTS) as draft:
            write_tensors(tensors, draft, {})
        write_json(directory / CONFIG, _config(model, ledger, kind))
    except OSError as error:
        raise CheckpointError(
            f"Cannot write to {directory}: {error.strerror}. Choose a folder that you may write to."
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """The config of a release, when it is one of AHN with the published parts."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"No {name} in {folder}: an AHN release has {CONFIG} and {WEIGHTS} side by side. "
                "Download both: hf download OWNER/NAME --local-dir FOLDER."
            )
    values = read_json(folder / CONFIG)
    kind = values.get("_ahn_implementation")
    if kind not in _NAMES:
        raise CheckpointError(
            f"{folder / CONFIG}: _ahn_implementation={kind!r}; an AHN release says one of "
            f"{', '.join(_NAMES)}. A base model or a merged one is no release: name the folder of "
            "the adapter alone."
        )
    options = {name: values.get(name) for name in ("use_q_proj", "use_ahn_router")}
    if used := [name for name, value in options.items() if value]:
        raise CheckpointError(
            f"{folder / CONFIG}: {' and '.join(used)}: no published adapter has this part, and "
            "memretrofit does not either."
        )
    return values


def _check_base(values: Mapping[str, Any], model: PreTrainedModel, folder: Path) -> None:
    config: Any = model.config
    names = ("model_type", *_SIZES)
    found = {name: getattr(config, name, None) for name in names}
    lines = [
        f"{name}: {found[name]}, the release was made for {values.get(name)}"
        for name in names
        if found[name] != values.get(name)
    ]
    if lines:
        raise CheckpointError(
            f"{folder} was made for another base than this "
            f"{model.name_or_path or type(model).__name__}:{listing(lines)}\nLoad the base that "
            "its name says."
        )


def _method(
    values: Mapping[str, Any],
    model: PreTrainedModel,
    folder: Path,
    sliding_window: int | None,
    num_sink_tokens: int | None,
) -> AHNConfig:
    stated: dict[str, Any] = {"sliding_window": None, "num_attn_sinks": 0, **values}
    full = stated.get("fa_layer_ids") or ""
    try:
        kept = {int(index) for index in full.split(",")} if full else set[int]()
    except (AttributeError, ValueError):
        raise CheckpointError(
            f"{folder / CONFIG}: fa_layer_ids={full!r}: not layers divided by commas."
        ) from None
    layers = range(cast("Any", model.config).num_hidden_layers)
    return AHNConfig(
        rule=cast("Any", _RULES[stated["_ahn_implementation"]]),
        layers_to_transform=tuple(i for i in layers if i not in kept) if kept else None,
        sliding_window=stated["sliding_window"] if sliding_window is None else sliding_window,
        num_sink_tokens=stated["num_attn_sinks"] if num_sink_tokens is None else num_sink_tokens,
    )


def _assign(ledger: Ledger, kind: str, path: Path) -> None:
    """Give a fresh memory the values of a release, in their types."""
    patched = ledger.config.layers_to_transform  # type: ignore[attr-defined]
    # their files hold tensors of the layers with full attention too, which nothing reads
    found = {
        name: spec
        for name, spec in read_header(path).specs.items()
        if patched is None or _layer(name) in {None, *patched}
    }
    expected: dict[str, TensorSpec] = {}
    for seam in ledger.seams.values():
        prefix, own = _prefix(seam.layer_idx), seam.memory.state_dict()
        for name, theirs in _NAMES[kind].items():
            shape = tuple(own[name].chunk(len(theirs))[0].shape)
            expected |= {prefix + part: _spec(shape, found.get(prefix + part)) for part in theirs}
        if kind == "GatedDeltaNet":
            unread = prefix + _UNREAD
            expected[unread] = _spec(tuple(own["decay.log_rate"].shape), found.get(unread))
    if lines := differences(expected, found):
        raise CheckpointError(
            f"{path} is not a {kind} release for {len(ledger.seams)} layers:{listing(lines)}\n"
            "Nothing was patched. Download it again, or check which base it was made for."
        )
    tensors = read_tensors(path)
    for seam in ledger.seams.values():
        prefix = _prefix(seam.layer_idx)
        device = next(seam.memory.parameters()).device
        own = {
            name: torch.cat([tensors[prefix + part] for part in theirs]).to(device)
            for name, theirs in _NAMES[kind].items()
        }
        seam.memory.load_state_dict(own, strict=True, assign=True)


def _spec(shape: tuple[int, ...], found: TensorSpec | None) -> TensorSpec:
    """A shape in the type of the file, which may be any of floats."""
    return TensorSpec(shape, found.dtype if found and found.dtype in FLOATING else "F32")


def _prefix(layer_idx: int) -> str:
    return f"model.layers.{layer_idx}.ahn.fn."


def _layer(name: str) -> int | None:
    """The layer that a tensor of theirs belongs to."""
    found = re.match(r"model\.layers\.(\d+)\.ahn\.fn\.", name)
    return None if found is None else int(found[1])


def _kind(config: AHNConfig, model: PreTrainedModel) -> str:
    """The class of theirs that computes what the model's memory does."""
    wanted = {"state_heads": "query", "key_space": "post_rope", "center_keys": False}
    lines = [
        f"{name}={getattr(config, name)!r}: they have {value!r} alone"
        for name, value in wanted.items()
        if getattr(config, name) != value
    ]
    model_type = cast("Any", model.config).model_type
    if model_type not in _LAYERS:
        lines.append(f"model_type={model_type!r}: they have {' and '.join(_LAYERS)}")
    if lines:
        raise ConfigError.listing("export_ahn", lines)
    return next(kind for kind, rule in _RULES.items() if rule == config.rule)


def _config(model: PreTrainedModel, ledger: Ledger, kind: str) -> dict[str, Any]:
    """The config that their classes read, in the words of the Transformers that they pin (4.51)."""
    config: Any = model.config
    method = cast("AHNConfig", ledger.config)
    rope = dict(config.rope_parameters)
    patched = {seam.layer_idx for seam in ledger.seams.values()}
    full = [index for index in range(config.num_hidden_layers) if index not in patched]
    values = {name: getattr(config, name) for name in _COPIED}
    if config.model_type == "qwen3":
        values |= {"head_dim": config.head_dim, "attention_bias": config.attention_bias}
    return {
        "architectures": [type(model).__name__],
        "model_type": config.model_type,
        **values,
        "rope_theta": rope.pop("rope_theta"),
        "rope_scaling": None if rope.get("rope_type") == "default" else rope,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
        "_layer_implementation": _LAYERS[config.model_type],
        "_ahn_implementation": kind,
        "sliding_window": method.sliding_window,
        "sliding_window_type": "fixed",
        "num_attn_sinks": method.num_sink_tokens,
        "fa_layer_ids": ",".join(map(str, full)),
        "ahn_position": "prefix",
        "use_ahn_router": False,
        "use_q_proj": False,
        "save_ahn_only": True,
    }
