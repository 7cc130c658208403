"""Attention transfer: each layer's memory learns the far part of that layer's own full attention.

For one layer, with y the output of full attention, z that of sinks and window alone, and m that of
the patched layer, all on the hidden states of the *base* model, over positions t >= W + N::

    loss = sum_t |m_t - y_t|^2 / sum_t |z_t - y_t|^2        1: the window alone; 0: full attention
    R2   = 1 - sum_t |c(y_t - m_t)|^2 / sum_t |c(y_t - z_t)|^2    c takes off the mean over t

One forward pass of the base gives every layer its own problem: the output of the layer stays the
teacher's, nothing is propagated back through the model, and one layer's graph exists at a time.
R2 is centred, so it counts only what varies with the query: a constant correction scores zero.

After LoLCATs, stage one (arXiv:2410.10254, section 3.2), here for any memory and random windows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import PreTrainedModel

from memretrofit.errors import ConfigError
from memretrofit.patching.controls import intercepted, window_override
from memretrofit.patching.surgery import attention_ledger_of
from memretrofit.retrofit import memory_parameters, patched_config
from memretrofit.training.checkpoints import load_checkpoint, save_checkpoint
from memretrofit.training.schedule import TRANSFER, Draw, draw_window, learning_rate_factor
from memretrofit.training.trainable import GradientWatch, parameter_groups

CALIBRATION_ROWS = 4
"""Rows from which a memory takes the means of queries and keys before the first step."""


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """How long and on what; the defaults suit a model of 135M parameters on a laptop."""

    steps: int = 200
    learning_rate: float = 1e-2
    """Of AdamW, at its peak; see `learning_rate_factor` for the rest."""
    batch_size: int = 2
    """Rows in one forward pass of each process."""
    windows: tuple[int, ...] = ()
    """One is drawn for each step; empty takes the method's own."""
    sinks: tuple[int, ...] = ()
    """Drawn with the window; empty takes the method's own."""
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    """Largest gradient norm of one layer: clipping all layers by one norm would couple them."""
    bf16: bool = False
    """Products in bfloat16; states and the loss stay in float32."""
    seed: int = 0
    save_steps: int = 0
    """Steps between checkpoints, where a file for them is given; 0 writes only the last."""


class TransferStep(NamedTuple):
    """What one step measured, on the rows that it then learned from."""

    step: int
    """Counts from 1."""
    loss: float
    """Mean over layers."""
    r2: dict[str, float]
    """Centred R2 of each patched attention module."""
    draw: Draw
    learning_rate: float


