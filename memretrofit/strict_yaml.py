"""Plain data from YAML: duplicate keys are faults, and `1e-3` and `no` are what they look like.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` is False and `12:30` is 750. Here numbers
and booleans follow YAML 1.2; dates, tags and merge keys do not exist.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, cast

import yaml

_SCALARS = {
    "null": (r"~|null|", ["~", "n", ""]),
    "bool": (r"true|false", ["t", "f"]),
    "int": (r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    "float": (r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?", list("-+.0123456789")),
}


class _Loader(yaml.SafeLoader):
    """Collects faults instead of raising at the first."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.faults: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        values: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            key: Any = self.construct_object(key_node, deep=True)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                self.faults.append(f"line {line}: the key {key!r} is not a string")
                continue
            if key in values:
                self.faults.append(f"line {line}: the key {key!r} is given twice")
            values[key] = self.construct_object(value_node, deep=True)
        return values


# SafeLoader's own table has YAML 1.1 in it.
_Loader.yaml_implicit_resolvers = {}
for _name, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(  # pyright: ignore[reportUnknownMemberType]
        f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"), _first
    )


def _reject(loader: _Loader, node: yaml.Node) -> None:
    loader.faults.append(f"line {node.start_mark.line + 1}: the tag {node.tag} is not plain data")


_PLAIN = {f"tag:yaml.org,2002:{name}" for name in (*_SCALARS, "str", "seq", "map")}
_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN
}
_Loader.yaml_constructors[None] = _reject


def parse(text: str) -> tuple[dict[str, Any], list[str]]:
    """The mapping that `text` holds, and what is wrong with it, one line per fault."""
    loader = _Loader(text)
    try:
        values = loader.get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return {}, [*loader.faults, f"not YAML: {' '.join(str(error).split())}"]
    finally:
        loader.dispose()
    if values is None and not loader.faults:
        values = {}
    if not isinstance(values, dict):
        return {}, loader.faults or ["expected `key: value` lines"]
    return cast("dict[str, Any]", values), loader.faults
