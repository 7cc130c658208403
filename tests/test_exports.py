"""The public surface: what `memretrofit` exports, and that importing it changes nothing."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import subprocess
import sys

import pytest

import memretrofit
from memretrofit.methods import available_methods

PUBLIC = {
    "AHNConfig",
    "ARMTConfig",
    "CAMELoTConfig",
    "ComposedConfig",
    "EMLLMConfig",
    "EvictionConfig",
    "HMTConfig",
    "HeadPlanConfig",
    "InfLLMConfig",
    "KNNMemoryConfig",
    "LandmarkConfig",
    "LoLCATsConfig",
    "MPlusConfig",
    "MemoryLLMPoolConfig",
    "RMTConfig",
    "StreamingLLMConfig",
    "EngramConfig",
    "HierarchicalFFNConfig",
    "MemoryPlusConfig",
    "ProductKeyConfig",
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
}


def run(code: str) -> str:
    """Output of a fresh interpreter, in which a warning is an error too."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_surface_is_pinned() -> None:
    assert set(memretrofit.__all__) == PUBLIC
    assert set(dir(memretrofit)) >= PUBLIC
    assert re.fullmatch(r"\d+\.\d+\.\d+", memretrofit.__version__)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__"}))
def test_every_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(memretrofit, name)
    assert callable(value)
    assert value.__module__.startswith("memretrofit.")
    assert value.__doc__


def test_every_method_config_is_exported_without_a_list() -> None:
    for info in available_methods().values():
        assert getattr(memretrofit, info.config_class.__name__) is info.config_class


@pytest.mark.parametrize("name", ["ptach", "NoSuchConfig", "_Config"])
def test_unknown_names_are_attribute_errors(name: str) -> None:
    with pytest.raises(AttributeError, match=name):
        getattr(memretrofit, name)


def test_no_module_hides_a_public_name() -> None:
    """Importing memretrofit.describe, say, would put the module where the function is."""
    modules = {module.name for module in pkgutil.iter_modules(memretrofit.__path__)}
    assert not modules & PUBLIC


def test_import_loads_neither_torch_nor_transformers() -> None:
    heavy = {"torch", "transformers", "peft", "accelerate", "yaml", "typer"}
    loaded = run("import sys, memretrofit; print(*{m.partition('.')[0] for m in sys.modules})")
    assert not heavy & set(loaded.split())


def test_import_changes_no_global_of_transformers() -> None:
    """Attention and mask functions and classes are as found, with every method loaded."""
    run(
        "import transformers as t, torch\n"
        "from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin\n"
        "from transformers.cache_utils import DynamicCache, DynamicLayer\n"
        "def seen():\n"
        "    tables = [dict(AttentionInterface()), dict(AttentionMaskInterface())]\n"
        "    owners = [t.PreTrainedModel, GenerationMixin, DynamicCache, DynamicLayer]\n"
        "    return tables + [dict(vars(owner)) for owner in [*owners, torch.nn.Module]]\n"
        "before = seen()\n"
        "import memretrofit\n"
        "memretrofit.available_methods(), memretrofit.patch\n"
        "assert seen() == before\n"
    )


@pytest.mark.parametrize("package", ["memretrofit.ops", "memretrofit.modules"])
def test_lower_layers_import_without_transformers(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    names = [
        f"{package}.{module.name}"
        for module in pkgutil.iter_modules(spec.submodule_search_locations)
    ]
    assert names
    run(
        "import sys, importlib\n"
        "for name in ('transformers', 'peft', 'accelerate', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        f"for name in {names}: importlib.import_module(name)\n"
    )
