"""A LoRA adapter travels beside the memory, in PEFT's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from saved_models import is_untouched, llama, logits, memory_for, randomise

from memretrofit import from_pretrained, patch, save_pretrained
from memretrofit.description import base_parameters, render
from memretrofit.errors import CheckpointError, StateError
from memretrofit.hub import load_base, read_record, weight_fingerprint
from memretrofit.retrofit import ledger_of, memory_parameters

# peft asks Transformers by a name that Transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is depr:FutureWarning")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


@torch.no_grad()
def adapted(base: Path, **changes: Any) -> Any:
    """A patched base with a LoRA adapter that does something."""
    model = randomise(patch(load_base(base), memory_for()), seed=1)
    config = LoraConfig(**{"r": 3, "target_modules": TARGETS, **changes})
    model = get_peft_model(model, config).eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.normal_(0, 0.2)
    return model


def test_memory_and_adapter_come_back(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    save_pretrained(model, tmp_path)
    assert {*read_record(tmp_path).files} == {
        "memory.safetensors",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not any(".memory." in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    assert not any("lora" in name for name in load_file(tmp_path / "memory.safetensors"))
    for given in (None, load_base(base)):
        loaded = from_pretrained(tmp_path, base=given)
        assert isinstance(loaded, PeftModel)
        assert not loaded.training
        assert torch.equal(logits(loaded), logits(model))
        # the memory can be trained on, the adapter is frozen as PEFT loads it
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
            n for n, _ in loaded.named_parameters() if ".memory." in n
        }
    # the witness: the memory alone is another model
    alone = randomise(patch(load_base(base), memory_for()), seed=1)
    assert not torch.equal(logits(alone), logits(model))


def test_an_adapter_of_another_name(base: Path, tmp_path: Path) -> None:
    inner = randomise(patch(load_base(base), memory_for()), seed=1)
    config = LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False)
    model = get_peft_model(inner, config, adapter_name="mine").eval()
    save_pretrained(model, tmp_path)
    assert torch.equal(logits(from_pretrained(tmp_path)), logits(model))


def test_the_fingerprint_is_that_of_the_base(base: Path) -> None:
    model = adapted(base, modules_to_save=["lm_head"])
    plain = llama()
    assert weight_fingerprint(model) == weight_fingerprint(plain)
    assert [n for n, _ in base_parameters(model)] == [n for n, _ in base_parameters(plain)]


def test_a_table_of_a_peft_model(base: Path) -> None:
    model = adapted(base)
    added = sum(p.numel() for p in memory_parameters(model.get_base_model()).values())
    size = sum(p.numel() for p in llama().parameters())
    assert f"added parameters: {added:,} " in render(model, ledger_of(model))
    assert f"base model's {size:,}" in render(model, ledger_of(model))


def test_a_later_save_without_adapter_removes_it(base: Path, tmp_path: Path) -> None:
    save_pretrained(adapted(base), tmp_path)
    plain = randomise(patch(load_base(base), memory_for()), seed=1)
    save_pretrained(plain, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    loaded = from_pretrained(tmp_path)
    assert not isinstance(loaded, PeftModel)
    assert torch.equal(logits(loaded), logits(plain))


def test_an_adapter_that_peft_put_there_is_attached(base: Path, saved: Path) -> None:
    model = adapted(base)
    model.save_pretrained(saved, save_embedding_layers=False)
    assert torch.equal(logits(from_pretrained(saved)), logits(model))


def test_a_merged_adapter_is_not_saved(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    model.merge_adapter()
    with pytest.raises(StateError, match="unmerge_adapter"):
        save_pretrained(model, tmp_path)
    model.unmerge_adapter()
    with pytest.raises(StateError, match="PeftModel that get_peft_model returned"):
        save_pretrained(model.get_base_model(), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_adapter_with_nan_is_not_saved(base: Path, tmp_path: Path) -> None:
    model = adapted(base)
    weight = next(p for n, p in model.named_parameters() if "lora_A" in n)
    weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        save_pretrained(model, tmp_path)
    assert not list(tmp_path.iterdir())


def damage(folder: Path, kind: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    elif kind == "removed":
        path.unlink()
    elif kind == "edited":
        tensors[name][0] += 1
        save_file(tensors, path)


@pytest.mark.parametrize("kind", ["truncated", "removed", "edited"])
def test_a_damaged_adapter(kind: str, base: Path, tmp_path: Path) -> None:
    save_pretrained(adapted(base), tmp_path)
    damage(tmp_path, kind)
    given = load_base(base)
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        from_pretrained(tmp_path, base=given)
    assert is_untouched(given)


@pytest.mark.parametrize("kind", ["shape", "missing", "unexpected", "config"])
def test_an_adapter_that_does_not_fit(kind: str, base: Path, saved: Path) -> None:
    """Put there by someone else, so no hash speaks for it: it must fit what it describes."""
    adapted(base).save_pretrained(saved, save_embedding_layers=False)
    path = saved / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    if kind == "shape":
        tensors[name] = tensors[name][:1].contiguous()
    elif kind == "missing":
        del tensors[name]
    elif kind == "unexpected":
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(3, 32)
    else:
        config = saved / "adapter_config.json"
        config.write_text(config.read_text().replace("_proj", "_projection"))
    save_file(tensors, path)
    given = load_base(base)
    with pytest.raises(
        CheckpointError, match=r"adapter_config\.json does not fit LlamaForCausalLM"
    ):
        from_pretrained(saved, base=given)
    assert is_untouched(given)
    assert torch.equal(logits(given), logits(llama()))


def test_a_base_that_has_an_adapter_already(base: Path, tmp_path: Path) -> None:
    save_pretrained(adapted(base), tmp_path)
    given = load_base(base)
    get_peft_model(given, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(StateError, match="PEFT layers already"):
        from_pretrained(tmp_path, base=given)
    assert not any(".memory." in name for name, _ in given.named_parameters())
