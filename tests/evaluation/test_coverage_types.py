"""A dozen architectures, each held to every promise; the rest: scripts/coverage."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from memretrofit import AHNConfig, patch
from memretrofit.evaluation.coverage.checks import CUTS, STEPS, WRONG, Fault, Subject
from memretrofit.evaluation.coverage.examination import examine_type
from memretrofit.evaluation.coverage.seams import Verdict, _padding, _splits, examine
from memretrofit.evaluation.coverage.tiny import (
    NOT_ALONE,
    SPECIAL,
    NoTinyModel,
    causal_types,
    tiny_model,
)

LIVE, REFUSED = "live", "unsupported"
EXPECTED = {  # attention, FFN, sequence
    "llama": (LIVE, LIVE, LIVE),
    "gemma3_text": (LIVE, LIVE, LIVE),
    "deepseek_v3": (LIVE, LIVE, LIVE),
    "mixtral": (LIVE, LIVE, LIVE),
    "gpt_oss": (LIVE, LIVE, LIVE),
    "gpt2": (LIVE, LIVE, LIVE),
    "qwen3_next": (LIVE, LIVE, REFUSED),
    "bart": (LIVE, REFUSED, LIVE),
    "longcat_flash": (LIVE, REFUSED, REFUSED),
    "bert": (LIVE, REFUSED, REFUSED),
    "diffllama": (REFUSED, LIVE, LIVE),
    "mamba": (REFUSED, REFUSED, REFUSED),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_type_is_live_or_refused_at_each_site(name):
    found = examine_type(name)
    statuses = tuple(found[seam]["status"] for seam in ("attention", "ffn", "sequence"))
    assert statuses == EXPECTED[name], found
    for verdict in found.values():
        assert verdict["status"] == LIVE or verdict["reason"]


def test_what_is_special_names_types():
    assert {*SPECIAL, *NOT_ALONE} <= set(causal_types())


def test_a_type_that_is_no_language_model_is_not_tried():
    with pytest.raises(NoTinyModel, match="drafts") as caught:
        tiny_model("gemma4_assistant")
    assert caught.value.expected
    with pytest.raises(NoTinyModel, match="KeyError") as caught:
        tiny_model("no_such_type")
    assert not caught.value.expected


def forgetful(model: PreTrainedModel) -> None:
    """Let the logits depend on how many tokens came with a call: a fault that pieces show."""

    def shift(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output + output.roll(1, -1) * output.shape[1]

    model.get_output_embeddings().register_forward_hook(shift)


def test_the_checks_find_a_fault_and_ask_no_more_than_the_base_keeps():
    subject, verdict = Subject(tiny_model("llama")), Verdict(LIVE)
    assert subject.split < 1e-5
    assert subject.padded < 1e-5
    assert subject.speaks
    assert subject.cuts == CUTS
    _splits(subject, verdict, "none")
    _padding(subject, verdict, "none")
    assert not verdict.unasked
    forgetful(subject.model)
    with pytest.raises(Fault, match="pieces"):
        _splits(subject, verdict, "none")
    with pytest.raises(Fault, match="padded"):
        _padding(subject, verdict, "none")
    worse = Subject(subject.model)
    assert worse.split > WRONG
    assert worse.cuts == STEPS
    _splits(worse, verdict, "none")
    assert verdict.unasked == ["one pass is any split of it"]


def test_what_is_left_behind_is_found():
    subject = Subject(tiny_model("llama"))
    subject.unchanged()
    patch(subject.model, AHNConfig(sliding_window=5, num_sink_tokens=2))
    with pytest.raises(Fault, match="modules"):
        subject.unchanged()
    other = Subject(tiny_model("llama"))
    with torch.no_grad():
        other.model.get_output_embeddings().weight[0, 0] += 1
    with pytest.raises(Fault, match="weights"):
        other.unchanged()
    hooked = Subject(tiny_model("llama"))
    forgetful(hooked.model)
    with pytest.raises(Fault, match="hooks stay on lm_head"):
        hooked.unchanged()


def test_a_model_that_is_patched_already_is_broken_and_not_refused():
    """Witness: only a typed refusal of the model counts as unsupported."""
    model = patch(tiny_model("llama"), AHNConfig(sliding_window=5, num_sink_tokens=2))
    found = examine(model)
    assert {verdict.status for verdict in found.values()} == {"broken"}
    assert found["attention"].reason.startswith("StateError")
