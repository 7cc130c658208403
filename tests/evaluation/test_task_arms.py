"""Each arm of a task run is what its name says; arms that share an object are the same."""

from __future__ import annotations

import pytest
import torch
from contract.arms import ARMS, SINKS, WINDOW, every_arm, identity, patched, window_alone
from contract.families import build
from reading_cases import letters, text
from tolerances import REORDERED, WRONG

from memretrofit import (
    InfLLMConfig,
    KNNMemoryConfig,
    StreamingLLMConfig,
    WindowSinksConfig,
    patch,
    unpatch,
)
from memretrofit.config import MethodConfig
from memretrofit.errors import ConfigError
from memretrofit.evaluation.arms import fresh_values
from memretrofit.evaluation.reader import Reading, read, read_prompts
from memretrofit.evaluation.runs.arms import (
    TASK_ARMS,
    _active_parameters,
    answerers_of,
    kept_exactly,
    memory_state,
    same_computations,
)
from memretrofit.modules.positions import POSITIONS as POLICIES
from memretrofit.patching.controls import (
    memory_silenced,
    state_carried,
    state_shuffled,
    writes_disabled,
)
from memretrofit.retrofit import memory_parameters

POSITIONS = 256
"""Of the tiny models."""
READINGS = [
    Reading(prompt=text(length, seed), candidates=(text(5, 9), text(3, 8)), max_new_tokens=4)
    for length, seed in ((40, 1), (31, 2), (36, 3))
]


def answers(model):
    return read(model, letters(), READINGS)


def apart(a, b) -> float:
    """The largest difference of two lists of outcomes."""
    pairs = zip(a, b, strict=True)
    return max(
        abs(x - y)
        for one, other in pairs
        for x, y in zip(one.log_likelihoods, other.log_likelihoods, strict=True)
    )


def windowed(family="llama"):
    config = WindowSinksConfig(sliding_window=WINDOW, num_sink_tokens=SINKS)
    return patch(build(family), config)


def with_adapter(model):
    from peft import LoraConfig

    from memretrofit.hub.adapter import add_adapter

    adapted = add_adapter(model, LoraConfig(target_modules=["v_proj"], r=2)).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return adapted


def test_a_patched_model_has_every_arm_in_order():
    assert list(answerers_of(patched("llama", "ahn"), letters())) == list(TASK_ARMS)


@pytest.mark.parametrize("arm", ["ahn", "lolcats"])
def test_each_arm_is_what_its_name_says(arm):
    model = patched("llama", arm)
    found = answerers_of(model, letters(), chunk_size=16)
    assert apart(found["full"](READINGS), answers(build("llama"))) < REORDERED
    assert apart(found["window"](READINGS), answers(windowed())) < REORDERED
    trained = found["trained"](READINGS)
    assert apart(trained, answers(model)) < 5 * REORDERED
    with writes_disabled(model):
        assert apart(found["no_write"](READINGS), answers(model)) < 5 * REORDERED
    with state_shuffled(model):
        assert apart(found["shuffled"](READINGS), answers(model)) < 5 * REORDERED
    for name in ("full", "window", "no_write", "shuffled", "stale"):
        assert apart(found[name](READINGS), trained) > WRONG, name
    assert found["trained"](READINGS) == trained  # every switch is off again


def test_stale_begins_with_what_the_next_row_left():
    """Row b alone, after row b + 1 alone: the same as in the batch. Witness: after row b - 1."""
    model = patched("llama", "ahn")
    batch = answerers_of(model, letters())["stale"](READINGS)

    def after(row: int, other: int):
        left = read_prompts(model, letters(), [READINGS[other].prompt])
        with state_carried(model, left.cache):
            return read(model, letters(), [READINGS[row]])

    for row in range(3):
        assert apart([batch[row]], after(row, (row + 1) % 3)) < 5 * REORDERED
        assert apart([batch[row]], after(row, (row + 2) % 3)) > WRONG


@every_arm
def test_arms_that_share_an_object_are_the_same_computation(arm):
    """What is claimed is checked against the arm's own switch or own memory."""
    model = patched("llama", arm)
    same = same_computations(answerers_of(model, letters()))
    memory = ARMS[arm].method not in ("window_sinks", "streaming_llm")
    if not memory:  # no state: every control is the model itself
        others = ("untrained", "trained", "zeroed", "no_write", "shuffled", "stale")
        assert same == dict.fromkeys(others, "window")
        expected = answers(model)
        for switch in (writes_disabled, state_shuffled):
            with switch(model):
                assert answers(model) == expected
        return
    assert same["zeroed"] == "window"
    assert ("untrained" in same) == (identity(arm) == "window")
    assert same.keys() <= {"zeroed", "untrained"}
    near, fresh = answers(window_alone("llama", arm)), answers(patched("llama", arm, live=False))
    with memory_silenced(model):
        assert apart(near, answers(model)) < 5 * REORDERED
    if identity(arm) == "window":
        assert apart(near, fresh) < 5 * REORDERED
        assert [x.text for x in near] == [x.text for x in fresh]
    assert apart(answers(model), near) > WRONG  # witness: the memory is not silent


