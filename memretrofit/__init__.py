"""Give a pretrained Transformers model a memory, in place, without copying its modeling code.

::

    model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
    memretrofit.patch(model, memretrofit.AHNConfig(sliding_window=1024))
    model.generate(**tokenizer(book, return_tensors="pt"))  # bounded cache
    memretrofit.unpatch(model)  # the model it was, bit for bit

Importing this package changes nothing anywhere, and loads neither torch nor transformers: each name
below is imported when it is first used.

Shapes, in every docstring and annotation::

    B  batch          T  time               E  hidden size
    H  query heads    G  key-value heads    K  key and query dim of a head    V  value dim of a head
    W  window         N  sinks              M  memory slots                   C  chunk

Tensors at attention are `[B, H, T, K]`; a recurrent state is `[B, H, K, V]`; `g` is a log decay
(never above 0), `beta` a write strength.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from memretrofit.hub import (
        export_standalone,
        from_pretrained,
        load_memory,
        push_to_hub,
        save_memory,
        save_pretrained,
    )
    from memretrofit.methods import available_methods
    from memretrofit.methods.ahn import AHNConfig
    from memretrofit.methods.armt import ARMTConfig
    from memretrofit.methods.camelot import CAMELoTConfig
    from memretrofit.methods.composed import ComposedConfig
    from memretrofit.methods.em_llm import EMLLMConfig
    from memretrofit.methods.engram import EngramConfig
    from memretrofit.methods.eviction import EvictionConfig
    from memretrofit.methods.head_plan import HeadPlanConfig
    from memretrofit.methods.hierarchical_ffn import HierarchicalFFNConfig
    from memretrofit.methods.hmt import HMTConfig
    from memretrofit.methods.infllm import InfLLMConfig
    from memretrofit.methods.knn_memory import KNNMemoryConfig
    from memretrofit.methods.landmark import LandmarkConfig
    from memretrofit.methods.lolcats import LoLCATsConfig
    from memretrofit.methods.memory_plus import MemoryPlusConfig
    from memretrofit.methods.memoryllm_pool import MemoryLLMPoolConfig
    from memretrofit.methods.mplus import MPlusConfig
    from memretrofit.methods.product_key import ProductKeyConfig
    from memretrofit.methods.rmt import RMTConfig
    from memretrofit.methods.streaming_llm import StreamingLLMConfig
    from memretrofit.methods.token_lookup import TokenLookupConfig
    from memretrofit.methods.tokmem import TokMemConfig
    from memretrofit.methods.window_sinks import WindowSinksConfig
    from memretrofit.retrofit import describe, memory_disabled, patch, unpatch

__all__ = [
    "AHNConfig",
    "ARMTConfig",
    "CAMELoTConfig",
    "ComposedConfig",
    "EMLLMConfig",
    "EngramConfig",
    "EvictionConfig",
    "HMTConfig",
    "HeadPlanConfig",
    "HierarchicalFFNConfig",
    "InfLLMConfig",
    "KNNMemoryConfig",
    "LandmarkConfig",
    "LoLCATsConfig",
    "MPlusConfig",
    "MemoryLLMPoolConfig",
    "MemoryPlusConfig",
    "ProductKeyConfig",
    "RMTConfig",
    "StreamingLLMConfig",
    "TokMemConfig",
    "TokenLookupConfig",
    "WindowSinksConfig",
    "__version__",
    "available_methods",
    "describe",
    "export_standalone",
    "from_pretrained",
    "load_memory",
    "memory_disabled",
    "patch",
    "push_to_hub",
    "save_memory",
    "save_pretrained",
    "unpatch",
]

_HOMES = {
    "available_methods": "methods",
    "describe": "retrofit",
    "export_standalone": "hub",
    "from_pretrained": "hub",
    "load_memory": "hub",
    "memory_disabled": "retrofit",
    "patch": "retrofit",
    "push_to_hub": "hub",
    "save_memory": "hub",
    "save_pretrained": "hub",
    "unpatch": "retrofit",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use. Configs are found in the folder of the methods."""
    if name in _HOMES:
        value = getattr(importlib.import_module(f"memretrofit.{_HOMES[name]}"), name)
    elif name.endswith("Config") and not name.startswith("_"):
        value = _config_class(name)
    else:
        raise AttributeError(f"module 'memretrofit' has no attribute {name!r}")
    globals()[name] = value
    return value


def _config_class(name: str) -> Any:
    from memretrofit.methods import available_methods

    for info in available_methods().values():
        if info.config_class.__name__ == name:
            return info.config_class
    raise AttributeError(
        f"module 'memretrofit' has no attribute {name!r}: no method has that config"
    )


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted(set(globals()) | set(__all__))
