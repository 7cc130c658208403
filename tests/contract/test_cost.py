"""I12, I13: precision of the state, and the bytes of a conversation."""

from __future__ import annotations

import copy

import pytest
import torch
from contract.arms import (
    ARMS,
    EXACT,
    LIVE,
    SINKS,
    WINDOW,
    every_arm,
    every_live,
    grows,
    patched,
    reading_all,
)
from contract.families import build, tokens
from contract.runs import apart, in_pieces, one_pass, states
from tolerances import HALF

from memretrofit.modules.rolling import SPARE_COLUMNS
from memretrofit.modules.store import Store
from memretrofit.patching.cache import MemoryLayer
from memretrofit.patching.controls import writes_disabled
from memretrofit.retrofit import memory_parameters, patch

LENGTH = 40


def memory_layers(cache) -> list[MemoryLayer]:
    found = [layer for layer in cache.layers if isinstance(layer, MemoryLayer)]
    assert found
    return found


def half_precision(family: str, arm: str, how: str):
    """A bfloat16 model that is patched, or a patched model that becomes one. It reads all: what
    half precision would choose is not compared."""
    model = build(family, layers=1)
    trained = {n: p.detach() for n, p in memory_parameters(patched(family, arm, layers=1)).items()}
    if how == "before":
        model.bfloat16()
    patch(model, reading_all(arm))
    with torch.no_grad():
        for name, parameter in memory_parameters(model).items():
            parameter.copy_(trained[name])
    return model.bfloat16() if how == "after" else model


