"""How a loss over a text of S segments reaches back through what is carried between them.

A text is read one segment a call on one cache. With C_s what the cache carries behind segment s
and L_s the loss of that segment's own targets, the loss is L_1 + ... + L_S, and::

    full        one graph of all calls: the gradient of the loss, activations of S segments
    truncated   runs of k segments, counted from the end; what one run hands to the next is
                detached: gradient through at most k segments, activations of k
    replay      s = 1 .. S - 1 without a graph, C_s kept; then for s = S .. 1, from C_(s-1) as a
                leaf: read s again, go back from L_s + <C_s, g_s>, and hand g_(s-1) = dC_(s-1) on.
                The gradient of `full`, activations of one segment, one more forward, and S - 1
                times what a conversation carries (26 MB a row for ARMT on 30 layers 576 wide),
                which waits on the CPU

`replay` is memory replay back-propagation (Memformer, arXiv:2010.06891). Random numbers are drawn
again as they were. Public code of recurrent memories means `truncated` at times and does not
detach; here it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache

from memretrofit.data.lessons import IGNORED
from memretrofit.errors import ConfigError
from memretrofit.patching.segment_visit import segment_ledger_of
from memretrofit.patching.session import Session, session_of
from memretrofit.patching.wrapping import unwrapped

Credit = Literal["full", "truncated", "replay"]


@dataclass(eq=False)
class SegmentedText:
    """A batch of texts of equal length, and what is learned of it.

    Raises:
        ConfigError: nothing in it is learned.
        StateError: the model has no memory between segments.
    """

    model: Any
    """Patched, or the PeftModel around one."""
    ids: Tensor
    """[B, T] without padding."""
    labels: Tensor
    """[B, T] as `ids` where a token is learned, else `IGNORED`."""
    loss: float = field(default=0.0, init=False)
    """Mean over learned tokens of -log p, as far as they were read."""
    wrong: Tensor = field(init=False)
    """[B] bool: rows with a learned token that was not the most likely one."""

    def __post_init__(self) -> None:
        ledger = segment_ledger_of(unwrapped(self.model))
        self.owner, length = ledger.owner, ledger.memory.segment_length
        # nobody predicts with the last token: it is not read
        self.end = self.ids.shape[1] - 1
        self.bounds = [*range(0, self.end, length), self.end]
        self.wrong = torch.zeros(len(self.ids), dtype=torch.bool, device=self.ids.device)
        self.count = int((self.labels[:, 1:] != IGNORED).sum())
        if not self.count:
            raise ConfigError("a text has no token that is learned: label at least one")

    def __len__(self) -> int:
        """Segments."""
        return len(self.bounds) - 1

    def read(self, cache: DynamicCache, number: int) -> Tensor | None:
        """Read segment `number`; its part of the loss, None where nothing in it is learned."""
        low, high = self.bounds[number : number + 2]
        wanted = self.labels[:, low + 1 : high + 1]
        places = (wanted != IGNORED).any(0).nonzero()
        if not len(places):
            self.pass_by(cache, number)
            return None
        first = int(places[0])
        wanted = wanted[:, first:]
        learned = wanted != IGNORED
        logits = self._logits(cache, number, high - low - first)
        loss = F.cross_entropy(logits[learned].float(), wanted[learned], reduction="sum")
        self.loss += float(loss.detach()) / self.count
        self.wrong |= ((logits.detach().argmax(-1) != wanted) & learned).any(-1)
        return loss / self.count

    def pass_by(self, cache: DynamicCache, number: int) -> None:
        """Read segment `number` for what it hands on alone."""
        self._logits(cache, number, 1)

    def measure(self) -> None:
        """Read all of it without gradient."""
        cache = DynamicCache()
        with torch.no_grad():
            for number in range(len(self)):
                self.read(cache, number)

    def _logits(self, cache: DynamicCache, number: int, kept: int) -> Tensor:
        low, high = self.bounds[number : number + 2]
        return self.model(
            input_ids=self.ids[:, low:high],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=kept,
        ).logits

    def carried(self, cache: DynamicCache) -> Session:
        """What `cache` carries."""
        return session_of(cache, self.owner)


def back_propagate(text: SegmentedText, credit: Credit = "full", segments: int = 1) -> None:
    """Add the gradient of the loss of `text` to what may learn.

    Args:
        text: its `loss` and `wrong` are measured.
        credit: see the module.
        segments: k of `truncated`.
    """
    _WAYS[credit](text, segments)


def _full(text: SegmentedText, _: int) -> None:
    _truncated(text, len(text))


def _truncated(text: SegmentedText, segments: int) -> None:
    cache, losses = DynamicCache(), list[Tensor | None]()
    for number in range(len(text)):
        losses.append(text.read(cache, number))
        left = len(text) - number - 1
        if left % segments == 0:
            _go_back(losses, [], [])
            text.carried(cache).detach()
            losses = []


def _replay(text: SegmentedText, _: int) -> None:
    cache, past = DynamicCache(), list[tuple[_Waiting, _Noise]]()
    with torch.no_grad():
        for number in range(len(text)):
            past.append((_Waiting(text.carried(cache)), _Noise.now(text.ids.device)))
            if number + 1 < len(text):
                text.pass_by(cache, number)
    handed: list[Tensor | None] = []
    for number in reversed(range(len(text))):
        waiting, noise = past.pop()
        session = waiting.back()
        leaves = _leaves(session)
        cache = DynamicCache()
        cache.layers[:] = [session]
        with noise.again():
            loss = text.read(cache, number)
        _go_back([loss], _held(text.carried(cache)) if handed else [], handed)
        handed = [leaf.grad for leaf in leaves]


_WAYS: dict[str, Callable[[SegmentedText, int], None]] = {
    "full": _full,
    "truncated": _truncated,
    "replay": _replay,
}


def _go_back(
    losses: list[Tensor | None], carried: list[Tensor], gradients: list[Tensor | None]
) -> None:
    """Back from losses, and from what was carried on with its gradient."""
    pairs: list[tuple[Tensor, Tensor | None]] = [(x, None) for x in losses if x is not None]
    pairs += [
        (held, given) for held, given in zip(carried, gradients, strict=True) if given is not None
    ]
    pairs = [(root, given) for root, given in pairs if root.requires_grad]
    if pairs:
        roots, given = zip(*pairs, strict=True)
        torch.autograd.backward(roots, given)


def _leaves(session: Session) -> list[Tensor]:
    """Cut what a session holds off its graph; the tensors that gradient comes back to."""
    session.apply(lambda x: x.detach().requires_grad_() if x.is_floating_point() else x)
    return _held(session)


def _held(session: Session) -> list[Tensor]:
    """The tensors in a session that can have a gradient, in an order of their own."""
    found: list[Tensor] = []

    def note(held: Tensor) -> Tensor:
        found.append(held)
        return held

    session.apply(note)
    return [x for x in found if x.is_floating_point()]


class _Waiting:
    """What a session holds, on the CPU until it is needed."""

    def __init__(self, session: Session) -> None:
        self.session, self.devices = session.twin(), list[torch.device]()

        def away(held: Tensor) -> Tensor:
            self.devices.append(held.device)
            return held.cpu()

        self.session.apply(away)

    def back(self) -> Session:
        """The session, where it was; once."""
        devices = iter(self.devices)
        self.session.apply(lambda held: held.to(next(devices)))
        return self.session


@dataclass(frozen=True)
class _Noise:
    """The state of the generators that a forward draws from."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> _Noise:
        own = (
            None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        )
        return cls(device, torch.get_rng_state(), own)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Inside, numbers are drawn as they were; afterwards as if nothing had been."""
        devices = [] if self.own is None else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type):
            torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.get_device_module(self.device).set_rng_state(self.own, self.device)
            yield
