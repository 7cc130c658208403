"""Configs: frozen values that check themselves and survive a round trip through JSON."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable, Mapping, Set
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast

from memretrofit.errors import ConfigError, did_you_mean

C = TypeVar("C", bound="Checked")


@dataclass(frozen=True, kw_only=True)
class Range:
    """Limits of a number, or of every number in a list: `Annotated[float, Range(above=0)]`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def problem(self, value: Any) -> str | None:
        """What is wrong with `value`, or None."""
        # An optional field may hold None: nothing to limit.
        values = cast("tuple[Any, ...]", value if isinstance(value, tuple) else (value,))
        numbers: list[float] = [x for x in values if x is not None]
        limits: list[tuple[str, float | None, Callable[[float, float], bool]]] = [
            ("at least", self.least, lambda x, limit: x >= limit),
            ("at most", self.most, lambda x, limit: x <= limit),
            ("above", self.above, lambda x, limit: x > limit),
        ]
        for words, limit, holds in limits:
            if limit is not None and not all(holds(x, limit) for x in numbers):
                return f"must be {words} {limit}"
        return None


# One spelling, one meaning, one range in every method and recipe.
_SHARED = {
    "sliding_window": Range(least=1),
    "num_sink_tokens": Range(least=0),
    "num_memory_tokens": Range(least=1),
    "segment_length": Range(least=1),
    "chunk_size": Range(least=1),
    "top_k": Range(least=1),
    "block_size": Range(least=1),
    "hot_bytes": Range(least=0),
    "position_group": Range(least=1),
    "layers_to_transform": Range(least=0),
}


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A frozen dataclass that checks its fields when it is built, and raises all faults at once.

    Each fault is one line that begins with the name of the field, so that an outer value can put
    its own name before it (`train.learning_rate=...`).

    Raises:
        ConfigError: one or more fields are not usable; `problems` lists them.
    """

    def __new__(cls, *_: Any, **given: Any) -> Any:
        """Refuse unknown names with the nearest legal one, where Python would only count them."""
        legal = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in legal]
        if unknown:
            faults = [f"{name}: unknown field; {did_you_mean(name, legal)}" for name in unknown]
            raise ConfigError.listing(cls.__name__, faults)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every field: type, range, then the relations between fields."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        values, faults, faulty = _check_fields(type(self), given)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        faults += self.relations(faulty)
        if faults:
            raise ConfigError.listing(type(self).__name__, faults)

    def relations(self, faulty: Set[str]) -> list[str]:
        """What is wrong between fields, given the names of those already found faulty.

        Override this instead of `problems` where a relation can be judged although another field
        is faulty.
        """
        return [] if faulty else self.problems()

    def problems(self) -> list[str]:
        """What is wrong beyond the type and range of each field, one line per fault; a hook.

        Only called when every field has a legal type and range.
        """
        return []

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values; nested values become nested dictionaries."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Checked):
    """What a method needs to know, as a value. Subclasses are final, frozen and keyword-only.

    A subclass lives in the file of its method, which gives it its name.
    """

    method: ClassVar[str] = ""
    """Name of the method: the file that defines the class."""
    schema_version: ClassVar[int] = 1
    """Version of the fields on disk. A field that changes meaning raises it, with an upgrade."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take the name of the method from the file that defines the class."""
        super().__init_subclass__(**kwargs)
        cls.method = cls.__module__.rpartition(".")[2]

    def __post_init__(self) -> None:
        """Check every field; only a method's own class can be built."""
        if type(self) is MethodConfig:
            raise TypeError("MethodConfig is abstract: use the config of a method, e.g. AHNConfig")
        super().__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, with the method's name and the version of the schema."""
        return {"method": self.method, "schema_version": self.schema_version, **super().to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MethodConfig:
        """The config that `to_dict` wrote.

        On `MethodConfig` the key `method` chooses the class; on a subclass it must agree or be
        absent.

        Raises:
            ConfigError: unknown method, version or fields, missing fields, wrong types or ranges.
        """
        given = dict(values)
        name = given.pop("method", cls.method)
        faults: list[str] = []
        found = cls
        if cls is MethodConfig:
            # Methods import this module; and reading one config must not import the other methods.
            from memretrofit.methods import get_method

            if not name:
                raise ConfigError("method config: the key 'method' is missing")
            found = get_method(name).config_class
        elif name != cls.method:
            faults.append(f"method={name!r}: {cls.__name__} reads {cls.method!r} only")
        version = given.pop("schema_version", found.schema_version)
        if type(version) is not int or version != found.schema_version:
            faults.append(
                f"schema_version={version!r}: this release reads {found.schema_version}; "
                "install the one that wrote the file"
            )
        return build(found, given, faults)


def larger_than_a_segment(num_memory_tokens: int, segment_length: int) -> list[str]:
    """What is wrong where a segment would be written by, or leave, more tokens than it has."""
    if num_memory_tokens <= segment_length:
        return []
    return [
        f"num_memory_tokens={num_memory_tokens}: more than the {segment_length} tokens of a "
        "segment; use fewer, or raise segment_length"
    ]


def exact_tokens(config: MethodConfig) -> int | None:
    """Tokens of a text that lack nothing: the W + N that a method's layers attend exactly at any
    length, or the T of a segment. What comes after them has something behind it that only the
    memory can give. None for a method without window or segments.
    """
    window = getattr(config, "sliding_window", None)
    if window is None:
        return getattr(config, "segment_length", None)
    return window + getattr(config, "num_sink_tokens", 0)


def build(cls: type[C], values: Mapping[str, Any], faults: list[str] | None = None) -> C:
    """A checked value from plain data; nested mappings become the classes of the annotations.

    Args:
        faults: lines found before, reported together with those found here.

    Raises:
        ConfigError: every fault of every level, in one error.
    """
    found = list(faults or [])
    hints = typing.get_type_hints(cls, include_extras=True)
    legal = {field.name: field for field in fields(cls)}
    given: dict[str, Any] = {}
    nested_faults: set[str] = set()
    for name, value in values.items():
        if name not in legal:
            found.append(f"{name}: unknown field; {did_you_mean(name, legal)}")
            continue
        given[name] = value
        if _is_checked(hints[name]) and isinstance(value, Mapping):
            try:
                given[name] = build(hints[name], cast("Mapping[str, Any]", value))
            except ConfigError as error:
                found += [f"{name}.{problem}" for problem in error.problems]
                nested_faults.add(name)
    missing = {
        name
        for name, field in legal.items()
        if field.default is MISSING and field.default_factory is MISSING and name not in given
    }
    # A section that the caller found faulty, and left out for that, is not missing as well.
    reported = {fault.partition(".")[0] for fault in found}
    found += [f"{name}: missing" for name in legal if name in missing - reported]
    # With a part faulty or missing there is nothing to build; the other fields are still checked.
    usable = {name: value for name, value in given.items() if name not in nested_faults}
    if missing or nested_faults:
        found += _check_fields(cls, usable)[1]
        raise ConfigError.listing(cls.__name__, found)
    try:
        value = cls(**usable)
    except ConfigError as error:
        raise ConfigError.listing(cls.__name__, [*found, *error.problems]) from None
    if found:
        raise ConfigError.listing(cls.__name__, found)
    return value


def _check_fields(
    cls: type[Checked], given: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str], set[str]]:
    """Converted values, faults, and the names of the faulty fields."""
    hints = typing.get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for name, value in given.items():
        hint, limits = hints[name], [_SHARED[name]] if name in _SHARED else []
        for member in (hint, *typing.get_args(hint)):  # also of `Annotated[int, Range] | None`
            if typing.get_origin(member) is Annotated:
                limits += [limit for limit in member.__metadata__ if isinstance(limit, Range)]
        if typing.get_origin(hint) is Annotated:
            hint = hint.__origin__
        fits, values[name] = coerce(value, hint)
        if not fits:
            faults[name] = f"{name}={value!r}: expected {_expected(value, hint)}"
            continue
        found = [limit.problem(values[name]) for limit in limits]
        if name == "layers_to_transform" and values[name] is not None:
            found.append(_layer_problem(values[name]))
        if any(found):
            faults[name] = f"{name}={value!r}: " + ", ".join(filter(None, found))
    return values, list(faults.values()), set(faults)


