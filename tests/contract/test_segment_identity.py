"""What a model that reads in segments equals, and what it does not touch."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from contract.families import build, tokens
from contract.runs import apart, in_pieces, one_pass
from contract.segment_arms import (
    ARMS,
    LIVE,
    SEGMENT,
    every_arm,
    every_live,
    held,
    identity,
    ledger,
    reading,
    segment_of,
    session,
    text,
)
from tolerances import HALF, REORDERED, WRONG
from torch.nn import functional as F

from memretrofit import patch, unpatch
from memretrofit.errors import NoTargetError, StateError
from memretrofit.patching.controls import ATTRIBUTE, memory_silenced
from memretrofit.patching.segment_visit import SegmentLedger
from memretrofit.retrofit import memory_parameters

MIXED = {"mixtral", "deepseek_v3"}
"""Families whose experts multiply all columns that chose them: trailing ones move the last bits."""
DECLARED = {"armt": "no gradient through c_i", "mplus": "straight through the score of a row"}
"""Methods with a gradient that is no derivative, as their files say."""
COPIES = re.compile(r"\d+\.(pool|store_\d+)")
"""Names of states that are hidden states of the model."""
SAME = [(family, arm) for family, arm in LIVE if identity(arm) == "segment"]


@torch.no_grad()
def by_segments(model, ids: torch.Tensor, spans: tuple[int, ...]) -> torch.Tensor:
    """Logits of the base model on each segment alone. Each span's are those of a forward that ends
    with it, so that the sums are made in the same order."""
    parts = []
    for segment in ids.split(sum(spans), dim=1):
        begin = 0
        for length in spans:
            end = begin + length
            if length and begin < segment.shape[1]:
                parts.append(model(segment[:, :end], use_cache=False).logits[:, begin:])
            begin = end
    return torch.cat(parts, dim=1)


def test_every_method_that_has_segments_is_here():
    assert all(isinstance(ledger(reading("llama", arm)), SegmentLedger) for arm in ARMS)
    assert {"armt", "rmt", "hmt", "memoryllm_pool", "mplus"} <= {x.method for x in ARMS.values()}
    assert any(len(ledger(reading("llama", arm)).memory.spans) == 3 for arm in ARMS)


@pytest.mark.parametrize(("family", "arm"), SAME, ids=["-".join(x) for x in SAME])
def test_a_fresh_patch_is_the_base_model_on_each_segment(family, arm):
    """As the method file declares it: to the bit, in models that read each column by itself."""
    base, model, ids = build(family), reading(family, arm, live=False), text(arm)
    spans = ledger(model).memory.spans
    with memory_silenced(model):
        quiet = one_pass(model, ids)
    expected, first = by_segments(base, ids, spans), ids[:, : segment_of(arm)]
    assert apart(quiet, expected) <= (REORDERED if family in MIXED else 0)
    found = one_pass(model, first)
    assert apart(found, expected[:, : segment_of(arm)]) <= (REORDERED if family in MIXED else 0)
    assert apart(expected, one_pass(base, ids)) > WRONG  # witness: segments are not one text


@every_live
def test_what_was_written_is_read(family, arm):
    """Liveness: a conversation that wrote nothing has the first segment, and no other."""
    model, ids, size = reading(family, arm), text(arm), segment_of(arm)
    with memory_silenced(model):
        quiet = one_pass(model, ids)
    found = one_pass(model, ids)
    spans = ledger(model).memory.spans
    assert torch.equal(found[:, : spans[0]], quiet[:, : spans[0]])
    assert apart(found[:, size : size + 1], quiet[:, size : size + 1]) > WRONG
    assert apart(found[:, -1], quiet[:, -1]) > WRONG


@every_live
def test_unpatching_leaves_the_model_as_it_was(family, arm):
    base, ids = build(family), text(arm)
    model = build(family)
    before, modules = model.state_dict(), dict(model.named_modules())
    attributes = set(vars(model))
    for _ in range(2):
        patch(model, ARMS[arm])
        one_pass(model, ids)
        with pytest.raises(StateError, match="patched already"):
            patch(model, ARMS[arm])
        unpatch(model)
        assert dict(model.named_modules()) == modules
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], x) for name, x in before.items())
        assert set(vars(model)) == attributes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert torch.equal(one_pass(model, ids), one_pass(base, ids))


@every_arm
def test_what_is_added_is_named_and_base_weights_are_not(arm):
    model, base = reading("llama", arm), build("llama")
    added = {name for name, _ in model.named_parameters()} - {n for n, _ in base.named_parameters()}
    assert added == set(memory_parameters(model))
    assert all(".memory." in name for name in added)
    assert all(not n.endswith("state") for n in model.state_dict())


def test_layers_that_are_not_there():
    model = build("llama")
    config = ARMS["armt"]
    with pytest.raises(NoTargetError, match=r"no layers \[7\]; it has 0 to 1"):
        patch(model, type(config)(**{**vars(config), "layers_to_transform": (1, 7)}))
    assert not hasattr(model, ATTRIBUTE)


@every_live
def test_every_parameter_learns_through_what_is_carried(family, arm):
    """The loss is of the last tokens alone: what reaches the parameters went through the state. A
    sliding layer does not see rows that stand further in front than its window."""
    model, ids = reading(family, arm), text(arm)
    for parameter in memory_parameters(model).values():
        parameter.requires_grad_(True)
    logits = model(ids, use_cache=False).logits[:, -4:]
    F.cross_entropy(logits.flatten(0, 1), ids[:, -4:].flatten()).backward()
    idle = [
        name
        for name, p in memory_parameters(model).items()
        if (p.grad is None or not p.grad.abs().max() > 0)
        and not (family == "gemma3" and "layers.1." in name)
    ]
    assert not idle
    others = dict(model.named_parameters()).keys() - memory_parameters(model).keys()
    assert all(model.get_parameter(name).grad is None for name in others)


@pytest.mark.parametrize("arm", [a for a in ARMS if ARMS[a].method not in DECLARED])
def test_gradients_are_derivatives(arm):
    """In one direction, through the state of several segments. Norms of GPT-NeoX, unlike those of
    Llama, are float64 where the model is."""
    model, ids = reading("gpt_neox", arm, dtype=torch.float64), text(arm, rows=1)
    parameters = list(memory_parameters(model).values())
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def loss() -> torch.Tensor:
        logits = model(ids, use_cache=False).logits[:, -5:-1]
        return F.cross_entropy(logits.flatten(0, 1), ids[:, -4:].flatten())

    for p in parameters:
        p.requires_grad_(True)
    slopes = torch.autograd.grad(loss(), parameters, allow_unused=True)
    slope = sum((s * d).sum() for s, d in zip(slopes, directions, strict=True) if s is not None)
    values = []
    with torch.no_grad():
        for sign in (1, -2):
            for p, d in zip(parameters, directions, strict=True):
                p.add_(sign * 1e-4 * d)
            values.append(loss())
    assert abs((values[0] - values[1]) / 2e-4 - slope) < 1e-3 * max(1, abs(slope))
    assert abs(slope) > 1e-2


@every_live
def test_half_precision_keeps_what_is_computed_in_single(family, arm):
    """Copies of hidden states, which the model has in half precision, lose nothing by it."""
    model, ids = reading(family, arm, dtype=torch.bfloat16), text(arm)
    logits, cache = in_pieces(model, ids, [SEGMENT + 1])
    state = session(cache).state
    assert state
    copies = {name: x for name, x in state.items() if COPIES.fullmatch(name)}
    assert all(x.dtype is torch.bfloat16 for x in copies.values())
    computed = [x for name, x in state.items() if name not in copies and x.is_floating_point()]
    assert all(x.dtype is torch.float32 for x in computed)
    assert copies or computed
    assert logits.dtype is torch.bfloat16
    assert logits.isfinite().all()
    exact = one_pass(reading(family, arm), ids)
    first = segment_of(arm)
    assert apart(logits[:, :first], exact[:, :first]) < HALF * exact.abs().max()


@every_arm
def test_embeddings_instead_of_ids(arm):
    model, ids = reading("llama", arm), text(arm)
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        output = model(inputs_embeds=embeds, use_cache=True)
    expected, cache = in_pieces(model, ids, [])
    assert torch.equal(output.logits, expected)
    assert all(torch.equal(a, held(cache)[n]) for n, a in held(output.past_key_values).items())
    new = {"max_new_tokens": 2 * SEGMENT, "do_sample": False}
    assert torch.equal(
        model.generate(inputs_embeds=embeds, **new), model.generate(ids, **new)[:, ids.shape[1] :]
    )


@torch.no_grad()
@every_arm
def test_the_loss_is_that_of_the_logits_together(arm):
    """Targets at borders are predicted by the last token of the segment before."""
    model, ids = reading("llama", arm), text(arm)
    labels = ids.clone()
    labels[0, :3] = -100
    output = model(ids, labels=labels, use_cache=False)
    logits = output.logits[:, :-1].flatten(0, 1)
    assert output.logits.shape[:2] == ids.shape
    expected = F.cross_entropy(logits, labels[:, 1:].flatten())
    assert torch.allclose(output.loss, expected)
    border = torch.full_like(ids, -100)
    border[:, segment_of(arm)] = ids[:, segment_of(arm)]
    alone = F.cross_entropy(output.logits[:, segment_of(arm) - 1], ids[:, segment_of(arm)])
    assert torch.allclose(model(ids, labels=border, use_cache=False).loss, alone)


@torch.no_grad()
@every_arm
def test_logits_that_were_asked_for(arm):
    model, ids = reading("llama", arm), text(arm)
    whole = one_pass(model, ids)
    for keep in (1, 5, segment_of(arm) + 1, torch.tensor([0, segment_of(arm), ids.shape[1] - 1])):
        index = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
        found = model(ids, logits_to_keep=keep, use_cache=False).logits
        assert apart(found, whole[:, index]) < REORDERED
        assert found.shape == whole[:, index].shape
    assert isinstance(model(ids, return_dict=False), tuple)


@torch.no_grad()
@every_arm
def test_hidden_states_are_those_of_the_tokens(arm):
    """No column of an opening, and none that trails."""
    model, ids = reading("llama", arm), text(arm)
    output = model(ids, output_hidden_states=True, use_cache=False)
    assert len(output.hidden_states) == 3
    assert all(x.shape[:2] == ids.shape for x in output.hidden_states)
    assert torch.equal(output.logits, one_pass(model, ids))
    assert apart(model.lm_head(output.hidden_states[-1]), output.logits) < REORDERED


@every_arm
def test_a_copied_model_stands_alone(arm):
    """By deepcopy and through a pickle: it reads its own embeddings and parameters."""
    ids = tokens(2, 2 * segment_of(arm) + 1)
    for twinned in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        model = reading("llama", arm)
        expected = one_pass(model, ids)
        twin = twinned(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(one_pass(twin, ids), expected)