def test_a_fresh_memory_that_speaks_is_an_arm_of_its_own(monkeypatch):
    model = patched("llama", "lolcats")
    monkeypatch.setattr("memretrofit.methods.lolcats.IDENTITY", "none")
    found = answerers_of(model, letters(), seed=3)
    assert "untrained" not in same_computations(found)
    values = {name: p.data.clone() for name, p in memory_parameters(model).items()}
    outcomes = found["untrained"](READINGS)
    assert all(torch.equal(p.data, values[n]) for n, p in memory_parameters(model).items())
    with torch.no_grad():
        for name, value in fresh_values(model, 3).items():
            memory_parameters(model)[name].copy_(value)
    assert answers(model) == outcomes


def test_an_adapter_is_no_part_of_the_base_models_arms():
    adapted = with_adapter(patched("llama", "ahn"))
    found = answerers_of(adapted, letters())
    assert same_computations(found) == {"untrained": "window"}
    assert apart(found["full"](READINGS), answers(build("llama"))) < REORDERED
    assert apart(found["window"](READINGS), answers(windowed())) < REORDERED
    zeroed = found["zeroed"](READINGS)
    assert apart(zeroed, answers(with_adapter_like(adapted, windowed()))) < REORDERED
    assert apart(zeroed, found["window"](READINGS)) > WRONG
    costs = {name: arm.cost(Reading(prompt="abc")) for name, arm in found.items()}
    memory = sum(p.numel() for p in memory_parameters(adapted).values())
    lora = 2 * (2 * 32 + 2 * 16)  # two layers, rank 2, 32 -> 2 heads of 8
    base = sum(p.numel() for p in build("llama").parameters())
    assert costs["full"]["trained_parameters"] == costs["window"]["trained_parameters"] == 0
    assert costs["trained"]["trained_parameters"] == memory + lora
    assert costs["zeroed"]["trained_parameters"] == lora
    assert costs["trained"]["active_parameters"] == base + memory + lora
    assert costs["window"]["active_parameters"] == base


