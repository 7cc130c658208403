"""Scores against the textbook formula, and what an arm may rely on: its context and its batch."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from evaluation_cases import ROWS, tiny
from torch.nn import functional

from memretrofit.errors import ConfigError, StateError
from memretrofit.evaluation import compare_arms, score_rows


@pytest.fixture(scope="module")
def model():
    return tiny()


def sharpened(model, factor):
    """An arm: the same model with its output weights scaled."""

    @contextmanager
    def arm():
        with torch.no_grad():
            model.lm_head.weight.mul_(factor)
        try:
            yield
        finally:
            with torch.no_grad():
                model.lm_head.weight.div_(factor)

    return arm


def test_scores_are_the_textbook_formula(model):
    arms = {"half": sharpened(model, 0.5)}
    scores = compare_arms(
        model, ROWS, arms, teacher=nullcontext, first_position=70, progress=False
    )["half"]
    with torch.no_grad():
        full = model(ROWS).logits[:, :-1]
    expected = functional.cross_entropy((full / 2).transpose(1, 2), ROWS[:, 1:], reduction="none")
    close = {"atol": 2e-5, "rtol": 0}
    assert scores.nll.shape == (5, 149)
    assert torch.allclose(scores.nll, expected, **close)
    assert not torch.allclose(scores.nll[:, 1:], expected[:, :-1], **close)  # off by one

    log_full, log_arm = full.log_softmax(-1), (full / 2).log_softmax(-1)
    forward = functional.kl_div(log_arm, log_full, log_target=True, reduction="none").sum(-1)
    reverse = functional.kl_div(log_full, log_arm, log_target=True, reduction="none").sum(-1)
    assert torch.allclose(scores.kl[:, 70:], forward[:, 70:], **close)
    assert not torch.allclose(scores.kl[:, 70:], reverse[:, 70:], **close)
    assert scores.kl[:, :70].isnan().all()


def test_the_teacher_runs_once_and_diverges_from_itself_by_nothing(model):
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    arms = {"full": nullcontext, "half": sharpened(model, 0.5), "same": sharpened(model, 1.0)}
    scores = compare_arms(
        model, ROWS[:4], arms, teacher=nullcontext, first_position=0, progress=False
    )
    hook.remove()
    assert len(calls) == 2 * 3  # two batches; the arm `full` is the teacher's own forward
    assert torch.equal(scores["full"].kl, torch.zeros(4, 149))
    assert torch.equal(scores["same"].kl, torch.zeros(4, 149))
    assert (scores["half"].kl > 0).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_batches_change_nothing_and_never_leave_a_row_alone(model, rows, batch_size):
    """An arm that exchanges rows within the batch needs two of them."""
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    scores = score_rows(model, ROWS[:rows], batch_size=batch_size, teacher=nullcontext)
    hook.remove()
    assert sum(sizes) == rows  # the model as it stands is its own teacher
    assert rows == 1 or batch_size == 1 or min(sizes) > 1
    expected = score_rows(model, ROWS, batch_size=5).nll[:rows]
    assert torch.allclose(scores.nll, expected, atol=2e-5, rtol=0)
    if rows > 1:
        assert not torch.allclose(scores.nll.roll(1, 0), expected, atol=2e-5, rtol=0)


def test_without_a_teacher_there_is_no_divergence(model):
    assert score_rows(model, ROWS[:2]).kl.isnan().all()


def test_the_model_is_left_as_it_was_also_after_an_error():
    model = tiny().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    score_rows(model, ROWS[:2])

    @contextmanager
    def broken():
        raise RuntimeError("arm")
        yield

    with pytest.raises(RuntimeError, match="arm"):
        compare_arms(model, ROWS, {"x": broken}, teacher=None, first_position=0, progress=False)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_likelihood_that_is_no_number_is_an_error():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(StateError, match=r"arm 'model'.*rows 0 to 1"):
        score_rows(model, ROWS)


@pytest.mark.parametrize(
    ("rows", "change", "message"),
    [
        (ROWS[0], {}, r"rows of shape \(150,\)"),
        (ROWS.int(), {}, "torch.int32"),
        (ROWS[:, :1], {}, "T >= 2"),
        (ROWS[:0], {}, "R >= 1"),
        (ROWS + 1, {}, "the tokenizer is another"),
        (ROWS - 1, {}, "token ids -1 to"),
        (ROWS, {"first_position": 149}, r"first_position=149 .* \[0, 148\]"),
        (ROWS, {"batch_size": 0}, "batch_size=0"),
        (ROWS, {"arms": {}}, "no arms"),
    ],
)
def test_bad_arguments_are_named(model, rows, change, message):
    arguments = {"arms": {"x": nullcontext}, "teacher": None, "first_position": 0, **change}
    with pytest.raises(ConfigError, match=message):
        compare_arms(model, rows, progress=False, **arguments)
