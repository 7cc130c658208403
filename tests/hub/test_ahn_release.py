"""Adapters in the layout of AHN's authors, random ones: what they compute, and the way there and
back.

`by_hand` is written from the formulas of their modules, in their names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from contract.arms import activate
from contract.families import build
from contract.runs import apart
from methods.captured import attention_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from saved_models import is_untouched, llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tolerances import ONE_LAYER, WRONG
from torch.nn.functional import softplus
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from memretrofit import AHNConfig, WindowSinksConfig, describe, patch
from memretrofit.cli import app
from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.hub.ahn_release import export_ahn, import_ahn
from memretrofit.patching.controls import writes_disabled
from memretrofit.retrofit import patched_config

HIDDEN, HEADS, WIDTH, WINDOW, SINKS = 32, 4, 8, 8, 3
IDS = torch.arange(24)[None] * 7 % 61

PER_HEAD = (HEADS,)
TO_HEADS = (HEADS, HIDDEN)
OUT = (HEADS, WIDTH, WIDTH)
LAYOUT = {
    "GatedDeltaNet": {
        "A_log": PER_HEAD, "D": PER_HEAD, "dt_bias": PER_HEAD, "a_proj.weight": TO_HEADS,
        "b_proj.weight": TO_HEADS, "g_proj.weight": TO_HEADS, "o_norm.weight": (WIDTH,),
        "o_proj.weight": OUT,
    },
    "DeltaNet": {
        "b_proj.weight": TO_HEADS, "g_proj.weight": TO_HEADS, "o_norm.weight": (WIDTH,),
        "o_proj.weight": OUT,
    },
    "Mamba2": {
        "A_log": PER_HEAD, "dt_bias": PER_HEAD, "dt_proj.weight": TO_HEADS,
        "dt_proj.bias": PER_HEAD, "g_proj.weight": TO_HEADS, "g_proj.bias": PER_HEAD,
        "norm.weight": (HEADS * WIDTH,), "o_proj.weight": OUT,
    },
}  # fmt: skip
"""Name in a layer's `ahn.fn` -> shape."""


RULES = {"GatedDeltaNet": "gated_delta", "DeltaNet": "delta", "Mamba2": "ssd"}


def qwen(layers=2, **changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 61, "hidden_size": HIDDEN, "intermediate_size": 48,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": None,
        "eos_token_id": None,
    }  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**sizes | changes)).eval()


def small(**changes):
    return AHNConfig(sliding_window=WINDOW, num_sink_tokens=SINKS, **changes)


def release(folder: Path, kind, layers=2, dtype=torch.float32, **fields) -> Path:
    """A folder as the authors upload it; D as it starts."""
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"model.layers.{layer}.ahn.fn.{name}": torch.randn(shape, generator=generator)
        .mul(0.5)
        .to(dtype)
        if name != "D"
        else torch.ones(shape, dtype=dtype)
        for layer in range(layers)
        for name, shape in LAYOUT[kind].items()
    }
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 61,
        "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": layers,
        "num_attention_heads": HEADS, "num_key_value_heads": 2,
        "_layer_implementation": "Qwen2MemDecoderLayer", "_ahn_implementation": kind,
        "sliding_window": WINDOW, "sliding_window_type": "random", "ahn_position": "random",
        "fa_layer_ids": "", "use_ahn_router": False, "use_q_proj": False, "loss_type": ["kl"],
        "save_ahn_only": True,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def by_hand(found, p, kind, *, late=0, mamba_scale=1.0):
    """What the release adds to the local attention, [T, H, V], one token at a time."""
    groups = HEADS // found.key.shape[1]
    q, x = found.query[0], found.hidden[0]
    k, v = (y[0].repeat_interleave(groups, 0) for y in (found.key, found.value))
    scale = mamba_scale if kind == "Mamba2" else WIDTH**-0.5
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    state, length = torch.zeros(HEADS, WIDTH, WIDTH), x.shape[0]
    out = torch.zeros(length, HEADS, WIDTH)
    for t in range(WINDOW + SINKS + late, length):
        leaver = t - WINDOW - late
        if kind == "Mamba2":
            dt = softplus(p["dt_proj.weight"] @ x[leaver] + p["dt_proj.bias"] + p["dt_bias"])
            decay, write = (-p["A_log"].exp() * dt).exp(), dt
        else:
            write = (p["b_proj.weight"] @ x[leaver]).sigmoid()
            decay = torch.ones(HEADS)
        if kind == "GatedDeltaNet":
            step = softplus(p["a_proj.weight"] @ x[leaver] + p["dt_bias"])
            decay = (-p["A_log"].exp() * step).exp()
        state = state * decay[:, None, None]
        known = torch.einsum("hkv,hk->hv", state, k[:, leaver])
        missing = v[:, leaver] - (0 if kind == "Mamba2" else known)
        state = state + torch.einsum("h,hk,hv->hkv", write, k[:, leaver], missing)
        read = torch.einsum("hkv,hk->hv", state, q[:, t]) * scale
        gate = p["g_proj.weight"] @ x[t] + p.get("g_proj.bias", torch.zeros(HEADS))
        gate = (gate * gate.sigmoid())[:, None]
        if kind == "Mamba2":
            whole = (read * gate).flatten()
            normed = whole / (whole.square().mean() + 1e-5).sqrt() * p["norm.weight"]
            normed = normed.view(HEADS, WIDTH)
        else:
            size = (read.square().mean(-1, keepdim=True) + 1e-5).sqrt()
            normed = read / size * p["o_norm.weight"] * gate
        out[t] = torch.einsum("gi,gio->go", normed, p["o_proj.weight"])
    return out


