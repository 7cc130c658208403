"""Gradients through segments: against numbers worked by hand, and one pass over the text."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training.tiny import VOCABULARY, awake, patched, rows
from transformers import DynamicCache

from memretrofit.data.lessons import IGNORED
from memretrofit.errors import ConfigError, StateError
from memretrofit.methods.ahn import AHNConfig
from memretrofit.methods.armt import ARMTConfig
from memretrofit.methods.rmt import RMTConfig
from memretrofit.patching.session import Session, session_of
from memretrofit.training.credit import SegmentedText, back_propagate

SEGMENT = 8
METHODS = {
    "rmt": RMTConfig(segment_length=SEGMENT, num_memory_tokens=3),
    "armt": ARMTConfig(segment_length=SEGMENT, num_memory_tokens=3),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Powers(SegmentedText):
    """Three segments of m_s = a m_(s-1), each with the loss m_s; m_0 is learned too."""

    def __init__(self) -> None:
        self.ids = torch.zeros(1, 1, dtype=torch.long)
        self.a, self.first = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.ones(1))
        self.loss = 0.0

    def __len__(self) -> int:
        return 3

    def carried(self, cache: DynamicCache) -> Session:
        return session_of(cache, "powers")

    def pass_by(self, cache: DynamicCache, number: int) -> None:
        session = self.carried(cache)
        session.state = {"m": self.a * session.state.get("m", self.first)}

    def read(self, cache: DynamicCache, number: int) -> Tensor:
        self.pass_by(cache, number)
        loss = self.carried(cache).state["m"].sum()
        self.loss += float(loss.detach())
        return loss


@pytest.mark.parametrize(
    ("credit", "segments", "of_a", "of_first"),
    [
        ("full", 1, 17, 14),  # 1 + 2a + 3a^2, a + a^2 + a^3
        ("replay", 1, 17, 14),
        ("truncated", 3, 17, 14),
        ("truncated", 2, 1 + 2 + 8, 2),  # m_0; then m_1 + 2a m_1 with m_1 = 2 given
        ("truncated", 1, 1 + 2 + 4, 2),  # m_0 + m_1 + m_2
    ],
)
def test_the_gradient_worked_by_hand(credit, segments, of_a, of_first) -> None:
    text = Powers()
    back_propagate(text, credit, segments)
    assert text.loss == 2 + 4 + 8
    assert (text.a.grad, text.first.grad) == (of_a, of_first)


def texts(segments: int) -> tuple[Tensor, Tensor]:
    """Two rows, the last segment short, with something learned in every segment but the second."""
    length = segments * SEGMENT - 2
    ids = torch.stack([row["input_ids"][:length] for row in rows(2, 160, seed=3)])
    learned = torch.zeros_like(ids, dtype=torch.bool)
    learned[:, 3::5] = True
    learned[0, -1] = True
    learned[:, SEGMENT + 1 : 2 * SEGMENT + 1] = False
    return ids, ids.masked_fill(~learned, IGNORED)


def tiny(method, dropout: float = 0.0):
    """The model, its memory awake, all of it learning."""
    model = awake(patched(method))
    for layer in model.model.layers:
        vars(layer.self_attn)["attention_dropout"] = dropout
    return model.train(dropout > 0)


def gradients(model, text: SegmentedText, credit, segments: int = 1) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    back_propagate(text, credit, segments)
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, of the largest gradient of its tensor."""
    assert found.keys() == expected.keys()
    ratios = [
        float((found[n] - expected[n]).abs().max() / expected[n].abs().max().clamp(min=1e-6))
        for n in expected
    ]
    return max(ratios)


@methods
def test_full_is_the_gradient_of_one_pass(method) -> None:
    model, (ids, labels) = tiny(method), texts(4)
    text = SegmentedText(model, ids, labels)
    found = gradients(model, text, "full")
    model.zero_grad()
    logits = model(ids).logits[:, :-1]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(text) == 4
    assert text.loss == pytest.approx(float(loss.detach()), rel=1e-5)
    assert apart(found, expected) < 1e-3
    right = ((logits.argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).all(-1)
    assert torch.equal(text.wrong, ~right)


@methods
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_replay_is_full_for_every_parameter(method, dropout) -> None:
    model, (ids, labels) = tiny(method, dropout), texts(4)
    full = gradients(model, SegmentedText(model, ids, labels), "full")
    text = SegmentedText(model, ids, labels)
    replay = gradients(model, text, "replay")
    assert apart(replay, full) < 1e-3
    short = gradients(model, SegmentedText(model, ids, labels), "truncated", 2)
    assert apart({n: short[n] for n in full}, full) > 1e-1
    if dropout:  # other noise is another gradient
        torch.manual_seed(6)
        model.zero_grad()
        back_propagate(SegmentedText(model, ids, labels), "full")
        other = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert apart(other, full) > 1e-1


@methods
def test_truncated_is_the_gradient_of_one_segment(method) -> None:
    """With a loss in the last segment alone, nothing reaches what earlier segments wrote with."""
    model, (ids, labels) = tiny(method), texts(3)
    labels[:, : 2 * SEGMENT + 1] = IGNORED
    found = gradients(model, SegmentedText(model, ids, labels), "truncated")
    model.zero_grad()
    cache = DynamicCache()
    with torch.no_grad():
        model(ids[:, : 2 * SEGMENT], past_key_values=cache, use_cache=True)
    logits = model(ids[:, 2 * SEGMENT : -1], past_key_values=cache, use_cache=True).logits
    wanted = labels[:, 2 * SEGMENT + 1 :]
    F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert apart(found, expected) < 1e-3
    full = gradients(model, SegmentedText(model, ids, labels), "full")
    writers = {n for n in full if n not in found or not found[n].any()}
    assert any(full[name].any() for name in writers)


class Held:
    """Bytes of the tensors that a graph keeps, at most at any time."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> list[Tensor]:
        held = _Box([tensor.detach()])  # with its graph it would keep itself
        self._add(tensor.nbytes)
        weakref.finalize(held, self._add, -tensor.nbytes)
        return held

    def _add(self, count: int) -> None:
        self.now += count
        self.peak = max(self.peak, self.now)


class _Box(list):
    """A list that can be watched."""


@pytest.mark.parametrize(("credit", "grows"), [("full", True), ("replay", False)])
def test_what_a_graph_keeps(credit, grows) -> None:
    model, peaks = tiny(METHODS["rmt"]), []
    for segments in (2, 4, 16):
        ids, labels = texts(segments)
        held = Held()
        with torch.autograd.graph.saved_tensors_hooks(held.pack, lambda box: box[0]):
            back_propagate(SegmentedText(model, ids, labels), credit)
        gc.collect()
        assert held.now == 0
        peaks.append(held.peak)
    assert (peaks[2] > 6 * peaks[0]) == grows
    assert grows or max(peaks) < 1.2 * min(peaks)


def test_what_cannot_be_learned_from() -> None:
    ids = torch.zeros(2, 12, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 0] = VOCABULARY - 1  # nobody predicts the first token
    with pytest.raises(ConfigError, match="no token that is learned"):
        SegmentedText(patched(METHODS["rmt"]), ids, labels)
    with pytest.raises(StateError, match="memories between segments"):
        SegmentedText(patched(AHNConfig(sliding_window=16)), ids, ids)
