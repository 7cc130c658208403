"""Self-distillation: which positions, which teacher, what trains, what stays."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from training.tiny import awake, base, distilled, patched, rows

from memretrofit import AHNConfig, LoLCATsConfig
from memretrofit.errors import StateError
from memretrofit.patching.controls import window_override
from memretrofit.retrofit import unpatch
from memretrofit.training import DistillSettings, self_distillation, trainable_parameters
from memretrofit.training.distill import _DistillTrainer, last_checkpoint

WINDOWS = {"windows": (8, 16), "sinks": (2,)}


def kl_by_hand(teacher, student, first):
    """Mean over rows and positions t >= first, one position at a time."""
    terms = []
    for row_p, row_q in zip(teacher, student, strict=True):
        for p, q in list(zip(row_p, row_q, strict=True))[first:]:
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            terms.append((log_p.exp() * (log_p - log_q)).sum().item())
    return sum(terms) / len(terms)


@pytest.mark.parametrize("positions", ["past_window", "all"])
def test_the_loss_is_about_positions_past_the_window(tmp_path, positions):
    model, data = awake(patched()), rows(count=2)
    ids = torch.stack([row["input_ids"] for row in data])
    with torch.no_grad():
        teacher = base()(ids).logits
        with window_override(model, sliding_window=8, num_sink_tokens=2):
            student = model(ids, use_cache=False).logits
    settings = DistillSettings(max_steps=1, windows=(8,), sinks=(2,), loss_positions=positions)
    *_, steps = distilled(model, settings, tmp_path, data=data)
    exact = 8 + 2
    expected = kl_by_hand(teacher, student, exact if positions == "past_window" else 0)
    assert steps[0].loss == pytest.approx(expected, rel=1e-4)
    if positions == "past_window":
        for wrong in (exact - 1, exact + 1):
            assert abs(kl_by_hand(teacher, student, wrong) / expected - 1) > 1e-3
    # the position before the first has nothing to learn
    assert kl_by_hand(teacher[:, :exact], student[:, :exact], 0) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("mode", ["memory", "memory+lora"])
def test_the_teacher_is_the_base(tmp_path, mode):
    """Bit for bit, whatever memory and adapters hold, and in training mode."""
    model = awake(patched())
    wrapped, promised = trainable_parameters(model, mode, lora_rank=2)
    with torch.no_grad():
        for parameter in promised.values():
            parameter += 0.1
    trainer = _DistillTrainer(wrapped, promised, rows(), DistillSettings(), tmp_path, None)
    wrapped.train()
    ids = rows()[0]["input_ids"][None]
    expected = base()(ids).logits
    assert torch.equal(trainer._teacher_logits(ids, {"use_cache": False}), expected)
    assert not torch.equal(wrapped(input_ids=ids, use_cache=False).logits, expected)
    assert all(parameter.requires_grad for parameter in promised.values())
    assert wrapped.training


@pytest.mark.parametrize("method", [AHNConfig(sliding_window=16), LoLCATsConfig(sliding_window=16)])
@pytest.mark.parametrize("mode", ["memory", "memory+lora"])
def test_everything_promised_trains_and_the_base_does_not(tmp_path, method, mode):
    model, fresh = patched(method), base()
    _, promised = trainable_parameters(patched(method), mode, lora_rank=2)
    before = {name: p.detach().clone() for name, p in promised.items() if ".memory." in name}
    settings = DistillSettings(max_steps=4, save_steps=2, learning_rate=1e-2, **WINDOWS)
    wrapped, promised, _ = distilled(model, settings, tmp_path, mode=mode)
    for name, value in before.items():
        assert not torch.equal(promised[name], value), name
    if mode == "memory+lora":
        assert all(p.count_nonzero() for name, p in promised.items() if "lora_B" in name)
        model = wrapped.unload()
    saved = load_file(last_checkpoint(tmp_path) / "trained.safetensors")
    assert saved.keys() == promised.keys()
    assert all(torch.equal(saved[name], promised[name]) for name in saved)
    assert not model.training
    found, expected = unpatch(model).state_dict(), fresh.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_learns(tmp_path):
    """Four random rows, again and again: random tokens have nothing else to learn."""
    settings = DistillSettings(max_steps=30, learning_rate=3e-2, batch_size=4, **WINDOWS)
    model = patched(LoLCATsConfig(sliding_window=16))
    *_, steps = distilled(model, settings, tmp_path, data=rows(count=4))
    for window in (8, 16):
        losses = [step.loss for step in steps if step.draw.sliding_window == window]
        assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    "same",
    [
        {"gradient_checkpointing": True},
        {"batch_size": 1, "gradient_accumulation_steps": 2},
    ],
)
def test_how_a_step_is_computed_does_not_matter(tmp_path, same):
    settings = {"max_steps": 3, "learning_rate": 1e-2, **WINDOWS}
    *_, plain = distilled(patched(), DistillSettings(**settings), tmp_path / "a")
    *_, other = distilled(patched(), DistillSettings(**{**settings, **same}), tmp_path / "b")
    for a, b in zip(plain, other, strict=True):
        assert b.loss == pytest.approx(a.loss, rel=1e-4)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3)
        assert a.draw == b.draw


def test_half_precision_is_near_and_leaves_the_model_as_it_was(tmp_path):
    settings = {"max_steps": 2, "learning_rate": 1e-2, **WINDOWS}
    *_, plain = distilled(patched(), DistillSettings(**settings), tmp_path / "a")
    model, _, half = distilled(patched(), DistillSettings(bf16=True, **settings), tmp_path / "b")
    assert half[0].loss == pytest.approx(plain[0].loss, rel=0.05)
    assert half[0].loss != plain[0].loss
    assert "forward" not in vars(model), "autocast was left around the forward"


def test_it_goes_on_where_it_was(tmp_path):
    settings = DistillSettings(max_steps=6, save_steps=2, gradient_accumulation_steps=2, **WINDOWS)
    whole, _, expected = distilled(patched(), settings, tmp_path / "whole")

    class Killed(Exception):
        pass

    def stop(step):
        if step.step == 5:
            raise Killed

    model, promised = trainable_parameters(patched())
    with pytest.raises(Killed):
        self_distillation(model, promised, rows(), settings, tmp_path / "cut", on_step=stop)
    # a checkpoint that a kill cut off is not taken
    (tmp_path / "cut" / "checkpoint-5").mkdir()
    model, promised = trainable_parameters(patched(seed=0))
    steps = []
    self_distillation(
        model, promised, rows(), settings, tmp_path / "cut", resume=True, on_step=steps.append
    )
    assert steps == expected[4:]
    pairs = zip(whole.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_rows_inside_the_window_give_a_loss_of_zero(tmp_path):
    """Some draws may leave nothing to learn; the run goes on."""
    settings = DistillSettings(max_steps=6, windows=(8, 100), sinks=(2,), save_steps=100)
    *_, steps = distilled(patched(), settings, tmp_path)
    assert {step.draw.sliding_window for step in steps} == {8, 100}
    assert all((step.loss == 0) == (step.draw.sliding_window == 100) for step in steps)
    with pytest.raises(StateError, match="never longer than the window"):
        distilled(patched(), replace(settings, windows=(100,)), tmp_path / "never")


def test_a_promise_that_is_not_kept_is_an_error(tmp_path):
    model, promised = trainable_parameters(patched())
    promised["model.layers.0.self_attn.memory.lost"] = nn.Parameter(torch.zeros(3))
    settings = DistillSettings(max_steps=5, save_steps=100, **WINDOWS)
    with pytest.raises(StateError, match=r"in 3 steps: model\.layers\.0\.self_attn\.memory\.lost"):
        self_distillation(model, promised, rows(), settings, tmp_path)
