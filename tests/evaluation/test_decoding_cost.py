"""Bytes from shapes, and the decoding loop against one forward. No test here looks at a clock."""

import pytest
import torch
from evaluation_cases import ROWS, tiny
from torch import nn
from transformers import DynamicCache

from memretrofit.errors import ConfigError
from memretrofit.evaluation import cache_bytes, decode_ms_per_token, prefill

IDS = ROWS[:2]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.mark.parametrize("tokens", [1, 40, 150])
def test_a_dynamic_cache_costs_its_keys_and_values(model, tokens):
    cache, _ = prefill(model, IDS[:, :tokens], chunk_size=16)
    layers, batch, heads, width, number = 2, 2, 2, 8, 4
    assert cache_bytes(cache) == 2 * layers * batch * heads * tokens * width * number
    assert cache_bytes(DynamicCache()) == 0


class Layer:
    def __init__(self, **tensors):
        self.__dict__.update(tensors)


class Counted(Layer):
    def nbytes(self):
        return 1000


def test_every_tensor_counts_once_and_by_what_it_keeps_alive():
    buffer = torch.zeros(100)
    layer = Layer(
        keys=buffer[:10], again=buffer[50:], state={"a": [torch.zeros(3, dtype=torch.bfloat16)]}
    )
    layer.itself = layer
    assert cache_bytes([layer]) == 400 + 6
    assert cache_bytes([layer, Counted(hidden=torch.zeros(50))]) == 1000 + 406


def test_modules_that_a_cache_refers_to_are_not_its_own():
    module = nn.Linear(5, 5)
    assert cache_bytes([Layer(module=module, config=tiny().config, keys=torch.zeros(2))]) == 8


def test_meta_tensors_are_counted_apart():
    layer = Layer(keys=torch.zeros(4, device="meta"), values=torch.zeros(4, device="meta"))
    assert cache_bytes(layer) == 32


@pytest.mark.parametrize("chunk_size", [1, 7, 150, None])
def test_prefill_in_chunks_is_one_pass(model, chunk_size):
    cache, logits = prefill(model, IDS, chunk_size=chunk_size)
    with torch.no_grad():
        expected = model(IDS).logits
    assert cache.get_seq_length() == 150
    assert logits.shape == (2, 101)
    assert torch.allclose(logits, expected[:, -1], atol=2e-5, rtol=0)
    assert not torch.allclose(logits, expected[:, -2], atol=2e-5, rtol=0)


def test_prefill_leaves_out_logits_that_nobody_reads(model):
    widths = []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: widths.append(out.shape[1]))
    prefill(model, IDS, chunk_size=64)
    hook.remove()
    assert widths == [1, 1, 1]


def test_decoding_steps_are_one_token_on_a_growing_cache(model):
    steps = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: steps.append(
            (kwargs["input_ids"].shape[1], kwargs["past_key_values"].get_seq_length())
            if kwargs["past_key_values"] is not None
            else None
        ),
        with_kwargs=True,
    )
    milliseconds = decode_ms_per_token(model, IDS, 3, chunk_size=None, warmup=1)
    hook.remove()
    assert steps == [None, (1, 150), (1, 151), (1, 152), (1, 153)]
    assert milliseconds > 0


def test_bad_arguments_are_named(model):
    with pytest.raises(ConfigError, match="tokens=0"):
        decode_ms_per_token(model, IDS, 0)
    with pytest.raises(ConfigError, match=r"shape \(150,\)"):
        prefill(model, IDS[0])
    with pytest.raises(ConfigError, match="chunk_size=0"):
        prefill(model, IDS, chunk_size=0)