def distance(family: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference. A router may send a token to another expert in half precision, as
    the stock model does here: two tokens of a mixture do not count."""
    spare = 2 if family in ("mixtral", "deepseek_v3") else 0
    per_token = (found - expected).abs().amax(-1).flatten().sort().values
    return per_token[-1 - spare].item()


@pytest.mark.parametrize("how", ["before", "after"])
@every_live
def test_a_half_precision_model_has_a_float32_state(family, arm, how):
    """Logits are finite and near those of float32, in one pass and in pieces; without writes
    they would not be."""
    reference, model, ids = (
        patched(family, arm, layers=1, reads_all=True),
        half_precision(family, arm, how),
        tokens(2, LENGTH),
    )
    expected = one_pass(reference, ids)
    found = one_pass(model, ids)
    pieces, cache = in_pieces(model, ids, (7, 13, 14, 15))
    assert found.dtype == torch.bfloat16
    tolerance = HALF * expected.abs().max().item()
    for logits in (found, pieces):
        assert logits.isfinite().all()
        assert distance(family, logits.float(), expected) < tolerance
    summed = [x for layer in memory_layers(cache) for x in layer.state if not isinstance(x, Store)]
    assert all(x.dtype == torch.float32 for x in summed)
    if states(cache):
        with writes_disabled(reference):
            assert distance(family, one_pass(reference, ids), expected) > tolerance


@every_arm
def test_autocast_leaves_the_state_in_float32(arm):
    model, ids = patched("llama", arm, layers=1, reads_all=True), tokens(2, LENGTH)
    expected = one_pass(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, cache = in_pieces(model, ids, (20, 21))
    summed = [x for layer in memory_layers(cache) for x in layer.state if not isinstance(x, Store)]
    assert all(x.dtype == torch.float32 for x in summed)
    assert apart(found.float(), expected) < HALF * expected.abs().max().item()


SHAPES = {  # G, K, V of the tiny models
    "llama": (2, 8, 8),
    "qwen3": (2, 8, 8),
    "gemma3": (2, 8, 8),
    "gpt_neox": (4, 8, 8),
    "mixtral": (2, 8, 8),
    "deepseek_v3": (4, 12, 10),
}
HEADS = 4
LATENT = {"deepseek_v3": 12 + 4}
"""Numbers per token where a model's cache stores something else than keys and values (MLA)."""


def predicted_bytes(family: str, arm: str, rows: int) -> int:
    """4 bytes x (columns x numbers per column + numbers of the state), from the equations of
    each method."""
    config = ARMS[arm]
    groups, key, value = SHAPES[family]
    column, state = LATENT.get(family, groups * (key + value)), 0
    heads = groups if getattr(config, "state_heads", "query") == "key_value" else HEADS
    if config.method == "ahn":
        column += heads * (2 if config.rule == "gated_delta" else 1)
        state = heads * key * value
    elif config.method == "lolcats":
        state = heads * 2 * key * (value + 1)
    if getattr(config, "key_space", "post_rope") == "pre_rope":
        column += groups * key
    return 4 * rows * ((SINKS + WINDOW + SPARE_COLUMNS) * column + state)


KNOWN = ("ahn", "lolcats", "window_sinks", "streaming_llm")
every_counted = pytest.mark.parametrize("arm", [a for a in ARMS if ARMS[a].method in KNOWN])
every_bounded = pytest.mark.parametrize("arm", [a for a in ARMS if not grows(a)])
COUNTED = [(family, arm) for family, arm in LIVE if ARMS[arm].method in KNOWN]


@pytest.mark.parametrize(("family", "arm"), COUNTED, ids=["-".join(x) for x in COUNTED])
def test_the_bytes_of_a_conversation_are_what_shapes_predict(family, arm):
    """The same however the text arrived, once it decodes."""
    model, ids, rows = patched(family, arm), tokens(2, 150), 2
    expected = predicted_bytes(family, arm, rows)
    for ends in ((149,), (40, 41, 100, 149), (10, 11, 12, 13, 149)):
        _, cache = in_pieces(model, ids, ends)
        assert {layer.nbytes() for layer in memory_layers(cache)} == {expected}


@every_counted
def test_bytes_do_not_grow_with_the_text(arm):
    """I13, token by token: never above the prediction, and equal to it once the spare columns
    were used up once."""
    model, ids = patched("llama", arm), tokens(1, 200)
    cache, expected = None, predicted_bytes("llama", arm, rows=1)
    for t in range(200):
        _, cache = in_pieces(model, ids[:, t : t + 1], (), cache=cache)
        for layer in memory_layers(cache):
            assert layer.nbytes() <= expected
            assert t <= SPARE_COLUMNS or layer.nbytes() == expected
            assert layer.keys.shape[-2] == min(t + 1, EXACT)
            assert held(layer) <= expected


@every_counted
def test_a_long_prompt_is_not_kept_alive(arm):
    """Right after prefill: views of a few columns must not hold the storage of all."""
    model = patched("llama", arm)
    for length in (60, 150, 230):
        _, cache = in_pieces(model, tokens(1, length), ())
        for layer in memory_layers(cache):
            assert held(layer) <= predicted_bytes("llama", arm, 1)


def held(layer: MemoryLayer) -> int:
    """Bytes of the distinct storages that a layer refers to, whatever it says itself."""
    storages = {}

    def visit(value):
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (list, tuple)):
            for x in value:
                visit(x)
        elif isinstance(value, dict):
            for x in value.values():
                visit(x)
        elif hasattr(value, "__dict__"):
            visit(vars(value))

    visit(vars(layer))
    return sum(storages.values())


@every_bounded
def test_a_bounded_state_stays_as_large_as_it_says(arm):
    """Of every method whose state does not grow, token by token: once all room has been used, the
    cache of a long text is at no time larger than that of a shorter one."""
    model, ids, sizes, cache = patched("llama", arm), tokens(1, 240), [], None
    for t in range(240):
        _, cache = in_pieces(model, ids[:, t : t + 1], (), cache=cache)
        sizes.append(sum(layer.nbytes() for layer in memory_layers(cache)))
    assert max(sizes[160:]) == max(sizes[80:160])


@every_arm
def test_a_copy_of_a_cache_holds_no_more(arm):
    _, cache = in_pieces(patched("llama", arm), tokens(1, 100), (30, 99))
    twin = copy.deepcopy(cache)
    for one, other in zip(memory_layers(cache), memory_layers(twin), strict=True):
        assert held(other) <= held(one)


@every_arm
def test_assisted_decoding_keeps_few_tokens_more(arm):
    """What may still be taken back is kept: the candidates of one round, not the text."""
    model, ids = patched("llama", arm), tokens(1, 30)
    output = model.generate(
        ids,
        max_new_tokens=60,
        do_sample=False,
        assistant_model=build("llama", seed=7),
        return_dict_in_generate=True,
    )
    for layer in memory_layers(output.past_key_values):
        assert layer.keys.shape[-2] <= EXACT + 2 * 20 + 1  # 20 candidates a round at most
