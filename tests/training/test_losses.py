"""The distillation loss against its definition, and its gradient."""

from __future__ import annotations

import math

import torch

from memretrofit.training.losses import forward_kl


def test_by_hand():
    """Teacher (1/2, 1/2), student (1/4, 3/4): KL = ln 2 - ln 3 / 2; not so the other way."""
    teacher = torch.tensor([[[0.0, 0.0]]])
    student = torch.tensor([[[0.0, math.log(3.0)]]])
    expected = math.log(2) - math.log(3) / 2
    assert abs(forward_kl(student, teacher).item() - expected) < 1e-6
    assert abs(forward_kl(teacher, student).item() - expected) > 1e-2


def test_pieces_do_not_matter():
    student = torch.randn(2, 7, 11, dtype=torch.double, requires_grad=True)
    teacher = torch.randn(2, 7, 11, dtype=torch.double)
    whole = forward_kl(student, teacher, rows_at_once=100)
    (gradient,) = torch.autograd.grad(whole, student)
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    plain = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") / 14
    (expected,) = torch.autograd.grad(plain, student)
    torch.testing.assert_close(whole.double(), plain, rtol=1e-6, atol=0)
    for size in (1, 3, 14):
        loss = forward_kl(student, teacher, rows_at_once=size)
        torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
        (other,) = torch.autograd.grad(loss, student)
        torch.testing.assert_close(other, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


def test_equal_distributions_are_at_zero():
    logits = torch.randn(1, 5, 9)
    assert forward_kl(logits, logits).item() == 0.0
