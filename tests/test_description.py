"""The table of a patched model: its cache bytes are those of a cache that really was filled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import memretrofit
from memretrofit import (
    AHNConfig,
    LoLCATsConfig,
    StreamingLLMConfig,
    WindowSinksConfig,
    patch,
    unpatch,
)
from memretrofit.description import LENGTHS, _costs, base_parameters, cache_bytes_at, render
from memretrofit.errors import StateError
from memretrofit.methods import available_methods
from memretrofit.methods.infllm import InfLLMConfig
from memretrofit.modules.rolling import SPARE_COLUMNS
from memretrofit.patching.cache import MemoryLayer
from memretrofit.patching.surgery import attention_ledger_of
from memretrofit.retrofit import ledger_of, memory_parameters

WINDOW, SINKS = 12, 3
KEPT = WINDOW + SINKS
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 2, **changes}))


def neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def gemma() -> Any:
    """Sliding layers beside full ones."""
    layers = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    sizes = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 8}
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=20, layer_types=layers))


def deepseek() -> Any:
    """Latents in the cache, other shapes at attention."""
    sizes = {
        **SIZES,
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "first_k_dense_replace": 2,
    }
    return DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))


WINDOWED = {"sliding_window": WINDOW, "num_sink_tokens": SINKS}
CASES = {
    "llama-gdn": (llama, AHNConfig(**WINDOWED)),
    "llama-delta": (llama, AHNConfig(rule="delta", state_heads="key_value", **WINDOWED)),
    "llama-pre-rope": (llama, AHNConfig(key_space="pre_rope", **WINDOWED)),
    "llama-lolcats": (llama, LoLCATsConfig(**WINDOWED)),
    "llama-one-layer": (llama, AHNConfig(layers_to_transform=(1,), **WINDOWED)),
    "llama-window": (llama, WindowSinksConfig(**WINDOWED)),
    "llama-streaming": (llama, StreamingLLMConfig(**WINDOWED)),
    "neox-gdn": (neox, AHNConfig(**WINDOWED)),
    "gemma-gdn": (gemma, AHNConfig(**WINDOWED)),
    "deepseek-gdn": (deepseek, AHNConfig(**WINDOWED)),
}
TOKENS = (1, 7, KEPT, KEPT + 1, 40, KEPT + SPARE_COLUMNS, KEPT + SPARE_COLUMNS + 1, 200)


@torch.no_grad()
def read(model: Any, tokens: int, chunk: int | None = None) -> DynamicCache:
    """The cache after `tokens` tokens, in one pass or in chunks."""
    cache = DynamicCache(config=model.config)
    for ids in (torch.arange(tokens) % 61)[None].split(chunk or tokens, dim=1):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def held(cache: DynamicCache) -> int:
    return sum(
        layer.nbytes()
        if isinstance(layer, MemoryLayer)
        else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_a_filled_cache(case: str) -> None:
    make, config = CASES[case]
    model = make().eval()
    base = [held(read(model, tokens)) for tokens in TOKENS]
    patch(model, config)
    assert [cache_bytes_at(model, tokens) for tokens in TOKENS] == list(
        zip(base, [held(read(model, tokens)) for tokens in TOKENS], strict=True)
    )


def test_bytes_follow_the_dtype() -> None:
    model = llama().eval()
    patch(model, WindowSinksConfig(**WINDOWED))
    before, after = cache_bytes_at(model, 200)
    model.bfloat16()
    assert cache_bytes_at(model, 200) == (before // 2, after // 2)


def test_what_the_prediction_must_not_forget() -> None:
    """The witness: each part that a memory keeps moves the number."""
    at = {name: cache_bytes_at(patch(CASES[name][0](), CASES[name][1]), 200)[1] for name in CASES}
    columns, layers, word = KEPT + SPARE_COLUMNS, 2, 4
    state = layers * 4 * 8 * 8 * word
    features = layers * columns * 8 * word
    assert at["llama-gdn"] - at["llama-window"] == state + features
    assert at["llama-pre-rope"] - at["llama-gdn"] == layers * columns * 2 * 8 * word
    assert at["llama-delta"] - at["llama-window"] == state // 2 + features // 4


@pytest.mark.parametrize("chunk", [1, 2, 90])
@pytest.mark.parametrize("case", ["llama-gdn", "llama-pre-rope", "deepseek-gdn"])
def test_a_full_window_costs_the_same_however_it_was_filled(case: str, chunk: int) -> None:
    make, config = CASES[case]
    model = patch(make().eval(), config)
    assert held(read(model, 200, chunk)) == cache_bytes_at(model, 200)[1]


def test_a_window_that_fills_token_by_token_has_spare_room_at_most() -> None:
    model = patch(llama().eval(), CASES["llama-gdn"][1])
    column = cache_bytes_at(model, 2)[1] - cache_bytes_at(model, 1)[1]
    for tokens in range(1, KEPT + 1):
        spare = held(read(model, tokens, 1)) - cache_bytes_at(model, tokens)[1]
        assert 0 <= spare <= SPARE_COLUMNS * column


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(training: bool) -> None:
    model = patch(llama(attention_dropout=0.5), AHNConfig(**WINDOWED)).train(training)
    model.model.layers[0].eval()
    # Transformers is renaming it
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    assert cache_bytes_at(model, 10) == cache_bytes_at(model, 10)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not ledger_of(model).controls.disabled


def test_the_table() -> None:
    model = patch(llama(num_hidden_layers=5), AHNConfig(**WINDOWED))
    text = memretrofit.describe(model)
    layers = [line.split() for line in text.splitlines() if "self_attn" in line]
    added = sum(p.numel() for p in memory_parameters(model).values())
    base = sum(p.numel() for p in llama(num_hidden_layers=5).parameters())
    assert layers == [["0-4", "model.layers.*.self_attn", "ahn", f"{added // 5:,}", "4", "2", "8"]]
    share = f"{100 * added / base:.2f}%"
    assert f"added parameters: {added:,} ({share} of the base model's {base:,})" in text
    for tokens, shown in zip(LENGTHS, ("1k", "8k", "32k", "128k"), strict=True):
        before, after = cache_bytes_at(model, tokens)
        row = next(line.split() for line in text.splitlines() if line.split()[:1] == [shown])
        assert row[-1] == f"{100 * after / before:.1f}%"
        assert row[1:3] == [f"{before / 2 ** (20 if before >= 2**20 else 10):.1f}", row[2]]
    assert "float32" in text
    assert text == memretrofit.describe(model)
    assert max(map(len, text.splitlines()[1:])) <= 110


def test_the_table_says_why_a_layer_was_left_alone() -> None:
    model = gemma()
    rows = [
        (line.split()[0], "none: " in line)
        for line in render(patch(model, AHNConfig(**WINDOWED)), ledger_of(model)).splitlines()
        if "self_attn" in line
    ]
    assert rows == [("0-1", True), ("2", False), ("3", True)]
    assert "native sliding window" in render(model, ledger_of(model))
    chosen = patch(llama(), CASES["llama-one-layer"][1])
    assert "none: not in layers_to_transform" in render(chosen, ledger_of(chosen))


def test_a_model_without_weights() -> None:
    """`memretrofit describe --base` builds on the meta device."""
    config = AHNConfig(**WINDOWED)
    with torch.device("meta"):
        model = llama()
    here = patch(llama(), config)
    patch(model, config)
    assert render(model, ledger_of(model)) == render(here, ledger_of(here))


@pytest.mark.parametrize("name", available_methods())
def test_every_method_is_described_without_weights(name: str) -> None:
    with torch.device("meta"):
        model = llama(max_position_embeddings=4096, num_hidden_layers=3)
    assert "added" in memretrofit.describe(patch(model, available_methods()[name].config_class()))


def test_an_unpatched_model() -> None:
    model = unpatch(patch(llama(), AHNConfig(**WINDOWED)))
    with pytest.raises(StateError, match="not patched"):
        memretrofit.describe(model)
    with pytest.raises(StateError, match="not patched"):
        cache_bytes_at(model, 10)


def test_base_parameters_are_those_of_the_base() -> None:
    model = llama(tie_word_embeddings=True)
    expected = dict(model.named_parameters())
    patch(model, AHNConfig(**WINDOWED))
    found = dict(base_parameters(model))
    assert found.keys() == expected.keys()
    assert all(found[name] is parameter for name, parameter in expected.items())


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_what_lies_elsewhere_is_told_apart(placement: str) -> None:
    """By hand: keys and values of a block in float32; slots, summaries and window on the device."""
    config = InfLLMConfig(**WINDOWED, block_size=8, placement=placement)
    model = patch(llama(), config)
    (before, _), (cost, _) = _costs(model)
    left = 64 * 8  # tokens that left, in whole blocks
    store = left * 2 * (8 + 8) * 4
    small = left * 8 + left // 8 * 2 * 8 * 4
    window = (KEPT + SPARE_COLUMNS) * 3 * 2 * 8 * 4  # keys, keys before their rotation, values
    assert cost.tiers(KEPT + left) == {"device": window + small, placement: store}
    assert cost.at(KEPT + left) == window + small + store
    assert before.tiers(KEPT + left).keys() == {"device"}
    lines = render(model, attention_ledger_of(model)).splitlines()
    (head,) = [line for line in lines if line.strip().startswith("cache at tokens")]
    assert head.split()[-2:] == ["device", placement]
    assert next(x for x in lines if x.strip().startswith("128k")).count("iB") == 4
    plain = patch(llama(), InfLLMConfig(**WINDOWED, block_size=8))
    assert placement not in render(plain, attention_ledger_of(plain)).split("cache at tokens")[1]


def test_a_store_says_what_a_filled_one_has() -> None:
    """Per tier, of a cache that was filled; room for growth and what is there twice apart."""
    config = InfLLMConfig(**WINDOWED, block_size=8, placement="host", hot_bytes=0)
    model = patch(llama(), config)
    with torch.no_grad():
        cache = model(torch.ones(1, KEPT + 64, dtype=torch.long), use_cache=True).past_key_values
    (store,) = cache.layers[0].state
    held = store.keys.pieces(8)[-1].nbytes + store.values.pieces(8)[-1].nbytes
    memory = model.model.layers[0].self_attn.memory
    assert memory.tier_nbytes(64)["host"] == held
