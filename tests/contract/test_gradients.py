"""I11: what is trained gets its gradient, what is frozen gets none, and the gradient is the
derivative."""

from __future__ import annotations

import pytest
import torch
from contract.arms import (
    EXACT,
    HAVE_PARAMETERS,
    LIVE,
    METHODS_WITH_MEMORY,
    OFF_DEVICE,
    TRAINABLE,
    activate,
    every_memory,
    every_trainable,
    patched,
)
from contract.families import build, tokens
from contract.runs import in_pieces, one_pass, states
from torch.nn import functional as F

from memretrofit.errors import StateError
from memretrofit.patching.controls import intercepted
from memretrofit.retrofit import memory_disabled, memory_parameters

LENGTH = 30
LEARNERS = [(family, arm) for family, arm in LIVE if arm in TRAINABLE]
every_learner = pytest.mark.parametrize(
    ("family", "arm"), LEARNERS, ids=["-".join(x) for x in LEARNERS]
)


def distance(model, ids, target) -> torch.Tensor:
    return F.mse_loss(model(ids, use_cache=False).logits[:, EXACT:], target[:, EXACT:])


@every_learner
def test_every_memory_parameter_learns_by_the_second_step(family, arm):
    """A branch that starts at zero hides everything behind it for one step, and for one step
    only."""
    model, ids = patched(family, arm, live=False), tokens(2, LENGTH)
    with memory_disabled(model):
        target = one_pass(model, ids)
    parameters = memory_parameters(model)
    optimiser = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(2):
        optimiser.zero_grad()
        distance(model, ids, target).backward()
        optimiser.step()
    without = [n for n, p in parameters.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without
    others = {n: p for n, p in model.named_parameters() if n not in parameters}
    assert others
    assert all(p.grad is None for p in others.values())


@every_trainable
def test_every_memory_parameter_takes_part_inside_the_window(arm):
    """Several processes must agree on which parameters have a gradient, also where one's text is
    short."""
    model, ids = patched("llama", arm, live=False), tokens(2, EXACT - 2)
    model(ids, use_cache=False).logits.sum().backward()
    assert all(p.grad is not None for p in memory_parameters(model).values())


# Mixtral's grouped product of experts has no float64, with memory or without
DOUBLE = [(family, arm) for family, arm in LEARNERS if family != "mixtral"]


def attention_output(model, ids) -> torch.Tensor:
    """Output of the only layer's attention. Later, RMSNorm rounds to float32 even in float64."""
    seen = []

    def look(call):
        seen.append(call.remember())
        return seen[-1]

    with intercepted(model, look):
        model(ids, use_cache=False)
    ((output, _),) = seen
    return output


@pytest.mark.parametrize(("family", "arm"), DOUBLE, ids=["-".join(x) for x in DOUBLE])
def test_gradients_are_derivatives(family, arm):
    """Central differences in float64, in a random direction and in the largest entry of each
    parameter.

    Witness: a gradient that is one percent off.
    """
    model, ids = patched(family, arm, layers=1).double(), tokens(2, 18)
    other = activate(patched(family, arm, layers=1), seed=5).double()
    target = attention_output(other, ids).detach()

    def loss():
        return F.mse_loss(attention_output(model, ids), target)

    @torch.no_grad()
    def loss_at(parameter, step):
        parameter.add_(step)
        value = loss().item()
        parameter.sub_(step)
        return value

    loss().backward()
    for name, parameter in memory_parameters(model).items():
        largest = torch.zeros_like(parameter)
        largest.view(-1)[parameter.grad.abs().argmax()] = 1.0
        tolerance = 1e-5 * parameter.grad.norm().item()
        assert tolerance > 0, name
        for direction in (F.normalize(torch.randn_like(parameter), dim=None), largest):
            step = 1e-5 * direction
            slope = (loss_at(parameter, step) - loss_at(parameter, -step)) / 2e-5
            expected = (parameter.grad * direction).sum().item()
            assert abs(slope - expected) < tolerance, name
        assert abs(1.01 * slope - expected) > tolerance, name  # the largest entry, one percent off


@every_memory
def test_float64_is_float64(arm):
    """A float64 model has a float64 memory: nothing on the way rounds to float32."""
    model, ids = patched("llama", arm, layers=1).double(), tokens(1, LENGTH)
    _, cache = in_pieces(model, ids, (13, 14))
    assert all(x.dtype == torch.float64 for x in states(cache))
    pieces, _ = in_pieces(model, ids, range(1, LENGTH))
    assert (pieces - one_pass(model, ids)).abs().max() < 1e-11


@pytest.mark.parametrize("arm", sorted(METHODS_WITH_MEMORY - OFF_DEVICE))
def test_the_base_model_learns_through_the_memory(arm):
    """With LoRA or a full finetune, gradients pass through the state into the projections that
    wrote it."""
    model, ids = patched("llama", arm, layers=1, reads_all=True), tokens(1, LENGTH)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeddings, use_cache=False).logits[:, -1].sum().backward()
    assert (embeddings.grad.abs().amax(-1) > 0).all()


