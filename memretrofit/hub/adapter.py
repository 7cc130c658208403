"""A PEFT adapter beside the memory: PEFT's own two files, in its own format."""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from memretrofit.errors import CheckpointError, StateError, UnsupportedModelError
from memretrofit.hub.record import ADAPTER, ADAPTER_CONFIG, TensorSpec
from memretrofit.hub.tensors import differences, listing, read_header, read_tensors
from memretrofit.patching.wrapping import unwrapped


def is_peft(model: nn.Module) -> bool:
    """Whether `model` is a PeftModel."""
    return unwrapped(model) is not model


def refuse_prompt_learning(model: Any) -> None:
    """Let no adapter pass that acts on a whole prompt: read in chunks it would act on each.

    Raises:
        UnsupportedModelError: an active adapter learns a prompt or a prefix, or begins at certain
            tokens (aLoRA).
    """
    if not is_peft(model):
        return
    names = model.active_adapter
    for name in [names] if isinstance(names, str) else names:
        config = model.peft_config[name]
        if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
            raise UnsupportedModelError(
                f"The adapter {name!r} ({type(config).__name__}) depends on where a prompt begins, "
                "and prompts are read in chunks. Use an adapter of the weights, such as LoRA, or "
                "measure the model without it: peft_model.get_base_model()."
            )


def save_adapter(model: Any, folder: Path) -> list[str]:
    """Let PEFT write the active adapter, if any, into `folder`; return the names of its files.

    Raises:
        StateError: more than one adapter is active, or adapters are merged into the base weights.
    """
    layers = _tuner_layers(model)
    if not layers:
        return []
    if not is_peft(model):
        raise StateError(
            f"This {type(model).__name__} holds PEFT layers that save_pretrained cannot reach. "
            "Save the PeftModel that "
            "get_peft_model returned."
        )
    if any(layer.merged for layer in layers):
        raise StateError(
            "The adapter is merged into the base weights. Call model.unmerge_adapter() before "
            "saving."
        )
    name = model.active_adapter
    if not isinstance(name, str):
        raise StateError(
            f"{len(name)} adapters are active ({', '.join(name)}); a saved memory holds one. Call "
            "set_adapter."
        )
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        # the base's embeddings are the base's; asking PEFT to decide would ask the Hub
        model.save_pretrained(inside, selected_adapters=[name], save_embedding_layers=False)
        written = Path(inside) if name == "default" else Path(inside) / name
        for file in (ADAPTER_CONFIG, ADAPTER):
            shutil.move(written / file, folder / file)
    read_header(folder / ADAPTER)
    read_tensors(folder / ADAPTER)  # refuses what is not finite
    return [ADAPTER_CONFIG, ADAPTER]


def add_adapter(model: Any, config: Any) -> Any:
    """`get_peft_model` without the warning that PEFT 0.21 and Transformers 5.23 make together."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        # PEFT asks by a name that Transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def attach_adapter(model: Any, folder: Path) -> Any:
    """`model` as a PeftModel with the adapter in `folder`, frozen; the memory stays trainable.

    Raises:
        StateError: the model has an adapter already.
        CheckpointError: the files are damaged or do not fit the model. It is then as it was.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict

    if _tuner_layers(model):
        raise StateError(
            f"This {type(model).__name__} holds PEFT layers already, and the saved memory has an "
            "adapter of its own. "
            "Pass a base model without them (peft_model.unload())."
        )
    found = read_header(folder / ADAPTER).specs
    tensors = read_tensors(folder / ADAPTER)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules = {module: dict(module._modules) for module in model.modules()}
    try:
        config = PeftConfig.from_pretrained(str(folder))
        _check_rank(config, found)
        config.base_model_name_or_path = None  # checked by fingerprint; a folder may have moved
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # pyright: ignore  # others would change the base's weights
        adapted = add_adapter(model, config)
        expected = {
            # PEFT keeps adapters in float32 whatever the file holds
            name: TensorSpec(tuple(x.shape), found[name].dtype if name in found else "F32")
            for name, x in get_peft_model_state_dict(adapted, save_embedding_layers=False).items()
        }
        if lines := differences(expected, found):
            raise ValueError(
                f"the tensors of {ADAPTER} are not those that it describes{listing(lines)}"
            )
        set_peft_model_state_dict(adapted, tensors)
    except Exception as error:  # whatever PEFT makes of a file that somebody edited
        # not unload: PEFT may have stopped half-way
        for module, children in modules.items():
            module._modules.clear()
            module._modules.update(children)
        vars(model).pop("peft_config", None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} does not fit {type(model).__name__}: {error}"
        ) from error
    for name, parameter in model.named_parameters():
        if ".memory." in name:
            parameter.requires_grad_(before.get(name, True))
    return adapted.train(model.training)


def _check_rank(config: Any, specs: Mapping[str, TensorSpec]) -> None:
    """Refuse a rank that no tensor of the file has: PEFT makes room for it first."""
    pattern = getattr(config, "rank_pattern", None) or {}
    ranks = [x for x in (getattr(config, "r", 0), *pattern.values()) if isinstance(x, int)]
    most = max((size for spec in specs.values() for size in spec.shape), default=0)
    if max(ranks, default=0) > most:
        raise ValueError(f"a rank of {max(ranks)}, and no tensor of {ADAPTER} is so large")


def _tuner_layers(model: nn.Module) -> list[Any]:
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
