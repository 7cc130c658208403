"""Let some modules of one model see another attention implementation, without touching the shared
config object.

Attention modules and mask builders read `self.config._attn_implementation`. The config object is
shared with the rest of the model, and with every other model that was built from it, so it must
not be changed. A view shares the config's attributes (reads and writes go both ways) and differs
in that one property.
"""

from __future__ import annotations

from functools import cache

from transformers import PreTrainedConfig

from memretrofit.errors import UnsupportedModelError

PREFIX = "memretrofit_"
IMPLEMENTATIONS = ("sdpa", "eager")


@cache
def _view_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    def read(self: PreTrainedConfig) -> str:
        base = base_implementation(self)
        if base not in IMPLEMENTATIONS:
            raise UnsupportedModelError(
                f"A patched model was set to attention implementation {base!r}; memretrofit serves "
                f"{' and '.join(IMPLEMENTATIONS)}. Call model.set_attn_implementation('sdpa')."
            )
        return PREFIX + base

    def write(self: PreTrainedConfig, value: str | dict | None) -> None:
        config_class._attn_implementation.fset(self, value)  # type: ignore[attr-defined]

    body = {
        "_attn_implementation": property(read, write),
        "__module__": config_class.__module__,
        "is_memretrofit_view": True,
    }
    return type(config_class.__name__, (config_class,), body)


def base_implementation(config: PreTrainedConfig) -> str:
    """The model's own attention implementation, also when `config` is a view."""
    return config._attn_implementation_internal or "eager"


def config_view(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config that shares all attributes of `config` and names the memretrofit attention
    function.
    """
    view = object.__new__(_view_class(type(config)))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


def is_view(config: object) -> bool:
    """Whether `config` came from `config_view`."""
    return isinstance(config, PreTrainedConfig) and str(config._attn_implementation).startswith(
        PREFIX
    )