@pytest.mark.parametrize("kind", list(LAYOUT))
def test_an_imported_adapter_computes_the_authors_formulas(kind, tmp_path):
    """From the tensors of the file. Witnesses: the leaver one token late; the gates exchanged; for
    Mamba2 the scale of the other rules."""
    folder = release(tmp_path / "release", kind, layers=1)
    model = import_ahn(qwen(layers=1), folder, num_sink_tokens=SINKS)
    found = attention_of(model, IDS)
    with writes_disabled(model):
        local = attention_of(model, IDS)
    added = (found.output - local.output)[0]
    tensors = load_file(folder / "model.safetensors")
    p = {name.removeprefix("model.layers.0.ahn.fn."): x for name, x in tensors.items()}
    assert apart(added, by_hand(found, p, kind)) < ONE_LAYER
    assert apart(added, by_hand(found, p, kind, late=1)) > WRONG
    first = "dt_proj.weight" if kind == "Mamba2" else "b_proj.weight"
    swapped = p | {first: p["g_proj.weight"], "g_proj.weight": p[first]}
    assert apart(added, by_hand(found, swapped, kind)) > WRONG


def test_the_released_mamba2_does_not_scale_its_reads(tmp_path):
    """With small gates the norm's epsilon counts, and a scaled read is another function."""
    folder = release(tmp_path / "release", "Mamba2", layers=1)
    tensors = load_file(folder / "model.safetensors")
    p = {name.removeprefix("model.layers.0.ahn.fn."): x for name, x in tensors.items()}
    for name in ("g_proj.weight", "g_proj.bias"):
        p[name].mul_(0.01)
    save_file(tensors, folder / "model.safetensors")
    model = import_ahn(qwen(layers=1), folder, num_sink_tokens=SINKS)
    found = attention_of(model, IDS)
    with writes_disabled(model):
        added = (found.output - attention_of(model, IDS).output)[0]
    assert apart(added, by_hand(found, p, "Mamba2")) < 10 * ONE_LAYER  # divided by small reads
    assert apart(added, by_hand(found, p, "Mamba2", mamba_scale=WIDTH**-0.5)) > WRONG


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", list(LAYOUT))
def test_there_and_back_is_bit_equal(kind, dtype, tmp_path):
    folder = release(tmp_path / "release", kind, dtype=dtype, num_attn_sinks=SINKS)
    model = import_ahn(qwen(), folder)
    assert patched_config(model) == small(rule=RULES[kind])
    assert "ahn" in describe(model)
    export_ahn(model, tmp_path / "again")
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(ours[name].dtype == dtype for name in theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again")
    )
    free = {"sliding_window_type", "ahn_position", "loss_type"}  # of training
    assert {k: v for k, v in before.items() if k not in free}.items() <= after.items()
    assert after["rope_theta"] == 10000.0
    assert after["rope_scaling"] is None
    again = import_ahn(qwen(), tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        assert not torch.equal(qwen()(IDS).logits, model(IDS).logits)


def test_layers_with_full_attention_stay_as_they_are(tmp_path):
    """Their files hold tensors of such layers too, which nothing reads."""
    folder = release(tmp_path / "release", "DeltaNet", layers=3, fa_layer_ids="0, 2")
    model = import_ahn(qwen(3), folder)
    assert patched_config(model) == AHNConfig(
        rule="delta", sliding_window=WINDOW, num_sink_tokens=0, layers_to_transform=(1,)
    )
    export_ahn(model, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["fa_layer_ids"] == "0,2"
    again = import_ahn(qwen(3), tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_window_of_ones_own(tmp_path):
    folder = release(tmp_path / "release", "DeltaNet", sliding_window=None)
    model = import_ahn(qwen(), folder, sliding_window=5, num_sink_tokens=2)
    assert patched_config(model) == AHNConfig(rule="delta", sliding_window=5, num_sink_tokens=2)
    with pytest.raises(ConfigError, match="sliding_window=None"):
        import_ahn(qwen(), folder)


def test_qwen3_goes_the_same_way(tmp_path):
    model = activate(patch(build("qwen3"), small()))
    export_ahn(model, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["_layer_implementation"] == "Qwen3MemDecoderLayer"
    again = import_ahn(build("qwen3"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_the_commands_go_there_and_back(tmp_path):
    qwen().save_pretrained(tmp_path / "base")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    ).save_pretrained(tmp_path / "base")
    folder = release(tmp_path / "release", "GatedDeltaNet")
    for words in (
        f"import-ahn {folder} --base {tmp_path / 'base'} -o {tmp_path / 'memory'} --window 5",
        f"export-ahn {tmp_path / 'memory'} -o {tmp_path / 'again'}",
    ):
        done = CliRunner().invoke(app, words.split())
        assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "again" / "config.json").read_text())["sliding_window"] == 5
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


FIRST = "model.layers.0.ahn.fn."


def edit(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x.pop(FIRST + "A_log"), f"missing: {FIRST}A_log, F32 \\[4\\]"),
        (lambda x: x.update({FIRST + "q_proj.weight": torch.ones(4)}), "unexpected: .*q_proj"),
        (lambda x: x.update({"lm_head.weight": torch.ones(2)}), "unexpected: lm_head"),
        (
            lambda x: x.update({FIRST + "o_proj.weight": torch.ones(4, 8, 7)}),
            "o_proj.weight: expected F32 \\[4, 8, 8\\], found F32 \\[4, 8, 7\\]",
        ),
        (
            lambda x: x.update({FIRST + "D": torch.ones(4, dtype=torch.int64)}),
            "D: expected F32 \\[4\\], found I64",
        ),
        (lambda x: x[FIRST + "dt_bias"].fill_(float("nan")), "not finite in .*dt_bias"),
    ],
)
def test_other_tensors_are_named_and_refused(change, words, tmp_path):
    folder = release(tmp_path / "release", "GatedDeltaNet")
    edit(folder, change)
    model = qwen()
    with pytest.raises(CheckpointError, match=words):
        import_ahn(model, folder)
    assert is_untouched(model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": 64}, "another base .*\n.*hidden_size: 32, the release was made for 64"),
        ({"model_type": "qwen3"}, "model_type: qwen2, the release was made for qwen3"),
        ({"vocab_size": None}, "vocab_size: 61, the release was made for None"),
        ({"_ahn_implementation": "GLA"}, "_ahn_implementation='GLA'; .*GatedDeltaNet"),
        ({"_ahn_implementation": None}, "no release"),
        ({"use_q_proj": True}, "use_q_proj: no published adapter has this part"),
        ({"use_ahn_router": True}, "use_ahn_router"),
        ({"fa_layer_ids": "first"}, "fa_layer_ids='first'"),
        ({"_ahn_implementation": "DeltaNet"}, "unexpected: .*A_log"),
    ],
)
def test_other_configs_are_refused(fields, words, tmp_path):
    folder = release(tmp_path / "release", "GatedDeltaNet", **fields)
    model = qwen()
    with pytest.raises(CheckpointError, match=words):
        import_ahn(model, folder)
    assert is_untouched(model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_both_files_are_needed(name, tmp_path):
    folder = release(tmp_path / "release", "DeltaNet")
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"No {name} in"):
        import_ahn(qwen(), folder)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="hf download"):
        import_ahn(qwen(), folder)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is depr:FutureWarning")
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: qwen(), StateError, "not patched"),
        (
            lambda: patch(qwen(), WindowSinksConfig(sliding_window=WINDOW)),
            StateError,
            "holds AHN memories",
        ),
        (lambda: patch(llama(), small()), ConfigError, "model_type='llama'"),
        (
            lambda: patch(
                qwen(), small(state_heads="key_value", key_space="pre_rope", center_keys=True)
            ),
            ConfigError,
            "3 problems(.|\n)*state_heads='key_value'",
        ),
        (
            lambda: get_peft_model(patch(qwen(), small()), LoraConfig(target_modules=["q_proj"])),
            StateError,
            "no place for the PEFT adapter",
        ),
    ],
)
def test_what_the_layout_cannot_hold_is_not_written(make, error, words, tmp_path):
    model = make()
    with pytest.raises(error, match=words):
        export_ahn(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
