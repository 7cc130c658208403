"""What a patch added to a model, layer by layer, and what a cache costs before and after.

Cache bytes are those of one row after one forward pass of T tokens, in the model's own dtype::

    full attention     b T                                                          grows
    native window w    b min(T, w - 1)                                              bounded
    patched            b' min(T, N + W + SPARE_COLUMNS)  +  state once T > N + W    state: see below

A state is of fixed size in a memory that compresses, and a store that grows in one that recalls.
Where a store lies on the host or on disk, the table also says what is where.
b and b' (bytes of one token in one layer, b' with the features and second keys that a memory keeps)
are measured, not derived: caches of latents (MLA) and of mixed layers hold other shapes than
attention sees.
"""

from __future__ import annotations

import functools
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from memretrofit.modules.memory import AttentionMemory
from memretrofit.modules.rolling import SPARE_COLUMNS
from memretrofit.patching.cache import MemoryLayer
from memretrofit.patching.controls import ATTRIBUTE, memory_disabled
from memretrofit.patching.ledger import ledger_of
from memretrofit.patching.segment_visit import SegmentLedger
from memretrofit.patching.sites import AttentionSite
from memretrofit.patching.surgery import AttentionLedger, attention_ledger_of
from memretrofit.patching.wrapping import evaluating, unwrapped

LENGTHS = (1024, 8192, 32768, 131072)
"""Tokens at which `render` states the bytes of a cache."""
PROBE_LENGTHS = (2, 3)
"""Tokens read to measure bytes per token; the difference of the two separates what grows."""
WIDTH = 110
"""Columns of the printed table."""


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The base model's own parameters, under the names that they have without memory and PEFT.

    Tied parameters come once.
    """
    inner = unwrapped(model)
    ledger = getattr(inner, ATTRIBUTE, None)
    memories = set() if ledger is None else {seam.memory for seam in ledger.seams.values()}
    seen: set[nn.Parameter] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
        while (original := _peft_original(module)) is not None:
            module = original
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                yield prefix + name, parameter
        for name, child in module.named_children():
            if child not in memories:
                yield from walk(child, f"{prefix}{name}.")

    yield from walk(inner, "")


def _peft_original(module: nn.Module) -> nn.Module | None:
    """The module that a PEFT layer stands for."""
    if "peft" not in sys.modules:  # then nothing was wrapped, and importing it costs seconds
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, BaseTunerLayer):
        return cast("nn.Module", module.base_layer)
    return module.original_module if isinstance(module, ModulesToSaveWrapper) else None


@dataclass(frozen=True)
class LayerCost:
    """Bytes of a cache layer: fixed + per_token min(T, most); when T > most also spare columns and
    the state after T - most tokens.
    """

    per_token: int
    most: int | None = None
    fixed: int = 0
    state: Callable[[int], Mapping[str, int]] = lambda tokens: {}
    """By where the bytes lie: `device`, `host` or `disk`."""
    spare: int = 0

    def at(self, tokens: int) -> int:
        """Bytes after `tokens` tokens."""
        return self.tiers(tokens).total()

    def tiers(self, tokens: int) -> Counter[str]:
        """The same by where they lie."""
        if self.most is None or tokens <= self.most:
            return Counter(device=self.fixed + self.per_token * tokens)
        kept = self.fixed + self.per_token * (self.most + self.spare)
        return Counter(device=kept) + Counter(self.state(tokens - self.most))


def cache_bytes_at(model: nn.Module, tokens: int) -> tuple[int, int]:
    """Bytes of one row's cache after one forward of `tokens` tokens, without and with the memory.

    Runs the model on two and on three tokens, both ways. A conversation that goes on keeps up to
    `SPARE_COLUMNS` more columns in a patched layer while the window fills; once it is full the
    number is exact however it was filled.

    Raises:
        StateError: the model is not patched.
    """
    from memretrofit.segment_description import session_cost

    ledger = ledger_of(unwrapped(model))
    if isinstance(ledger, SegmentLedger):
        cost = session_cost(model, ledger)
        return cost.before(tokens), cost.after(tokens)
    before, after = _costs(model)
    return sum(cost.at(tokens) for cost in before), sum(cost.at(tokens) for cost in after)


def _costs(model: nn.Module) -> tuple[list[LayerCost], list[LayerCost]]:
    inner = unwrapped(model)
    ledger = attention_ledger_of(inner)
    before = base_costs(inner)
    memories = {seam.layer_idx: seam.memory for seam in ledger.seams.values()}
    with evaluating(inner), torch.no_grad():
        patched = [_layers(inner, count) for count in PROBE_LENGTHS]
    after = [
        _memory_cost(long, memories[index])
        if isinstance(long, MemoryLayer)
        else _base_cost(short, long)
        for index, (short, long) in enumerate(zip(*patched, strict=True))
    ]
    return before, after


def base_costs(model: nn.Module) -> list[LayerCost]:
    """Of the cache of the model without its memory, layer by layer."""
    with evaluating(model), torch.no_grad(), memory_disabled(cast("Any", model)):
        probes = [_layers(model, count) for count in PROBE_LENGTHS]
    return [_base_cost(short, long) for short, long in zip(*probes, strict=True)]


def _layers(model: Any, count: int) -> list[Any]:
    ids = torch.zeros(1, count, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    return list(model(input_ids=ids, use_cache=True).past_key_values.layers)


def _base_cost(short: Any, long: Any) -> LayerCost:
    low, high = (sum(x.nbytes for x in _tensors(vars(layer))) for layer in (short, long))
    per_token = (high - low) // (PROBE_LENGTHS[1] - PROBE_LENGTHS[0])
    most = long.sliding_window - 1 if getattr(long, "is_sliding", False) else None
    return LayerCost(per_token, most, fixed=low - per_token * PROBE_LENGTHS[0])


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        if held.ndim:  # scalars are counters
            yield held
    elif isinstance(held, Mapping):
        for item in held.values():
            yield from _tensors(item)
    elif isinstance(held, (list, tuple)):
        for item in held:
            yield from _tensors(item)


def _memory_cost(layer: MemoryLayer, memory: AttentionMemory) -> LayerCost:
    columns = [stream.view for stream in layer.streams.values() if stream.view is not None]
    return LayerCost(
        per_token=sum(x.nbytes // x.shape[-2] for x in columns),
        most=layer.num_sink_tokens + layer.sliding_window,
        state=functools.partial(memory.tier_nbytes, itemsize=columns[0].element_size()),
        spare=SPARE_COLUMNS,
    )


def render(model: nn.Module, ledger: AttentionLedger) -> str:
    """A table of layers, one of cache bytes, and the totals, as plain text."""
    inner = unwrapped(model)
    added = sum(p.numel() for seam in ledger.seams.values() for p in seam.memory.parameters())
    dtype = str(inner.dtype).removeprefix("torch.")
    return as_text(
        f"{type(inner).__name__} + {ledger.config}",
        _layer_table(ledger),
        f"added parameters: {added:,} ({share_of_base(inner, added)})",
        _cache_table(*_costs(inner)),
        f"cache of one row in {dtype}, after one forward pass of so many tokens",
    )


def as_text(*parts: str | Table) -> str:
    """Lines and tables, one below the other, as plain text."""
    console = Console(
        file=io.StringIO(), width=WIDTH, color_system=None, highlight=False, markup=False
    )
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def share_of_base(model: nn.Module, added: int) -> str:
    """So many parameters beside those of the base model, in words."""
    base = sum(p.numel() for _, p in base_parameters(model))
    return f"{100 * added / base:.2f}% of the base model's {base:,}" if base else "no base weights"


def layer_lines(
    rows: Sequence[tuple[int | None, tuple[str, ...]]],
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Which layers a row is of, and the row: equal ones make one line as long as their layers
    follow each other. None is what stands beside all layers.
    """
    for _, group in groupby(
        enumerate(rows), key=lambda item: ((item[1][0] or 0) - item[0], item[1][1])
    ):
        members = [row for _, row in group]
        first, last = members[0][0], members[-1][0]
        label = "beside" if first is None else str(first) if first == last else f"{first}-{last}"
        yield label, members[0][1]


