"""Where a decoder can be entered: found by running it, with the shapes that it really passes."""

from __future__ import annotations

import pytest
from contract.families import FAMILIES, build

from memretrofit.patching.sites import find_attention_sites

EXPECTED = {  # heads, KV heads, key dim, value dim, whether keys can be un-rotated
    "llama": (4, 2, 8, 8, True),
    "qwen3": (4, 2, 8, 8, True),
    "gemma3": (4, 2, 8, 8, True),
    "gpt_neox": (4, 4, 8, 8, True),
    "mixtral": (4, 2, 8, 8, True),
    "deepseek_v3": (4, 4, 12, 10, False),
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_sites_of_every_family(family):
    model = build(family, layers=3)
    sites = find_attention_sites(model)
    assert [site.layer_idx for site in sites] == list(range(model.config.num_hidden_layers))
    for site in sites:
        heads = (
            site.num_heads,
            site.num_key_value_heads,
            site.key_dim,
            site.value_dim,
            site.rotates,
        )
        assert heads == EXPECTED[family]
        assert site.hidden_size == 32
        assert model.get_submodule(site.name) is site.module
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * len(sites)
    assert [site.patchable for site in sites] == [kind == "full_attention" for kind in kinds]
    assert [bool(site.reason) for site in sites] == [not site.patchable for site in sites]


def test_looking_changes_nothing():
    model = build("llama").train()
    before = {name: (set(vars(m)), m.training) for name, m in model.named_modules()}
    config = model.config
    find_attention_sites(model)
    assert {name: (set(vars(m)), m.training) for name, m in model.named_modules()} == before
    assert model.config is config
    assert all(not m._forward_pre_hooks for m in model.modules())
