"""What a memory promises at each of the three sites, checked on one tiny model.

Nothing changes before there is something to remember; then something does; one pass is any split of
it; a row of a left padded batch is that row alone; and `unpatch` leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from memretrofit.config import MethodConfig
from memretrofit.errors import UnsupportedModelError
from memretrofit.evaluation.coverage.checks import (
    AMPLIFIED,
    REORDERED,
    WRONG,
    Fault,
    Subject,
    activate,
    apart,
)
from memretrofit.methods.ahn import AHNConfig
from memretrofit.methods.armt import ARMTConfig
from memretrofit.methods.product_key import ProductKeyConfig
from memretrofit.methods.window_sinks import WindowSinksConfig
from memretrofit.patching.controls import memory_silenced
from memretrofit.patching.ledger import ledger_of
from memretrofit.patching.surgery import AttentionLedger
from memretrofit.retrofit import patch, unpatch

WINDOW, SINKS, SEGMENT = 5, 2, 8
EXACT = WINDOW + SINKS

WINDOW_SINKS = WindowSinksConfig(sliding_window=WINDOW, num_sink_tokens=SINKS)
AHN = AHNConfig(sliding_window=WINDOW, num_sink_tokens=SINKS)
BANK = ProductKeyConfig(num_slots=49, num_heads=2, key_dim=8, value_dim=16, top_k=3)
ARMT = ARMTConfig(segment_length=SEGMENT, num_memory_tokens=3, memory_dim=32, num_shifts=2)


@dataclass
class Verdict:
    """What was found at one site of one type."""

    status: str
    """`live`, `unsupported` (refused by a typed error), or `broken`: anything else."""
    reason: str = ""
    places: str = ""
    """Layers that can be entered, and in attention how many of those that attend."""
    unasked: list[str] = field(default_factory=list)
    """Promises that the base model itself does not keep, so that they mean nothing here."""

    def to_dict(self) -> dict[str, Any]:
        """Without what is empty."""
        return {name: value for name, value in vars(self).items() if value}


def attention(subject: Subject) -> Verdict:
    """Sinks and window, and AHN: inside the window the very bits of the base model."""
    ids, verdict = subject.ids, Verdict("live")
    short, mask = ids[:, :EXACT], torch.ones(2, EXACT, dtype=torch.long)
    mask[0, :3] = 0
    expected = {
        "one pass": _try(lambda: subject.one_pass(short)),
        "pieces": _try(lambda: subject.in_pieces(short, (3, 6))),
        "padding": _try(lambda: subject.one_pass(short, mask)),
        "generation": _try(lambda: subject.spoken(short[:, :3], EXACT - 3)),
    }
    found = {
        "one pass": lambda: subject.one_pass(short),
        "pieces": lambda: subject.in_pieces(short, (3, 6)),
        "padding": lambda: subject.one_pass(short, mask),
        "generation": lambda: subject.spoken(short[:, :3], EXACT - 3),
    }
    window = subject.base
    for config in (WINDOW_SINKS, AHN):
        with _patched(subject, config, verdict):
            activate(subject.model)
            for name, run in found.items():
                if expected[name] is not None and not torch.equal(run(), expected[name]):
                    raise Fault(f"{config.method}: {name} inside the window is not the base's")
            text = subject.one_pass(ids)
            if apart(text[:, :EXACT], subject.base[:, :EXACT]) > _tolerance(subject.split):
                raise Fault(f"{config.method}: tokens inside the window changed in a long text")
            if (change := apart(text[:, -1:], window[:, -1:])) < WRONG:
                raise Fault(f"{config.method}: what left the window changes {change:.0e}")
            window = text
            _splits(subject, verdict, config.method)
            _padding(subject, verdict, config.method)
            if subject.speaks and not subject.follows(subject.spoken(ids, 4)):
                raise Fault(f"{config.method}: generate does not say what one pass says")
    return verdict


def ffn(subject: Subject) -> Verdict:
    """A bank beside an FFN: at the start the very bits of the base model, on any text."""
    verdict = Verdict("live")
    with _patched(subject, BANK, verdict):
        if not torch.equal(subject.one_pass(subject.ids), subject.base):
            raise Fault("a fresh bank is not the base model")
        activate(subject.model)
        if (change := apart(subject.one_pass(subject.ids), subject.base)) < WRONG:
            raise Fault(f"a bank changes {change:.0e}")
        _splits(subject, verdict, BANK.method)
        _padding(subject, verdict, BANK.method)
    return verdict


def sequence(subject: Subject) -> Verdict:
    """ARMT: a silent memory leaves the base model on each segment alone."""
    ids, verdict = subject.ids, Verdict("live")
    alone = torch.cat([subject.one_pass(x) for x in ids.split(SEGMENT, dim=1)], dim=1)
    with _patched(subject, ARMT, verdict):
        activate(subject.model)
        with memory_silenced(subject.model):
            quiet = subject.one_pass(ids)
        text = subject.one_pass(ids)
        if (change := apart(text[:, :SEGMENT], alone[:, :SEGMENT])) > _tolerance(subject.split):
            raise Fault(f"the first segment is {change:.0e} from the base model")
        if (change := apart(text[:, -1:], quiet[:, -1:])) < WRONG:
            raise Fault(f"what segments wrote changes {change:.0e}")
        _splits(subject, verdict, ARMT.method)
        _padding(subject, verdict, ARMT.method)
    return verdict


SEAMS: dict[str, Callable[[Subject], Verdict]] = {
    "attention": attention,
    "ffn": ffn,
    "sequence": sequence,
}
CONFIGS: dict[str, MethodConfig] = {"attention": AHN, "ffn": BANK, "sequence": ARMT}


def examine(model: PreTrainedModel) -> dict[str, Verdict]:
    """The verdict at each site."""
    try:
        subject = Subject(model)
    except Fault as fault:  # a model that cannot be run can only be refused
        return {name: _refused(model, config, fault) for name, config in CONFIGS.items()}
    return {name: _judged(seam, subject) for name, seam in SEAMS.items()}


def _refused(model: PreTrainedModel, config: MethodConfig, fault: Fault) -> Verdict:
    try:
        patch(model, config)
    except UnsupportedModelError as refusal:
        return Verdict("unsupported", _words(refusal))
    except Exception as error:
        return Verdict("broken", _words(error))
    return Verdict("broken", f"was patched, and {fault}")


def _judged(seam: Callable[[Subject], Verdict], subject: Subject) -> Verdict:
    try:
        return seam(subject)
    except UnsupportedModelError as refusal:
        try:
            subject.unchanged()
        except Fault as fault:
            return Verdict("broken", f"was refused, and {fault}")
        return Verdict("unsupported", _words(refusal))
    except Exception as error:  # whatever a model may raise is what this is for
        return Verdict("broken", _words(error))


def _words(error: Exception) -> str:
    name = "" if isinstance(error, (Fault, UnsupportedModelError)) else f"{type(error).__name__}: "
    return name + " ".join(str(error).split())[:500]


class _patched:
    """The model of a subject patched inside, and held to be as before afterwards."""

    def __init__(self, subject: Subject, config: MethodConfig, verdict: Verdict) -> None:
        self.subject, self.config, self.verdict = subject, config, verdict

    def __enter__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            patch(self.subject.model, self.config)
        ledger: Any = ledger_of(self.subject.model)
        seams = [x for x in ledger.seams.values() if getattr(x, "layer_idx", None) is not None]
        if not seams:
            unpatch(self.subject.model)
            raise Fault("nothing was patched")
        sites = len(getattr(ledger, "sites", seams))
        chosen = f"{len(seams)} of " if isinstance(ledger, AttentionLedger) else ""
        self.verdict.places = f"{chosen}{sites} layers"

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        unpatch(self.subject.model)
        if error is None:
            self.subject.unchanged()


def _tolerance(own: float) -> float:
    """What rounding may change in a model whose own logits it moves by `own`."""
    return max(REORDERED, min(AMPLIFIED * own, WRONG))


def _splits(subject: Subject, verdict: Verdict, method: str) -> None:
    if subject.split > WRONG:
        return _note(verdict, "one pass is any split of it")
    found = apart(subject.in_pieces(subject.ids), subject.one_pass(subject.ids))
    if found > _tolerance(subject.split):
        raise Fault(f"{method}: pieces are {found:.0e} from one pass")


def _padding(subject: Subject, verdict: Verdict, method: str) -> None:
    if subject.padded > WRONG:
        return _note(verdict, "a padded row is that row alone")
    if (found := subject.padding_error()) > _tolerance(max(subject.split, subject.padded)):
        raise Fault(f"{method}: a padded row is {found:.0e} from that row alone")


def _note(verdict: Verdict, promise: str) -> None:
    if promise not in verdict.unasked:
        verdict.unasked.append(promise)


def _try(run: Callable[[], Any]) -> Any:
    """What the base model answers, or None where it cannot."""
    try:
        return run()
    except Exception:
        return None