def _layer_table(ledger: AttentionLedger) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    for name, justify in (
        ("layers", "left"), ("module", "left"), ("memory", "left"), ("added", "right"),
        ("heads", "right"), ("K/V heads", "right"), ("head dims", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    rows = [
        (site.layer_idx, _row(site, ledger))
        for site in sorted(ledger.sites, key=lambda s: s.layer_idx)
    ]
    for label, cells in layer_lines(rows):
        table.add_row(label, *cells)
    return table


def _row(site: AttentionSite, ledger: AttentionLedger) -> tuple[str, ...]:
    seam = ledger.seams.get(site.name)
    if seam is not None:
        what = ledger.config.method
        added = f"{sum(p.numel() for p in seam.memory.parameters()):,}"
    else:
        what = f"none: {site.reason or 'not in layers_to_transform'}"
        added = "0"
    # the layer's own number varies, the rest of the path does not
    path = ".".join("*" if part == str(site.layer_idx) else part for part in site.name.split("."))
    dims = (
        f"{site.key_dim}" if site.key_dim == site.value_dim else f"{site.key_dim}/{site.value_dim}"
    )
    return path, what, added, str(site.num_heads), str(site.num_key_value_heads), dims


def _cache_table(before: list[LayerCost], after: list[LayerCost]) -> Table:
    table = Table(box=SIMPLE, pad_edge=False)
    rows = [sum((cost.tiers(tokens) for cost in after), Counter[str]()) for tokens in LENGTHS]
    tiers = sorted({tier for row in rows for tier in row})  # device, disk, host
    split = tiers if len(tiers) > 1 else []
    for name in ("cache at tokens", "before", "after", "after/before", *split):
        table.add_column(name, justify="right")
    for tokens, row in zip(LENGTHS, rows, strict=True):
        base, patched = sum(cost.at(tokens) for cost in before), row.total()
        share = f"{100 * patched / base:.1f}%" if base else "n/a"
        parts = [in_units(row[tier]) for tier in split]
        table.add_row(f"{tokens // 1024}k", in_units(base), in_units(patched), share, *parts)
    return table


def in_units(count: int) -> str:
    """Bytes in words: `3.1 MiB`."""
    value, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