def attention_transfer(
    model: PreTrainedModel,
    rows: Any,
    settings: TransferSettings,
    *,
    checkpoint: Path | None = None,
    on_step: Callable[[TransferStep], None] | None = None,
) -> list[TransferStep]:
    """Fit the memory of every patched layer to its own full attention. Base weights do not change.

    In several processes (torch.distributed), each reads its own rows and gradients are averaged.
    Everything random is a function of (seed, step), so a checkpoint needs no random state.

    Args:
        model: patched; trained on the device it is on.
        rows: a map-style dataset; item i has `input_ids` [T], without padding, all of one length.
        settings: see `TransferSettings`.
        checkpoint: file that is written every `save_steps` steps and at the end. When it exists,
            training goes on from it.
        on_step: called after each step, in every process.

    Returns:
        The steps that this call made.

    Raises:
        StateError: the model is not patched, or some memory parameter received no gradient.
        ConfigError: the method has nothing to train, or there are no rows.
        CheckpointError: `checkpoint` is damaged or belongs to other settings.
    """
    parameters = memory_parameters(model)
    if not parameters:
        method = patched_config(model).method
        raise ConfigError(f"the method {method} has no parameters, so there is nothing to fit")
    if not len(rows):
        raise ConfigError("attention transfer needs at least one row")
    own: Any = patched_config(model)
    windows = settings.windows or (own.sliding_window,)
    sinks = settings.sinks or (own.num_sink_tokens,)
    groups = parameter_groups(parameters.values(), settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate)
    layers = [list(seam.memory.parameters()) for seam in attention_ledger_of(model).seams.values()]
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = load_checkpoint(checkpoint, parameters, [optimizer], settings)

    watch, done = GradientWatch(parameters), list[TransferStep]()
    with _only_memory_learns(model, parameters):
        if not start:
            _calibrate(model, rows)
        for step in range(start, settings.steps):
            draw = draw_window(windows, sinks, settings.seed, TRANSFER, step)
            fit = _LayerFit(model, draw)
            ids = _batch(rows, step, settings.batch_size).to(model.device)
            with window_override(model, **draw._asdict()), _precision(model, settings.bf16):
                fit.run(ids)
            _average(parameters)
            watch.observe(folded=ids.shape[1] > draw.exact)
            for layer in layers:
                nn.utils.clip_grad_norm_(layer, settings.max_grad_norm)
            factor = learning_rate_factor(step, settings.steps, settings.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * factor
            optimizer.step()
            optimizer.zero_grad()
            loss, r2 = fit.measured()
            done.append(TransferStep(step + 1, loss, r2, draw, settings.learning_rate * factor))
            if on_step is not None:
                on_step(done[-1])
            last = step + 1 == settings.steps
            due = settings.save_steps and (step + 1) % settings.save_steps == 0
            if checkpoint is not None and (last or due) and _rank() == 0:
                save_checkpoint(checkpoint, step + 1, parameters, [optimizer], settings)
        watch.finish()
    return done


def _calibrate(model: PreTrainedModel, rows: Any) -> None:
    """Show every memory the model's own queries and keys: the same rows in every process."""

    def show(call: Any) -> tuple[Tensor, Tensor | None]:
        call.calibrate()
        return call.full()

    count = min(CALIBRATION_ROWS, len(rows))
    ids = torch.stack([rows[index]["input_ids"] for index in range(count)]).to(model.device)
    with torch.no_grad(), intercepted(model, show):
        model.base_model(input_ids=ids, use_cache=False)


class _LayerFit:
    """One forward pass of the base, during which each layer's memory gets its gradient."""

    def __init__(self, model: PreTrainedModel, draw: Draw) -> None:
        self.model, self.draw = model, draw
        self.names = {id(seam): name for name, seam in attention_ledger_of(model).seams.items()}
        self.losses: dict[str, Tensor] = {}
        self.r2: dict[str, Tensor] = {}

    def run(self, input_ids: Tensor) -> None:
        """Forward the backbone over `input_ids` [B, T]; gradients are left in `.grad`."""
        with torch.no_grad(), intercepted(self.model, self.fit):
            self.model.base_model(input_ids=input_ids, use_cache=False)

    def fit(self, call: Any) -> tuple[Tensor, Tensor | None]:
        """The attention of one layer: the memory learns, and the teacher's output goes on."""
        full, weights = call.full()  # [B, T, H, V]
        if not any(p.requires_grad for p in call.seam.memory.parameters()):
            return full, weights  # a layer with sinks and window alone has nothing to learn
        with torch.enable_grad():
            output = call.remember()[0]
        near = call.near()
        past = slice(self.draw.exact, None)
        far = (full - near)[:, past].float()
        with torch.enable_grad():
            error = (full - output)[:, past].float()
            # rows that the window holds whole leave nothing to learn: a loss of zero
            loss = error.square().sum() / far.square().sum().clamp(min=1e-12)
            loss.backward()
        name = self.names[id(call.seam)]
        self.losses[name] = loss.detach()
        self.r2[name] = 1 - _spread(error.detach()) / _spread(far).clamp(min=1e-12)
        return full, weights

    def measured(self) -> tuple[float, dict[str, float]]:
        """Mean loss over layers, and R2 of each layer."""
        both = torch.stack([torch.stack([*self.losses.values()]), torch.stack([*self.r2.values()])])
        losses, r2 = both.tolist()
        return sum(losses) / len(losses), dict(zip(self.r2, r2, strict=True))


def _spread(x: Tensor) -> Tensor:
    """Energy of [B, P, H, V] about its mean over rows and positions, per head."""
    if not x.numel():
        return x.sum()
    return (x - x.mean(dim=(0, 1))).square().sum()


@contextlib.contextmanager
def _only_memory_learns(model: PreTrainedModel, parameters: dict) -> Iterator[None]:
    """Evaluation mode, and gradients for the memory alone; both as before afterwards."""
    training = model.training
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    model.eval()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
        parameter.grad = None
    try:
        yield
    finally:
        model.train(training)
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


def _precision(model: PreTrainedModel, bf16: bool) -> contextlib.AbstractContextManager:
    # No cache of cast weights: one made under no_grad would be reused, and carry no gradient.
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _batch(rows: Any, step: int, batch_size: int) -> Tensor:
    """The rows of one step of this process, [B, T]."""
    first = (step * _world() + _rank()) * batch_size
    indices = [(first + number) % len(rows) for number in range(batch_size)]
    return torch.stack([rows[index]["input_ids"] for index in indices])


def _average(parameters: dict[str, nn.Parameter]) -> None:
    """Mean of the gradients over the processes, in one message."""
    if _world() == 1:
        return
    grads = [p.grad for p in parameters.values() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    flat /= _world()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
