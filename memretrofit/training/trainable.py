"""Which parameters train: the one place that decides, and the check that they really do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from memretrofit.errors import CheckpointError, ConfigError, StateError
from memretrofit.hub.adapter import add_adapter
from memretrofit.patching.controls import memory_disabled
from memretrofit.patching.sites import find_attention_sites
from memretrofit.patching.surgery import AttentionLedger
from memretrofit.patching.wrapping import unwrapped
from memretrofit.retrofit import ledger_of, memory_parameters

Parameters = dict[str, nn.Parameter]


def trainable_parameters(
    model: PreTrainedModel,
    trainable: Literal["memory", "memory+lora"] = "memory",
    *,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
) -> tuple[Any, Parameters]:
    """Freeze all but what trains: the memory, without what of it is closed.

    `memory+lora` adds PEFT adapters to the `projections` of attention (q, k, v and o, whatever the
    architecture calls them), never to the memory. PEFT freezes what it does
    not own, so the memory is switched on again here.

    Returns:
        The model, inside a `PeftModel` when there are adapters, and what was promised to train, by
        its name in the patched model.

    Raises:
        StateError: the model is not patched.
        ConfigError: the method has no parameters, or none that may train now (no procedure is open,
            see `open_procedures`), or `trainable` is unknown.
    """
    if trainable not in ("memory", "memory+lora"):
        raise ConfigError(f"trainable={trainable!r}: expected memory or memory+lora")
    memory, ledger = memory_parameters(model), ledger_of(model)
    if not memory:
        raise ConfigError(
            f"the method {ledger.config.method} has no parameters, so there is nothing to train"
        )
    closed = {id(parameter) for parameter in ledger.closed()}
    memory = {name: p for name, p in memory.items() if id(p) not in closed}
    if not memory:
        raise ConfigError(
            f"all {len(closed)} parameters of the method {ledger.config.method} are closed; open "
            "what is to be learned first (memretrofit.patching.vocabulary.open_procedures)"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    wrapped, promised = model, dict(memory)
    if trainable == "memory+lora":
        if not isinstance(model, PeftModel):
            config = LoraConfig(
                r=lora_rank,
                lora_alpha=lora_alpha,  # type: ignore[arg-type]
                target_modules=projections(model),
                task_type="CAUSAL_LM",
            )
            wrapped = add_adapter(model, config)
        inner = unwrapped(wrapped)
        promised |= {name: p for name, p in inner.named_parameters() if ".lora_" in name}
    for parameter in promised.values():
        parameter.requires_grad_(True)
    return wrapped, promised


def projections(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of attention modules: the patched ones, or all where the memory
    stands elsewhere. Never the memory's own.
    """
    found = []
    for site in _attention_modules(model):
        for name, module in model.get_submodule(site).named_modules():
            linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            if linear and "memory" not in name.split("."):
                found.append(f"{site}.{name}")
    return found


def _attention_modules(model: PreTrainedModel) -> list[str]:
    ledger = ledger_of(model)
    if isinstance(ledger, AttentionLedger):
        return list(ledger.seams)
    with memory_disabled(model):
        return [site.name for site in find_attention_sites(model)]


def parameter_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict]:
    """Optimiser groups: decay pulls matrices to zero, and leaves gains, biases and scalars."""
    split: tuple[list, list] = ([], [])
    for parameter in parameters:
        split[parameter.ndim < 2].append(parameter)
    groups = [
        {"params": split[0], "weight_decay": weight_decay},
        {"params": split[1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class GradientWatch:
    """Tells whether every promised parameter learns; call `observe` before each optimiser step.

    A zero-initialised output hides what lies behind it from the first step, so a parameter is given
    `steps` of them to receive a gradient that is not exactly zero.
    """

    def __init__(self, promised: Mapping[str, nn.Parameter], steps: int = 3) -> None:
        self.waiting = dict(promised)
        self.without: set[str] = set(promised)
        self.steps, self.seen, self.idle = steps, 0, 0

    def observe(self, folded: bool = True) -> None:
        """Look at the gradients of this step.

        Args:
            folded: whether anything left the window in it; if not, it tells nothing and does not
                count.

        Raises:
            StateError: the last of the watched steps, and some parameter has had no gradient.
        """
        if not folded:
            self.idle += 1
        if self.seen >= self.steps or not folded:
            return
        self.seen += 1
        self.without -= {n for n, p in self.waiting.items() if p.grad is not None}
        # one transfer from the device for all of them
        live = [(n, p.grad.ne(0).any()) for n, p in self.waiting.items() if p.grad is not None]
        flags = torch.stack([flag for _, flag in live]).tolist() if live else []
        for (name, _), flag in zip(live, flags, strict=True):
            if flag:
                del self.waiting[name]
        if self.seen == self.steps:
            self.finish()

    def finish(self) -> None:
        """End of the run, which may have been shorter than the watch.

        One step is too short to tell zero behind a zero-initialised output from no connection; then
        only a gradient that never existed counts.

        Raises:
            StateError: some promised parameter received no gradient.
        """
        if self.idle and not self.seen:
            raise StateError(
                "nothing was ever folded: the rows were never longer than the window and sinks. "
                "Use longer rows or smaller windows."
            )
        missing = [n for n in self.waiting if self.seen > 1 or n in self.without]
        if not self.seen or not missing:
            return
        named = ", ".join(sorted(missing)[:8]) + (" ..." if len(missing) > 8 else "")
        raise StateError(
            f"{len(missing)} parameters were promised to train and received no gradient in "
            f"{self.seen} steps: {named}. Check that nothing froze them after "
            "trainable_parameters, and that the method reads them."
        )


def save_parameters(parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Write them by name as safetensors."""
    save_file({n: p.detach().cpu().contiguous() for n, p in parameters.items()}, path)


def load_parameters(parameters: Mapping[str, nn.Parameter], path: Path) -> None:
    """Read what `save_parameters` wrote into parameters of the same names and shapes.

    Raises:
        CheckpointError: the file is damaged, or holds other parameters.
    """
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    fill_parameters(parameters, found, path)


def fill_parameters(
    parameters: Mapping[str, nn.Parameter], found: Mapping[str, torch.Tensor], path: Path
) -> None:
    """Copy tensors into parameters of the same names and shapes; all or nothing.

    Raises:
        CheckpointError: names or shapes differ.
    """
    wrong = sorted(set(parameters) ^ set(found))
    wrong += [n for n in parameters if n in found and found[n].shape != parameters[n].shape]
    if wrong:
        raise CheckpointError(
            f"{path} was written by a run with other parameters: {len(wrong)} differ in name or "
            f"shape, the first is {wrong[0]}. Resume with the recipe that wrote it, or start "
            "afresh."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(found[name])
