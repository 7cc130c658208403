"""The dry run: every step of a recipe on a tiny random model of the same architecture."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from transformers import PreTrainedConfig

from memretrofit.recipe import Recipe
from memretrofit.training.base import load_base_config
from memretrofit.training.rehearsal_of_banks import BankRehearsal
from memretrofit.training.rehearsal_of_procedures import ProcedureRehearsal
from memretrofit.training.rehearsal_of_recurrence import RecurrenceRehearsal
from memretrofit.training.rehearsal_of_rows import RowRehearsal
from memretrofit.training.small import Rehearsal

REHEARSALS: dict[str, Rehearsal] = {
    "inject": BankRehearsal(),
    "procedures": ProcedureRehearsal(),
    "recurrence": RecurrenceRehearsal(),
}
"""By the first stage of a recipe; all others read rows."""


def rehearse(recipe: Recipe, console: Console | None = None) -> None:
    """Two steps of each stage in small, the result saved and deleted; then sizes and time.

    Raises:
        ConfigError: the config of the base cannot be read, or the method does not fit it.
    """
    config = load_base_config(recipe.base.model, recipe.base.revision, recipe.base.gguf_file)
    _rehearsal_of(recipe).rehearse(recipe, config, console or Console())


def run_small(recipe: Recipe, config: PreTrainedConfig, output: Path) -> Path:
    """The run of a recipe in small: a tiny model of the kind that `config` describes."""
    return _rehearsal_of(recipe).run_small(recipe, config, output)


def _rehearsal_of(recipe: Recipe) -> Rehearsal:
    first = "".join(recipe.train.stages[:1])
    return REHEARSALS.get(first) or RowRehearsal()