def _layer_problem(layers: tuple[int, ...]) -> str | None:
    if not layers:
        return "is empty; None means every layer"
    return None if len(set(layers)) == len(layers) else "names a layer twice"


def _is_checked(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Checked)


def _plain(value: Any) -> Any:
    if isinstance(value, Checked):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(item) for item in cast("tuple[Any, ...]", value)]
    return value


def coerce(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether `value` fits the annotation `hint`, and the value in its own form.

    Only what JSON and YAML cannot tell apart is converted: an int to a float, a list to a tuple.
    A bool is not an int, and nan and infinity are not floats.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return coerce(value, arguments[0])
    if origin is Literal:
        # True == 1: compare types too.
        return any(value == a and type(value) is type(a) for a in arguments), value
    if origin in (Union, types.UnionType):
        results = [coerce(value, argument) for argument in arguments]
        return next((result for result in results if result[0]), (False, value))
    if origin is tuple:
        if type(value) not in (list, tuple):
            return False, value
        items: list[Any] = list(cast("tuple[Any, ...]", value))
        kinds = [arguments[0]] * len(items) if arguments[1:] == (Ellipsis,) else list(arguments)
        if len(items) != len(kinds):
            return False, value
        pairs = [coerce(item, kind) for item, kind in zip(items, kinds, strict=True)]
        return all(fits for fits, _ in pairs), tuple(converted for _, converted in pairs)
    if hint is None or hint is type(None):
        return value is None, value
    if is_dataclass(hint):
        return isinstance(value, cast("type[Any]", hint)), value
    if hint is float:
        if type(value) is int:
            return True, float(value)
        return type(value) is float and math.isfinite(value), value
    return type(value) is hint, value


def _expected(value: Any, hint: Any) -> str:
    """An annotation in words for an error message about `value`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _expected(value, arguments[0])
    if origin is Literal:
        return f"another value; {did_you_mean(value, map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(value, argument) for argument in arguments)
    if origin is tuple:
        kinds = [_expected(value, a) for a in arguments if a is not Ellipsis]
        return "a list of " + (kinds[0] if arguments[1:] == (Ellipsis,) else ", ".join(kinds))
    if hint is type(None):
        return "None"
    words = {float: "a finite number", int: "an integer", bool: "true or false", str: "a string"}
    return words.get(hint, f"a section ({hint.__name__})")