def with_adapter_like(adapted, model):
    """The other model with the same adapter."""
    twin = with_adapter(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora" in name:
                parameter.copy_(adapted.get_parameter(name))
    return twin


def test_a_model_without_memory_keeps_its_modules():
    model = build("llama")
    before = {name: id(module) for name, module in model.named_modules()}
    found = answerers_of(model, letters(), window=WINDOW)
    assert list(found) == ["full", "window", "bm25", "oprm"]
    expected = patch(build("llama"), WindowSinksConfig(sliding_window=WINDOW))
    assert found["window"](READINGS) == answers(expected)
    assert found["full"](READINGS) == answers(unpatch(expected))
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert list(answerers_of(model, letters())) == ["full", "bm25", "oprm"]
    parameters = sum(p.numel() for p in model.parameters())
    costs = [found[name].cost(Reading(prompt=text(100, 1))) for name in ("full", "window")]
    assert [cost["active_parameters"] for cost in costs] == [parameters] * 2
    assert costs[1]["cache_bytes"] < costs[0]["cache_bytes"]


def test_cost_of_a_bounded_cache_does_not_grow():
    found = answerers_of(patched("llama", "ahn"), letters(), arms=["trained", "full"])
    assert list(found) == ["full", "trained"]
    short, long = (
        {n: a.cost(Reading(prompt=text(t, 1))) for n, a in found.items()} for t in (100, 200)
    )
    assert long["trained"]["cache_bytes"] == short["trained"]["cache_bytes"]
    # two layers, keys and values, 2 heads of 8 numbers of 4 bytes
    assert long["full"]["cache_bytes"] == 200 * 2 * 2 * 16 * 4
    assert long["trained"]["ms_per_token"] > 0


def test_a_text_baseline_costs_what_it_reads():
    """Its reader's cost for the longest text that it reads at once."""
    model = patched("llama", "ahn")
    found = answerers_of(model, letters())
    words = "".join(f"{word} lies there. " for word in ("Stone", "Wood", "Clay", "Sand") * 3)
    reading = Reading(prompt=f"{words}Where is wood?", context=(0, len(words)))
    costs = {name: found[name].cost(reading) for name in ("full", "bm25", "oprm")}
    assert costs["full"]["tokens"] == len(reading.prompt)
    for name in ("bm25", "oprm"):
        (longest, *_) = sorted(
            (part.prompt for part in found[name].parts(reading)), key=len, reverse=True
        )
        assert costs[name]["tokens"] == len(longest) < len(reading.prompt)
        # two layers, keys and values, 2 heads of 8 numbers of 4 bytes
        assert costs[name]["cache_bytes"] == len(longest) * 2 * 2 * 16 * 4
        assert costs[name]["active_parameters"] == costs["full"]["active_parameters"]
    assert costs["bm25"]["tokens"] <= WINDOW + SINKS + len("Where is wood?")


@every_arm
def test_a_fresh_memory_is_called_untrained(arm):
    """Whatever was drawn at random. One value that moved makes it trained."""
    for seed in (0, 1):
        model = build("llama")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            patch(model, ARMS[arm])
        own = memory_parameters(model)
        assert memory_state(model) == ("untrained" if own else "none")
    assert memory_state(build("llama")) == "none"
    for name, parameter in own.items():
        values = fresh_values(model, 5)[name], fresh_values(model, 6)[name]
        if torch.equal(*values):  # what is drawn at random tells nothing
            kept = parameter.data.clone()
            parameter.data.flatten()[0].add_(1e-4)
            assert memory_state(model) == "trained", name
            parameter.data.copy_(kept)
    found = answerers_of(model, letters(), arms=["trained"])["trained"]
    assert found.cost(Reading(prompt="abc"))["trained_parameters"] == 0
    assert memory_state(patched("llama", arm)) == ("trained" if own else "none")


def test_what_is_kept_exactly():
    assert kept_exactly(patched("llama", "ahn")) == WINDOW + SINKS
    assert kept_exactly(build("llama"), 20) == 20 + WindowSinksConfig().num_sink_tokens
    assert kept_exactly(build("llama")) is None


def test_routed_experts_count_by_the_share_that_a_token_meets():
    """Mixtral, 2 layers of 4 experts, 2 for a token: three matrices of 32 x 48 each."""
    model = build("mixtral")
    every = sum(p.numel() for p in model.parameters())
    assert _active_parameters(model) == every - 2 * 2 * 3 * 32 * 48


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda: build("llama"), {"arms": ["trianed"]}, "did you mean 'trained'"),
        (lambda: build("llama"), {"arms": ["stale"]}, "needs a patched model"),
        (lambda: build("llama"), {"arms": ["window"]}, "needs --window N"),
        (lambda: build("llama"), {"window": 4096}, "not smaller than the 256 positions"),
        (lambda: patched("llama", "ahn"), {"window": 8}, "window of its method"),
    ],
)
def test_arms_that_cannot_be_are_refused(make, options, words):
    with pytest.raises(ConfigError, match=words):
        answerers_of(make(), letters(), **options)


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (WindowSinksConfig(sliding_window=16), POSITIONS),
        (StreamingLLMConfig(sliding_window=16), None),
        (InfLLMConfig(sliding_window=16, positions="absolute"), POSITIONS),
        (InfLLMConfig(sliding_window=16, positions="clamp"), None),
        (InfLLMConfig(sliding_window=16, positions="reindexed"), None),
        (
            InfLLMConfig(sliding_window=16, positions="grouped", position_group=4),
            4 * (POSITIONS - 16 + 4),
        ),
        (InfLLMConfig(sliding_window=16, layers_to_transform=(0,)), POSITIONS),
        (KNNMemoryConfig(sliding_window=16, positions="clamp"), POSITIONS),
    ],
    ids=lambda x: "" if not isinstance(x, MethodConfig) else f"{x.method}",
)
def test_how_far_an_arm_reads_is_how_far_its_distances_reach(config, most):
    """`full` never reads beyond the positions; an arm of the memory as far as its own distances
    stay within them, in every layer."""
    model = patch(build("llama"), config)
    arms = answerers_of(model, letters(), arms=["full", "window", "trained"])
    assert arms["full"].positions == POSITIONS
    assert arms["trained"].positions == arms["window"].positions == most


def test_grouped_positions_reach_exactly_so_far():
    """The distance of the last query to the first far key is the last that was trained."""
    policy, window, group = POLICIES["grouped"], torch.tensor([16]), 4
    most = policy.longest(POSITIONS, 16, group)
    last, beyond = (policy.query(torch.tensor([t]), window, group).item() for t in (most - 1, most))
    assert (last, beyond) == (POSITIONS - 1, POSITIONS)
