"""Train the memory of a patched model: attention transfer, self-distillation, or both by a recipe.

`attention_transfer` fits each layer's memory to the far part of that layer's own full attention,
with no backward pass through the model. `self_distillation` fits the whole model to itself with
memory disabled. `train` runs a recipe: load, patch, both stages, save. All go on after a kill.
"""

from memretrofit.training.base import load_base
from memretrofit.training.distill import DistillSettings, self_distillation
from memretrofit.training.run import train
from memretrofit.training.trainable import (
    GradientWatch,
    load_parameters,
    save_parameters,
    trainable_parameters,
)
from memretrofit.training.transfer import TransferSettings, TransferStep, attention_transfer

__all__ = [
    "DistillSettings",
    "GradientWatch",
    "TransferSettings",
    "TransferStep",
    "attention_transfer",
    "load_base",
    "load_parameters",
    "save_parameters",
    "self_distillation",
    "train",
    "trainable_parameters",
]
