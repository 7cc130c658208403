"""I1, I2: the base model inside the window; the base model with a sinks + window mask past it."""

from __future__ import annotations

import pytest
import torch
from contract.arms import (
    ARMS,
    EXACT,
    HAVE_PARAMETERS,
    LIVE,
    OFF_DEVICE,
    REFUSED,
    SINKS,
    WINDOW,
    every_live,
    identity,
    patched,
)
from contract.families import FAMILIES, build, tokens
from contract.runs import apart, explicit_window, in_pieces, one_pass
from tolerances import REORDERED, WRONG

from memretrofit.errors import UnsupportedModelError
from memretrofit.methods import get_method
from memretrofit.patching.cache import MemoryLayer
from memretrofit.retrofit import patch

CLAIM = [(family, arm) for family, arm in LIVE if identity(arm) == "window"]


def test_every_family_is_served_by_every_method_but_these():
    """MLA rotates 4 of a key's 12 dims, so nothing that needs unrotated keys can serve it.
    Nothing else is refused."""
    assert {family for family, _ in REFUSED} == {"deepseek_v3"}
    assert {arm for _, arm in LIVE} == set(ARMS)
    assert {family for family, _ in LIVE} == set(FAMILIES)
    for family, arm in REFUSED:
        model = build(family)
        before = model.state_dict().keys()
        with pytest.raises(UnsupportedModelError, match="DeepseekV3ForCausalLM"):
            patch(model, ARMS[arm])
        assert model.state_dict().keys() == before


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@every_live
def test_nothing_changes_until_something_leaves(family, arm, implementation):
    """I1, with a memory that would speak if it could; the first token past the border must
    change the logits."""
    base = build(family, implementation=implementation)
    model = patched(family, arm, implementation=implementation)
    for length in (1, EXACT - 1, EXACT):
        ids = tokens(2, length)
        expected = one_pass(base, ids)
        assert torch.equal(one_pass(model, ids), expected)
        stepped, cache = in_pieces(model, ids, range(1, length))
        stepped_base, _ = in_pieces(base, ids, range(1, length))
        assert torch.equal(stepped, stepped_base)
        assert any(isinstance(layer, MemoryLayer) for layer in cache.layers)
    # a memory may keep the first token that leaves exact, and choose among many
    length = 3 * EXACT if get_method(ARMS[arm].method).family == "recall" else EXACT + 1
    ids = tokens(2, length)
    found, expected = one_pass(model, ids), one_pass(base, ids)
    assert apart(found[:, -1], expected[:, -1]) > WRONG
    assert apart(found[:, :EXACT], expected[:, :EXACT]) < REORDERED


@pytest.mark.parametrize("rows", [1, 3])
@every_live
def test_padding_does_not_count_as_something_that_left(family, arm, rows):
    """As above with left padding: the base model's own mask is rebuilt bit for bit."""
    base, model = build(family), patched(family, arm)
    ids, mask = tokens(rows, EXACT), torch.ones(rows, EXACT, dtype=torch.long)
    mask[0, :4] = 0
    expected = one_pass(base, ids, attention_mask=mask)
    assert torch.equal(one_pass(model, ids, attention_mask=mask), expected)


@every_live
def test_generation_inside_the_window_is_the_base_models(family, arm):
    ids = tokens(2, 5)
    expected = build(family).generate(ids, max_new_tokens=EXACT - 5, do_sample=False)
    found = patched(family, arm).generate(ids, max_new_tokens=EXACT - 5, do_sample=False)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("family", "arm"), CLAIM, ids=["-".join(x) for x in CLAIM])
def test_a_fresh_patch_is_the_base_model_with_sinks_and_window(family, arm, implementation):
    """I2. Witnesses: a window and sinks that are off by one, either way."""
    base = build(family, implementation=implementation)
    model = patched(family, arm, live=False, implementation=implementation)
    ids = tokens(2, 37)
    found = one_pass(model, ids)
    assert apart(found, explicit_window(base, ids, WINDOW, SINKS)) < REORDERED
    for window, sinks in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        assert apart(found, explicit_window(base, ids, WINDOW + window, SINKS + sinks)) > WRONG


@pytest.mark.parametrize("arm", [arm for arm in ARMS if identity(arm) == "window"])
def test_blocks_of_queries_leave_no_seam(arm):
    """200 tokens are two blocks of queries; the second begins with a window that reaches into
    the first."""
    model, ids = patched("llama", arm, live=False), tokens(1, 200)
    assert (
        apart(one_pass(model, ids), explicit_window(build("llama"), ids, WINDOW, SINKS)) < REORDERED
    )


@pytest.mark.parametrize("arm", [a for a in ARMS if a not in {*OFF_DEVICE} & {*HAVE_PARAMETERS}])
def test_training_mode_does_not_change_the_logits(arm):
    """With gradients the memory takes part in every step, also inside the window: the same
    values, another path."""
    model = patched("llama", arm)
    for length in (EXACT, 30):
        ids = tokens(2, length)
        assert apart(model(ids, use_cache=False).logits.detach(), one_pass(model, ids)) < REORDERED
