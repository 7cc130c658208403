"""ARMT against its docstring, one vector at a time, and against the base model where it must be
that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from contract.arms import activate
from contract.families import build, tokens
from contract.runs import apart, in_pieces, left_padded, one_pass
from methods.armt_by_hand import ByHand
from tolerances import REORDERED, WRONG
from transformers import Cache

from memretrofit.errors import ConfigError
from memretrofit.methods.armt import ARMT_BABILONG, ARMT_RETRIEVAL, ARMT_WIKITEXT, ARMTConfig
from memretrofit.modules.associative import AssociativeLayer
from memretrofit.modules.segment_memory import Columns, Part
from memretrofit.patching.controls import memory_silenced, writes_disabled
from memretrofit.retrofit import memory_parameters, patch

LENGTH = 8
CONFIG = ARMTConfig(segment_length=LENGTH, num_memory_tokens=3, memory_dim=8)
DENSE = ["llama", "qwen3", "gemma3", "gpt_neox"]


def fresh(family: str = "llama", config: ARMTConfig = CONFIG, **options):
    torch.manual_seed(0)
    return patch(build(family, **options), config)


def state_of(cache: Cache) -> dict[str, torch.Tensor]:
    (layer,) = cache.layers
    return layer.state  # type: ignore[attr-defined]


@pytest.mark.parametrize("config", [CONFIG, replace(ARMT_RETRIEVAL, memory_dim=8)])
def test_logits_are_the_equations(config):
    """Witnesses: keys from the wrong side of the layer, no delta rule, no correction, no state."""
    model, ids = activate(fresh(config=config)), tokens(1, 4 * config.segment_length + 3)
    found = one_pass(model, ids)[0]
    assert apart(found, ByHand(build("llama"), model, config).logits(ids[0])) < REORDERED
    for wrong in ("input", "no delta", "no correction"):
        by_hand = ByHand(build("llama"), model, config, wrong=wrong)
        assert apart(found, by_hand.logits(ids[0])) > WRONG
    with memory_silenced(model):
        assert apart(found, one_pass(model, ids)[0]) > WRONG


@pytest.mark.parametrize("family", DENSE)
@pytest.mark.parametrize("ends", [[], [3, LENGTH, 2 * LENGTH + 1, 2 * LENGTH + 2]])
def test_a_fresh_patch_is_the_base_model_on_each_segment(family, ends):
    """Bit for bit, in one pass and on a cache that is filled piece by piece. Witness: not the base
    model on the whole text, and not once the values have left zero."""
    model, base, ids = fresh(family), build(family), tokens(2, 3 * LENGTH + 4)
    expected = [
        in_pieces(base, x, [end - i * LENGTH for end in ends if 0 < end - i * LENGTH < LENGTH])[0]
        for i, x in enumerate(ids.split(LENGTH, dim=1))
    ]
    found = in_pieces(model, ids, ends)[0]
    assert torch.equal(found, torch.cat(expected, dim=1))
    if not ends:
        assert torch.equal(found, one_pass(model, ids))
    assert apart(found, one_pass(base, ids)) > WRONG
    live = in_pieces(activate(model), ids, ends)[0]
    assert torch.equal(live[:, :LENGTH], found[:, :LENGTH])
    assert apart(live[:, LENGTH:], found[:, LENGTH:]) > WRONG


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_so_it_is_with_experts_up_to_rounding(family):
    """Experts multiply the tokens that chose them together, write tokens among them."""
    model, base, ids = fresh(family), build(family), tokens(2, 3 * LENGTH)
    expected = [one_pass(base, x) for x in ids.split(LENGTH, dim=1)]
    assert apart(one_pass(model, ids), torch.cat(expected, dim=1)) < REORDERED
    assert apart(one_pass(activate(model), ids), torch.cat(expected, dim=1)) > WRONG


def test_what_was_never_written_is_never_read():
    """With writes off, or a silent memory, a trained model is the base model on each segment."""
    model, base, ids = activate(fresh()), build("llama"), tokens(2, 3 * LENGTH)
    alone = torch.cat([one_pass(base, x) for x in ids.split(LENGTH, dim=1)], dim=1)
    for switch in (writes_disabled, memory_silenced):
        with switch(model):
            assert torch.equal(one_pass(model, ids), alone)
    assert apart(one_pass(model, ids), alone) > WRONG


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_has_written_nothing_keeps_its_bits(dtype):
    """Minus zero too, beside a row that reads; and where nobody has written, the input itself."""
    layer = AssociativeLayer(hidden_size=6, memory_dim=4, num_shifts=2)
    hidden = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden[:, :, 0] = -0.0
    rows = torch.ones(2, dtype=torch.bool)
    columns = Columns(state={}, segments=rows.long(), real=None, openings=(), closings=())
    torch.nn.init.normal_(layer.value.weight)
    empty = layer.begin(2, hidden.device)
    assert layer.read(hidden, empty, replace(columns, written=False)) is hidden
    unread = layer.read(hidden, empty, columns)
    assert torch.equal(unread, hidden)
    assert torch.equal(unread.signbit(), hidden.signbit())
    full = layer.write(hidden, hidden, empty, Part(0, 2, 5, rows))
    state = {name: torch.stack([x[0], empty[name][1]]) for name, x in full.items()}
    found = layer.read(hidden, state, columns)
    assert found.dtype is dtype
    assert torch.equal(found[1].signbit(), hidden[1].signbit())
    assert torch.equal(found[1], hidden[1])
    assert apart(found[0], hidden[0]) > WRONG


def test_at_the_start_only_the_values_learn():
    """Everything else has a gradient of exactly zero; after one step all of it learns."""
    model, ids = fresh(), tokens(2, 3 * LENGTH)
    promised = memory_parameters(model)
    for parameter in promised.values():
        parameter.requires_grad_()

    def learning() -> set[str]:
        for parameter in promised.values():
            parameter.grad = None
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {n for n, p in promised.items() if p.grad is not None and bool(p.grad.any())}

    assert learning() == {n for n in promised if n.endswith("value.weight")}
    with torch.no_grad():
        for parameter in promised.values():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    assert learning() == set(promised)


def test_splits_rows_and_padding_change_nothing():
    """Logits, and the state of a row in a padded batch. Witness: the rows differ."""
    model, ids = activate(fresh()), tokens(2, 5 * LENGTH + 3)
    whole, cache = in_pieces(model, ids, [])
    assert apart(in_pieces(model, ids, [1, 7, 8, 21, 40])[0], whole) < REORDERED
    short = ids[1, : 3 * LENGTH + 5]
    batch, mask = left_padded([ids[0], short])
    found, padded = in_pieces(model, batch, [5, 30], mask=mask)
    logits, alone = in_pieces(model, short[None], [])
    assert apart(found[0], whole[0]) < REORDERED
    assert apart(found[1, -len(short) :], logits[0]) < REORDERED
    for name, x in state_of(padded).items():
        scale = x.abs().max()
        assert apart(x[0], state_of(cache)[name][0]) < REORDERED * scale
        assert apart(x[1], state_of(alone)[name][0]) < REORDERED * scale
        assert apart(x[0], x[1]) > WRONG * scale


def test_a_token_changes_nothing_before_it_and_all_that_follows():
    model, ids = activate(fresh()), tokens(1, 4 * LENGTH)
    other = ids.clone()
    other[0, LENGTH + 2] += 1
    before, after = one_pass(model, ids)[0], one_pass(model, other)[0]
    assert torch.equal(before[: LENGTH + 2], after[: LENGTH + 2])
    assert apart(before[3 * LENGTH :], after[3 * LENGTH :]) > WRONG


def test_a_state_is_float32_in_a_model_that_is_not():
    model, ids = activate(fresh().bfloat16()), tokens(2, 3 * LENGTH)
    found, cache = in_pieces(model, ids, [])
    assert found.dtype is torch.bfloat16
    assert {x.dtype for x in state_of(cache).values()} == {torch.float32}
    first = one_pass(build("llama").bfloat16(), ids[:, :LENGTH])
    assert torch.equal(found[:, :LENGTH], first)
    assert apart(found[:, LENGTH : 2 * LENGTH], first) > WRONG


def test_parameters_and_bytes_of_a_layer():
    """SmolLM2's layer: 2 E d + E^2 + E + 1 parameters, and 4 D (E + 1) bytes of state."""
    layer = AssociativeLayer(hidden_size=576, memory_dim=64, num_shifts=3)
    assert sum(p.numel() for p in layer.parameters()) == 406_081
    state = layer.begin(1, torch.device("cpu"))
    assert sum(x.nbytes for x in state.values()) == 4 * 384 * 577


def test_presets_are_the_published_sizes():
    presets = (ARMT_BABILONG, ARMT_WIKITEXT, ARMT_RETRIEVAL)
    sizes = [(c.segment_length, c.num_memory_tokens, c.memory_dim, c.num_shifts) for c in presets]
    assert sizes == [(512, 10, 64, 3), (128, 16, 96, 3), (6, 4, 64, 3)]
    assert {c.starts_from for c in presets} == {"random"}


def test_only_chosen_layers_have_a_memory():
    model = fresh(config=replace(CONFIG, layers_to_transform=(1,)))
    _, cache = in_pieces(model, tokens(1, LENGTH), [])
    assert set(state_of(cache)) == {"1.matrix", "1.norm"}
    names = {name.rpartition("memory.")[0] for name in memory_parameters(model)}
    assert names == {"model.", "model.layers.1."}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"segment_length": 4, "num_memory_tokens": 5}, "num_memory_tokens=5"),
        ({"memory_dim": 3, "num_shifts": 3}, "num_shifts=3"),
        ({"memory_dim": 1}, "memory_dim=1"),
        ({"num_shifts": 0}, "num_shifts=0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, problem):
    with pytest.raises(ConfigError, match=problem):
        ARMTConfig(**fields)
