"""A filled conversation state on disk: a text is read once and asked many times, by any process.

::

    book.mem/
      remembered.json             what it is, of which model, and in which files
      data-0123456789ab/          named by remembered.json
        layer-000.safetensors     window, state and store of one layer; numbers in its header
        tokens.safetensors        the token ids that were read, where they were given

The record is replaced last and in one step: a kill at any moment leaves the old conversation or
the new one. What a killed save wrote is cleared by the next. A loaded store is mapped: opening
reads the small things, and a query reads the pages that it fetches. Do not edit or truncate the
files of a cache in use; saving over them is safe.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import uuid
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, DynamicLayer

from memretrofit import __version__
from memretrofit.description import base_parameters
from memretrofit.errors import CheckpointError, ConfigError, StateError, UnsupportedModelError
from memretrofit.hub.adapter import is_peft
from memretrofit.hub.base import base_differences, base_record
from memretrofit.hub.cache_layers import (
    FULL,
    SLIDING,
    Content,
    Size,
    Slot,
    content_of,
    kind_of,
)
from memretrofit.hub.cache_session import SessionSlot
from memretrofit.hub.folder import sync
from memretrofit.hub.mapped import Written, write_pieces
from memretrofit.hub.memory_record import (
    DATA,
    RECORD,
    SCHEMA_VERSION,
    TOKENS,
    Remembered,
    checked_header,
    file_entry,
    layer_file,
    read_remembered,
)
from memretrofit.hub.record import read_json
from memretrofit.hub.saving import memory_tensors
from memretrofit.hub.tensors import differences, listing, spec_of
from memretrofit.patching.cache import MemoryLayer, upgrade
from memretrofit.patching.controls import memory_disabled
from memretrofit.patching.ledger import ledger_of
from memretrofit.patching.segment_visit import SegmentLedger
from memretrofit.patching.session import Session, session_of
from memretrofit.patching.surgery import AttentionLedger, attention_ledger_of
from memretrofit.patching.wrapping import evaluating, unwrapped


def save_memory(
    cache: Cache,
    model: nn.Module,
    folder: str | Path,
    *,
    input_ids: Tensor | None = None,
    tokenizer: Any = None,
    text: str | None = None,
    text_name: str | None = None,
) -> Remembered:
    """Save what a patched model's cache holds; `load_memory` gives an equal cache.

    Padding is not part of a cache: going on with a padded batch needs its attention mask again. A
    kill, an error or a full disk leaves in `folder` what was there before.

    Args:
        cache: filled by `model`; it does not change.
        model: the patched model, or the PeftModel around it.
        folder: made where it is missing; an earlier conversation in it is replaced.
        input_ids: the tokens that were read, which `generate` wants to see again.         [B, T]
        tokenizer: its fingerprint is recorded.
        text: its hash is recorded.
        text_name: what the text is called.

    Raises:
        StateError: the model is not patched, or the cache is empty or not one that it filled.
        UnsupportedModelError: a layer of the cache has no form on disk.
        ConfigError: `input_ids` are not those of the cache.
        CheckpointError: the folder cannot be written to.
    """
    folder = Path(folder)
    inner = unwrapped(model)
    ledger = remembering_ledger(inner)
    rows, tokens = _filled(cache, ledger)
    seams = ledger.seams.values() if isinstance(ledger, AttentionLedger) else ()
    memories = {seam.layer_idx: seam.memory for seam in seams}
    contents = [
        content_of(layer, place, memories.get(place)) for place, layer in enumerate(cache.layers)
    ]
    if input_ids is not None and tuple(input_ids.shape) != (rows, tokens):
        raise ConfigError(
            f"save_memory: input_ids of shape {tuple(input_ids.shape)}, and the cache holds "
            f"{rows} rows of {tokens} tokens. Pass all tokens that were read, or none."
        )
    base = base_record(inner, None, tokenizer)
    data = folder / f"data-{uuid.uuid4().hex[:12]}"
    made = not folder.exists()
    try:
        data.mkdir(parents=True)
        files = {
            layer_file(place): write_pieces(
                data / layer_file(place), tensors, content.to_metadata()
            )
            for place, (content, tensors) in enumerate(contents)
        }
        if input_ids is not None:
            files[TOKENS] = write_pieces(
                data / TOKENS, {"input_ids": Written.whole(input_ids.long())}, {}
            )
        record = {
            "schema_version": SCHEMA_VERSION,
            "memretrofit_version": __version__,
            "method": ledger.config.to_dict(),
            "base": base.to_dict(),
            "added_sha256": added_sha256(model),
            "tokens": tokens,
            "rows": rows,
            "layers": len(contents),
            "text_name": text_name,
            "text_sha256": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
            "data": data.name,
            "files": {name: file_entry(data / name, digest) for name, digest in files.items()},
        }
        (data / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in [*data.iterdir(), data]:
            sync(path)
        os.replace(data / RECORD, folder / RECORD)
        sync(folder)
    except BaseException as error:
        done = _names(folder, data)
        if not done:
            shutil.rmtree(data, ignore_errors=True)
            if made:
                with suppress(OSError):
                    folder.rmdir()
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"Saving to {folder} failed: {error.strerror or error}. "
            f"{'The new conversation' if done else 'What was saved there before'} can be loaded. "
            "Make room, or choose a folder that you may write to, and save again."
        ) from error
    for old in folder.iterdir():
        if DATA.fullmatch(old.name) and old != data:
            shutil.rmtree(old, ignore_errors=True)
    return read_remembered(folder)


def load_memory(model: nn.Module, folder: str | Path, *, repeats: int = 1) -> Cache:
    """The cache that `save_memory` saved, as if `model` had just read the text itself.

    ::

        cache = load_memory(model, "book.mem")
        model(question, past_key_values=copy.deepcopy(cache))

    Everything small is checked against what was saved; of a file above 1 MiB a sample of its
    pages is (`verify_memory` reads all). Where the model is on the CPU, or its stores lie on host
    or disk, the blocks of a store are mapped and read when they are fetched; such a store takes no
    gradients, so go on under `torch.no_grad()`.

    Args:
        model: the model that read the text, patched with the same method and parameters.
        folder: what `save_memory` wrote.
        repeats: copies of each row, to go on from it in so many ways: `num_beams`, or a batch of
            questions to one text. A store with rows that moved is not mapped but in memory.

    Raises:
        ConfigError: `repeats` is below 1.
        StateError: the model is not patched.
        CheckpointError: another model, other weights or memory parameters, another method config;
            a file that is missing, truncated, edited or does not fit.
    """
    if repeats < 1:
        raise ConfigError(f"load_memory: repeats={repeats}; pass at least 1")
    inner = unwrapped(model)
    ledger = remembering_ledger(inner)
    record = read_remembered(folder)
    _check_model(inner, ledger, record)
    if added_sha256(model) != record.added_sha256:
        raise CheckpointError(
            f"The conversation in {record.folder} was read with other parameters of "
            f"{ledger.config.method} (or of an adapter) than this model has. Load the saved memory "
            "that read it (from_pretrained), or read the text again with this one."
        )
    cache = DynamicCache(config=inner.config)
    slots = _slots(inner, cache, ledger, record)
    if len(slots) != record.layers:
        raise CheckpointError(
            f"{record.folder} holds {record.layers} layers, and this model's cache has "
            f"{len(slots)}. Load the model that read the text."
        )
    for place, slot in enumerate(slots):
        path = record.path(layer_file(place))
        header = checked_header(record, path)
        content = Content.from_metadata(header.metadata)
        if content is None:
            raise CheckpointError(f"{path}: its header names no layer. Save the text again.")
        if (content.kind, kind_of(slot.layer, place)) == (FULL, SLIDING):
            # the text was read into a DynamicCache that was made without the model's config
            cache.layers[place] = DynamicLayer()
            slot = replace(slot, layer=cache.layers[place])
        faults = slot.faults(content, header.specs)
        faults = faults or differences(dict(slot.expected(content, header.specs)), header.specs)
        if faults:
            raise CheckpointError(
                f"{path} does not fit layer {place} of this {type(inner).__name__} with "
                f"{ledger.config}: {listing(faults)}\nRead and save the text again."
            )
        slot.restore(content, path, header)
    if (held := _filled(cache, ledger)) != (record.rows, record.tokens):
        raise CheckpointError(
            f"{record.folder / RECORD} tells of {record.rows} rows of {record.tokens} tokens, and "
            f"its files hold {held[0]} of {held[1]}. Undo the edit, or read and save the text "
            "again."
        )
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
    return cache


def _names(folder: Path, data: Path) -> bool:
    """Whether the record in `folder` is the one that names `data`."""
    try:
        return read_json(folder / RECORD).get("data") == data.name
    except CheckpointError:
        return False


def remembering_ledger(model: nn.Module) -> AttentionLedger | SegmentLedger:
    """What was added to a model whose cache can be saved.

    Raises:
        StateError: the model is not patched, or its memory keeps no conversation.
    """
    ledger = ledger_of(model)
    return ledger if isinstance(ledger, SegmentLedger) else attention_ledger_of(model)


def _filled(cache: Any, ledger: AttentionLedger | SegmentLedger) -> tuple[int, int]:
    """Rows and tokens of a cache that the model of `ledger` filled."""
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise UnsupportedModelError(
            f"A {type(cache).__name__} is no cache of a patched model. Pass what a forward "
            "returned as past_key_values."
        )
    if isinstance(ledger, SegmentLedger):
        owners = {0: ledger.owner}
    else:
        owners = {seam.layer_idx: seam.owner.key for seam in ledger.seams.values()}
    found = (0, 0)
    for place, owner in owners.items():
        layer = cache.layers[place] if place < len(cache.layers) else None
        if not isinstance(layer, (MemoryLayer, Session)) or layer.owner != owner:
            kind = "no layer" if layer is None else f"a {type(layer).__name__}"
            raise StateError(
                f"Layer {place} of this cache is {kind} that this patched model did not "
                "fill. Pass a cache of this model: model(ids, use_cache=True).past_key_values."
            )
        rows = layer.counts if isinstance(layer, Session) else layer.streams["key"].view
        if rows is None or not layer.seen:
            raise StateError(
                "This cache holds no token, so there is nothing to remember. Read a text first: "
                "model(ids, past_key_values=cache)."
            )
        found = len(rows), layer.seen
    return found


def _check_model(
    model: nn.Module, ledger: AttentionLedger | SegmentLedger, record: Remembered
) -> None:
    """Refuse a model under which the saved conversation would mean something else."""
    asked = f"The conversation in {record.folder} was read by"
    if told := base_differences(model, record.base):
        raise CheckpointError(
            f"{asked} {record.base}. This is another model, {told}. Load the model that read it, "
            "or read the text again with this one."
        )
    dtype = next(p.dtype for _, p in base_parameters(model) if p.is_floating_point())
    if str(dtype) != f"torch.{record.base.dtype}":
        raise CheckpointError(
            f"{asked} {record.base} in {record.base.dtype}; this model is in "
            f"{str(dtype).removeprefix('torch.')}. Load it with dtype={record.base.dtype!r}."
        )
    found, saved = ledger.config.to_dict(), record.method.to_dict()
    if found != saved:
        lines = [
            f"{name}: {found.get(name)!r}, recorded {saved.get(name)!r}"
            for name in {**saved, **found}
            if found.get(name) != saved.get(name)
        ]
        raise CheckpointError(
            f"{asked} a model that was patched otherwise than this one:{listing(lines)}\n"
            "Patch the model with the recorded config (read_remembered(folder).method), or read "
            "the text again."
        )


def _slots(
    model: Any, cache: Cache, ledger: AttentionLedger | SegmentLedger, record: Remembered
) -> list[Slot] | list[SessionSlot]:
    """What every layer of a fresh cache of the model may be filled with."""
    if isinstance(ledger, SegmentLedger):
        return [SessionSlot(session_of(cache, ledger.owner), ledger, model, record.rows)]
    inner = {seam.layer_idx: seam for seam in ledger.seams.values()}
    for index, seam in inner.items():
        upgrade(cache, index, seam.memory, seam.owner.key)
    sites = {site.layer_idx: site for site in ledger.sites}
    anywhere = ledger.device_of(ledger.sites[0])
    return [
        Slot(
            layer,
            sites.get(place),
            inner[place].memory if place in inner else None,
            ledger.device_of(sites[place]) if place in sites else anywhere,
            record.rows,
            functools.partial(_cached_size, model, place),
        )
        for place, layer in enumerate(cache.layers)
    ]


@torch.no_grad()
def _cached_size(model: Any, place: int) -> tuple[Size, Size]:
    """Heads and width of the keys and of the values that the unpatched model caches in a layer."""
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device)
    with evaluating(model), memory_disabled(model):
        layer = model(input_ids=ids, use_cache=True).past_key_values.layers[place]
    return layer.keys.shape[1::2], layer.values.shape[1::2]


@torch.no_grad()
def added_sha256(model: nn.Module) -> str:
    """SHA-256 over what a patch and PEFT added to the base model: names, types, shapes, values."""
    inner = unwrapped(model)
    added = memory_tensors(ledger_of(inner))
    base = {parameter for _, parameter in base_parameters(inner)}
    memories = {parameter for parameter in added.values()}
    added |= {
        name: parameter
        for name, parameter in inner.named_parameters()
        if parameter not in base and parameter not in memories and ".memory." not in name
    }
    digest = hashlib.sha256(f"{model.active_adapter if is_peft(model) else ''}\n".encode())
    for name, tensor in sorted(added.items()):
        digest.update(f"{name} {spec_of(tensor)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().tobytes())
    return digest.hexdigest()