@pytest.mark.parametrize("arm", sorted(OFF_DEVICE))
def test_a_store_off_the_device_refuses_gradients(arm):
    """Of the memory's own parameters and of the base model's; without any it reads."""
    model, ids = patched("llama", arm, layers=1, live=False), tokens(1, LENGTH)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with pytest.raises(StateError, match="placement='device'"):
        model(inputs_embeds=embeddings, use_cache=False)
    if arm in HAVE_PARAMETERS:
        with pytest.raises(StateError, match="placement='device'"):
            model(ids, use_cache=False)
    for parameter in memory_parameters(model).values():
        parameter.requires_grad_(False)
    assert not model(ids, use_cache=False).logits.requires_grad


@pytest.mark.parametrize("reentrant", [False, True])
@every_learner
def test_gradient_checkpointing_gives_the_same_gradients(family, arm, reentrant):
    ids = tokens(2, LENGTH)
    gradients = []
    for checkpointing in (False, True):
        model = patched(family, arm).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients.append({n: p.grad for n, p in memory_parameters(model).items()})
        assert all(g.abs().max() > 0 for g in gradients[-1].values())
    plain, recomputed = gradients
    assert all(torch.equal(recomputed[name], plain[name]) for name in plain)


@every_memory
def test_a_trained_model_runs_and_is_disabled_like_a_fresh_one(arm):
    """The teacher of self-distillation: same weights, gradients off, memory off, train mode on."""
    model, ids = patched("llama", arm).train(), tokens(1, LENGTH)
    with memory_disabled(model):
        assert torch.equal(one_pass(model, ids), one_pass(build("llama"), ids))


@every_trainable
@pytest.mark.parametrize("ends", [(), (17,), tuple(range(12, LENGTH))], ids=["1", "2", "steps"])
def test_gradients_pass_through_a_cache(arm, ends):
    """Truncated or not, training may carry a cache, and a plain forward has one unless told
    otherwise.

    Forbids: sinks that are written over columns which the backward pass still needs.
    """
    ids = tokens(2, LENGTH)
    gradients = []
    for cuts in (None, ends):
        model = patched("llama", arm)
        if cuts is None:
            logits = model(ids, use_cache=False).logits
        else:
            pieces, cache, begin = [], None, 0
            for end in (*cuts, LENGTH):
                output = model(ids[:, begin:end], past_key_values=cache, use_cache=True)
                cache, begin = output.past_key_values, end
                pieces.append(output.logits)
            logits = torch.cat(pieces, dim=1)
        logits.square().mean().backward()
        gradients.append({n: p.grad for n, p in memory_parameters(model).items()})
    whole, pieces = gradients
    for name, expected in whole.items():
        assert (pieces[name] - expected).abs().max() < 1e-4 * expected.abs().max() + 1e-9, name
