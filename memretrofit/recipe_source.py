"""The values of a recipe before they are checked: files, `extends`, overrides, paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from memretrofit.errors import ConfigError
from memretrofit.strict_yaml import parse

LOCAL = (".", "/", "~")
"""How a `base.model` that is a folder begins."""


def read_values(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values that the file, the file it extends and the overrides give, and what is wrong.

    Raises:
        ConfigError: a file cannot be read; nothing else can be said then.
    """
    faults: list[str] = []
    values = _read(path, faults)
    parent = values.pop("extends", None)
    if isinstance(parent, str):
        above = _read(path.parent / parent, faults)
        if above.pop("extends", None) is not None:
            faults.append(f"extends={parent!r}: itself extends a file; one level is the limit")
        values = _merge(above, values)
    elif parent is not None:
        faults.append(f"extends={parent!r}: expected the name of one file")
    return values, faults + override_values(values, overrides)


def override_values(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set what the command line says, make paths absolute, and return what is wrong."""
    faults: list[str] = []
    for override in overrides:
        _override(values, override, faults)
    _anchor(values, Path.cwd(), faults)
    return faults


def _read(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path}: cannot be read: {error}") from None
    values, found = parse(text)
    faults += [f"{path.name}: {fault}" for fault in found]
    _anchor(values, path.parent)
    return values


def _merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """The parent with the child's keys over it, section by section."""
    merged = dict(parent)
    for key, value in child.items():
        old = merged.get(key)
        if not isinstance(old, dict) or not isinstance(value, dict):
            merged[key] = value
            continue
        above, below = cast("dict[str, Any]", old), cast("dict[str, Any]", value)
        # The fields of one method mean nothing to another.
        replaced = key == "method" and below.get("name", above.get("name")) != above.get("name")
        merged[key] = below if replaced else _merge(above, below)
    return merged


def _override(values: dict[str, Any], override: str, faults: list[str]) -> None:
    """Set one key; whether the schema knows it is judged with the rest of the recipe."""
    name, equals, text = override.partition("=")
    if not equals or not name:
        faults.append(f"override {override!r}: expected section.key=value")
        return
    parsed, found = parse(f"value: {text}")
    if found:
        faults.append(f"override {override!r}: {'; '.join(found)}")
        return
    *sections, last = name.split(".")
    place = values
    for section in sections:
        inner = place.setdefault(section, {})
        if not isinstance(inner, dict):
            faults.append(f"override {override!r}: {section} is not a section")
            return
        place = cast("dict[str, Any]", inner)
    place[last] = parsed.get("value")


def _anchor(values: dict[str, Any], folder: Path, faults: list[str] | None = None) -> None:
    """Make relative paths absolute. With `faults`, report those that do not exist."""
    base, data = values.get("base"), values.get("data")
    model = cast("dict[str, Any]", base).get("model") if isinstance(base, dict) else None
    if isinstance(model, str) and (model.startswith(LOCAL) or (folder / model).is_dir()):
        place = (folder / Path(model).expanduser()).resolve()
        cast("dict[str, Any]", base)["model"] = str(place)
        if faults is not None and not place.is_dir():
            faults.append(f"base.model={model!r}: no such folder")
    for key in ("lessons", "procedures"):
        named = cast("dict[str, Any]", data).get(key) if isinstance(data, dict) else None
        if not isinstance(named, str):
            continue
        place = (folder / Path(named).expanduser()).resolve()
        cast("dict[str, Any]", data)[key] = str(place)
        if faults is not None and not place.is_file():
            faults.append(f"data.{key}: no file {place}")
    _anchor_injection(values, folder, faults)
    for key in ("sources", "held_out_sources"):
        found = cast("dict[str, Any]", data).get(key) if isinstance(data, dict) else None
        sources = cast("list[Any]", found) if isinstance(found, list) else []
        for index, source in enumerate(sources):
            if not isinstance(source, str) or not is_path(source):
                continue
            place = (folder / Path(source).expanduser()).resolve()
            sources[index] = str(place)
            if faults is not None and not place.exists():
                faults.append(f"data.{key}: no file or folder {place}")


def _anchor_injection(values: dict[str, Any], folder: Path, faults: list[str] | None) -> None:
    train = values.get("train")
    found = cast("dict[str, Any]", train).get("inject") if isinstance(train, dict) else None
    inject = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    onto = inject.get("onto")
    if isinstance(onto, str):
        place = (folder / Path(onto).expanduser()).resolve()
        inject["onto"] = str(place)
        if faults is not None and not place.is_dir():
            faults.append(f"train.inject.onto: no folder {place}")
    for key in ("later", "earlier"):
        named = inject.get(key)
        files = cast("list[Any]", named) if isinstance(named, list) else []
        for index, file in enumerate(files):
            if not isinstance(file, str):
                continue
            place = (folder / Path(file).expanduser()).resolve()
            files[index] = str(place)
            if faults is not None and not place.is_file():
                faults.append(f"train.inject.{key}: no file {place}; name others, or [] for none")


def is_path(source: str) -> bool:
    """Whether an entry of `data.sources` is a path, and not the name of a source."""
    return "/" in source or source.startswith(LOCAL) or source.endswith((".txt", ".jsonl"))
