"""Every damaged, edited or foreign file is an error that names it; the base stays as it was."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_models import is_untouched, llama, logits, memory_for
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from memretrofit import AHNConfig, from_pretrained, patch, save_pretrained
from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.hub import load_base
from memretrofit.hub.tensors import sha256

NAME = "model.layers.0.self_attn.memory.read_out.out_map"


def refused(saved: Path, base: Path, match: str) -> None:
    """Loading fails with `match`, also onto a given model, which it leaves as it was."""
    model = load_base(base)
    before = logits(model)
    with pytest.raises(CheckpointError, match=match):
        from_pretrained(saved, base=model)
    assert is_untouched(model)
    assert torch.equal(logits(model), before)


def edit(saved: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = saved / "memory_config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def replace_tensors(saved: Path, change: Callable[[dict[str, Any]], Any], *, agree: bool) -> None:
    """Rewrite the memory file; with `agree` the record is rewritten to match, as a forger would."""
    from safetensors import safe_open

    path = saved / "memory.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)
    if agree:
        dtypes = {torch.float32: "F32", torch.float16: "F16", torch.int32: "I32"}
        specs = {name: [list(x.shape), dtypes[x.dtype]] for name, x in tensors.items()}
        edit(saved, lambda v: v.update(tensors=specs, files={"memory.safetensors": sha256(path)}))


def header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the JSON header of a safetensors file and leave its data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    values = json.loads(data[8 : 8 + length])
    change(values)
    text = json.dumps(values).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize("kept", [0, 5, 8, 100, -1])
def test_a_truncated_memory(saved: Path, base: Path, kept: int) -> None:
    path = saved / "memory.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    refused(saved, base, r"memory\.safetensors is damaged or truncated.*Save or download it again")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda h: h[NAME].update(shape=[10**9, 10**9]), "does not fit"),
        (lambda h: h[NAME].update(data_offsets=[0, 10**12]), "does not fit"),
        (lambda h: h[NAME].update(data_offsets=[5]), "no legal dtype, shape and offsets"),
        (lambda h: h[NAME].update(shape=[-1, 8, 8]), "no legal dtype"),
        (lambda h: h[NAME].update(dtype="F7"), "no legal dtype"),
        (lambda h: h.pop(NAME), "its tensors need"),
        (lambda h: h.update({NAME: 3}), "no legal dtype"),
        (lambda h: h.update(second=dict(h[NAME])), "its tensors need"),
    ],
)
def test_a_header_that_lies(saved: Path, base: Path, change: Callable, why: str) -> None:
    """Nothing is allocated by a statement of the file that the file cannot keep."""
    header(saved / "memory.safetensors", change)
    refused(saved, base, why)


def test_a_header_that_claims_more_than_the_file(saved: Path, base: Path) -> None:
    path = saved / "memory.safetensors"
    for length in (2**63, 2**40, path.stat().st_size):
        path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
        refused(saved, base, f"claims {length} bytes")


def test_a_pickle_is_never_opened(saved: Path, base: Path) -> None:
    (saved / "memory.safetensors").unlink()
    torch.save({NAME: torch.zeros(1)}, saved / "memory.safetensors")
    refused(saved, base, "damaged or truncated")
    (saved / "memory.safetensors").unlink()
    torch.save({NAME: torch.zeros(1)}, saved / "memory.bin")
    refused(saved, base, r"memory\.safetensors is missing")


def test_one_flipped_bit(saved: Path, base: Path) -> None:
    path = saved / "memory.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(saved, base, r"memory\.safetensors is not the file that was saved.*content has changed")


TENSOR_FAULTS = [
    (lambda t: t.pop(NAME), f"missing: {NAME}"),
    (lambda t: t.update({"model.layers.0.self_attn.memory.extra": torch.zeros(2)}), "unexpected: "),
    (
        lambda t: t.update({NAME: torch.zeros(4, 8, 7)}),
        r"expected F32 \[4, 8, 8\], found F32 \[4, 8, 7\]",
    ),
    (lambda t: t.update({NAME: torch.zeros(4, 8, 8, dtype=torch.float16)}), "found F16"),
]


@pytest.mark.parametrize(("change", "why"), TENSOR_FAULTS)
def test_tensors_that_the_record_does_not_list(
    saved: Path, base: Path, change: Callable, why: str
) -> None:
    replace_tensors(saved, change, agree=False)
    refused(saved, base, why)


@pytest.mark.parametrize(("change", "why"), TENSOR_FAULTS[:3])
def test_tensors_that_do_not_fit_the_model(
    saved: Path, base: Path, change: Callable, why: str
) -> None:
    """Record and file agree, and both are wrong: found after patching, which is undone."""
    replace_tensors(saved, change, agree=True)
    refused(saved, base, why)


def test_all_faults_are_listed_at_once(saved: Path, base: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors.pop(NAME)
        other = NAME.replace("0", "1")
        tensors[other] = tensors[other][:1].contiguous()

    replace_tensors(saved, change, agree=True)
    refused(saved, base, r"(?s)missing: .*layers\.0.*layers\.1.*found F32 \[1, 8, 8\]")


def test_other_kinds_of_tensors(saved: Path, base: Path) -> None:
    replace_tensors(saved, lambda t: t.update({NAME: t[NAME].int()}), agree=True)
    refused(saved, base, r"expected F32 \[.*\], found I32")


def test_a_tensor_of_the_base_model_is_not_taken(saved: Path, base: Path) -> None:
    replace_tensors(saved, lambda t: t.update({"lm_head.weight": torch.zeros(61, 32)}), agree=True)
    refused(saved, base, r"lm_head\.weight: not a tensor of a memory")


def test_not_finite_values(saved: Path, base: Path) -> None:
    replace_tensors(saved, lambda t: t[NAME].fill_(float("nan")), agree=True)
    refused(saved, base, f"not finite in {NAME}")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda v: v.update(schema_version=2), "schema_version=2.*this release reads 1"),
        (lambda v: v.pop("schema_version"), "schema_version=None"),
        (lambda v: v.pop("base"), "base: missing"),
        (lambda v: v.update(method=[]), "method: not a JSON object"),
        (lambda v: v["method"].update(method="ahm"), "did you mean 'ahn'"),
        (lambda v: v["method"].update(sliding_windw=3), "did you mean 'sliding_window'"),
        (lambda v: v["method"].update(sliding_window=0), "sliding_window=0"),
        (lambda v: v["method"].update(sliding_window=13), "saved with another method config"),
        (lambda v: v["base"].update(vocab_size="61"), "base.vocab_size='61'"),
        (lambda v: v["base"].update(dtype="load"), "base.dtype='load'"),
        (lambda v: v["files"].update({"../secret": "0" * 64}), r"\.\./secret: not a file of a"),
        (lambda v: v["files"].update({"memory.safetensors": "x"}), "not a SHA-256"),
        (lambda v: v["files"].update({"adapter_config.json": "0" * 64}), "needs both"),
        (lambda v: v["files"].clear(), "memory.safetensors: missing"),
        (lambda v: v["tensors"].update(x=[[-1], "F32"]), "x: expected"),
        (lambda v: v["tensors"].update(x=3), "x: expected"),
    ],
)
def test_a_record_that_was_edited(saved: Path, base: Path, change: Callable, why: str) -> None:
    edit(saved, change)
    refused(saved, base, why)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\udc80"])
def test_a_record_that_is_not_json(saved: Path, base: Path, text: str) -> None:
    path = saved / "memory_config.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    refused(saved, base, r"memory_config\.json is damaged")


def test_faults_of_a_record_come_together(saved: Path, base: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["method"]["sliding_window"] = -1
        values["base"].pop("weight_fingerprint")
        values.pop("files")

    edit(saved, change)
    refused(saved, base, r"(?s)sliding_window=-1.*weight_fingerprint: missing.*files: missing")


def test_a_folder_without_a_memory(tmp_path: Path, base: Path) -> None:
    refused(tmp_path, base, r"No memory_config\.json in .*save_pretrained wrote")


def neox() -> GPTNeoXForCausalLM:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
        )
    )


@torch.no_grad()
def other_weights() -> Any:
    model = llama()
    model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    return model


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (other_weights, "weight fingerprint [0-9a-f]{64}, recorded [0-9a-f]{64}"),
        (lambda: llama(vocab_size=64), "vocabulary 64, recorded 61"),
        (lambda: llama(num_hidden_layers=3), "weight fingerprint"),
        (neox, "model type gpt_neox, recorded llama"),
    ],
)
def test_another_base_model(saved: Path, base: Path, other: Callable, why: str) -> None:
    model = other()
    with pytest.raises(CheckpointError, match=why) as caught:
        from_pretrained(saved, base=model)
    assert str(base) in str(caught.value)
    assert is_untouched(model)


def test_another_base_model_by_path(saved: Path, tmp_path: Path) -> None:
    other_weights().save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"made for .*This is another model, .*other"):
        from_pretrained(saved, base=tmp_path / "other")


def test_a_base_that_is_gone(saved: Path) -> None:
    edit(saved, lambda v: v["base"].update(model="/nowhere/at/all"))
    with pytest.raises(CheckpointError, match=r"/nowhere/at/all cannot be loaded.*pass base="):
        from_pretrained(saved)


def test_options_for_loading_do_not_go_with_a_model(saved: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="dtype"):
        from_pretrained(saved, base=load_base(base), dtype=torch.bfloat16)


def test_a_patched_base_is_left_patched(saved: Path, base: Path) -> None:
    model = patch(load_base(base), memory_for())
    before = logits(model)
    with pytest.raises(StateError, match="patched already"):
        from_pretrained(saved, base=model)
    assert torch.equal(logits(model), before)


def test_a_window_that_the_base_cannot_have(base: Path, tmp_path: Path) -> None:
    """The record is consistent; the method refuses the model."""
    save_pretrained(patch(load_base(base), AHNConfig(sliding_window=250)), tmp_path)
    model = load_base(base)
    model.config.max_position_embeddings = 100
    with pytest.raises(ConfigError, match="sliding_window=250"):
        from_pretrained(tmp_path, base=model)
    assert is_untouched(model)
