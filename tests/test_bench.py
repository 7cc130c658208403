"""The bench on tiny models: what it reports, and that its arms are what they are named."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from memretrofit.errors import ConfigError, MemretrofitError
from memretrofit.evaluation import bench_room
from memretrofit.evaluation.bench import (
    Timing,
    advance,
    bench_rules,
    fill_cache,
    make_arms,
    random_ids,
    take_turns,
)
from memretrofit.evaluation.cost import cache_bytes, prefill
from memretrofit.ops import chunk_gated_delta

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench.py"
WINDOW, SINKS = 16, 2


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_script"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bench_script"]


def base(kind: type[PreTrainedConfig] = LlamaConfig, **special) -> PreTrainedModel:
    config = kind(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=4096,
        **special,
    )
    return AutoModelForCausalLM.from_config(config).eval()


def arms_and_models(model: PreTrainedModel, sinks: int = SINKS):
    arms, skipped = make_arms(model.config, WINDOW, sinks)
    return arms, {name: arm.share(model) for name, arm in arms.items()}, skipped


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def test_the_whole_bench_on_a_tiny_model(script, tmp_path, capsys):
    base().save_pretrained(tmp_path / "base")
    script.main(
        json_file=tmp_path / "bench.json",
        base=str(tmp_path / "base"),
        lengths="32,0.0625k",
        decode_contexts="8,1k",
        rule_lengths="70",
        recall_contexts="1k",
        disk_tokens="0.5k",
        bank_rows="2k",
        bank_contexts="32",
        segment_lengths="128,64",
        segment=16,
        full_most="64",
        window=WINDOW,
        sinks=SINKS,
        repeats=1,
        quick=False,
    )
    report = json.loads((tmp_path / "bench.json").read_text())
    names = ["full", "window_sinks", "ahn"]
    assert report["arms"] == names
    assert list(report["skipped"]) == ["sliding_window", "full over 128 tokens"]
    assert [(r["arm"], r["tokens"]) for r in report["prefill"]] == [
        (name, tokens) for tokens in (32, 64) for name in names
    ]
    assert [(r["arm"], r["context"]) for r in report["decode"]] == [
        (name, context) for context in (8, 1024) for name in names
    ]
    assert {(r["phase"], r["arm"]) for r in report["overhead"]} == {
        (phase, name) for phase in ("decode", "prefill") for name in names[1:]
    }
    forms = {(r["rule"], r["form"]) for r in report["rules"]}
    assert ("gated_delta", "transformers") in forms
    assert len(forms) == 7
    assert {r["rows"] for r in report["lookup"]} == {2048}
    assert {r["file_bytes"] >> 30 for r in report["large_bank"]} == {32}
    assert {r["arm"] for r in report["bank_decode"]} == {"full", "hierarchical_ffn", "engram"}
    for section in ("prefill", "decode", "overhead", "recall", "selection", "rules", "lookup"):
        for row in report[section]:
            numbers = [
                v
                for k, v in row.items()
                if isinstance(v, (int, float)) and k not in ("peak_bytes", "hit_rate")
            ]
            assert all(value > 0 for value in numbers), row
    segments = {(r["arm"], r["tokens"]): r for r in report["segments"]}
    read = [("full", 64), ("ahn", 64), ("armt", 64), ("ahn", 128), ("armt", 128)]
    assert list(segments) == read
    assert [row["this_over_armt"] for row in segments.values() if row["arm"] == "armt"] == [1, 1]
    assert [segments[place]["over_shortest"] for place in read[:3]] == [1, 1, 1]
    assert segments["ahn", 128]["full_over_this"] is None  # there is no full attention to compare
    assert segments["armt", 64]["cache_bytes"] == segments["armt", 128]["cache_bytes"]
    own = [r for r in report["prefill"] + report["decode"] if r["arm"] == "full"]
    assert all(r["full_over_this"] == 1 for r in own)
    printed = capsys.readouterr().out
    sections = ("prefill", "segments", "decode", "overhead", "rules")
    assert all(f"{section}:" in printed for section in sections)
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


def test_cache_bytes_grow_for_full_attention_only():
    arms, models, _ = arms_and_models(base())
    for name, model in models.items():
        short, long = (cache_bytes(fill_cache(model, arms[name], n)) for n in (100, 1000))
        assert long == (10 * short if name == "full" else short)


def test_inside_the_window_all_arms_are_the_base_model():
    model = base()
    _, models, _ = arms_and_models(model)
    ids = random_ids(model, WINDOW + SINKS)
    expected = logits(model, ids)
    assert all(torch.equal(logits(arm, ids), expected) for arm in models.values())
    beyond = random_ids(model, 4 * WINDOW)
    assert torch.equal(logits(models["full"], beyond), logits(model, beyond))
    assert not torch.allclose(logits(models["ahn"], beyond), logits(model, beyond), atol=1e-3)


def test_a_models_own_window_is_an_arm_and_full_attention_loses_it():
    """The two sliding windows agree, without sinks; a window of one more would not."""
    model = base(MistralConfig, sliding_window=7)
    _, models, skipped = arms_and_models(model, sinks=0)
    assert skipped == {}
    assert list(models) == ["full", "sliding_window", "window_sinks", "ahn"]
    ids = random_ids(model, 4 * WINDOW)
    ours, theirs = logits(models["window_sinks"], ids), logits(models["sliding_window"], ids)
    assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)
    models["full"].config.sliding_window = WINDOW + 1
    assert not torch.allclose(ours, logits(models["full"], ids), atol=1e-5, rtol=0)
    assert model.config.sliding_window == 7


def test_arms_share_the_weights():
    model = base()
    _, models, _ = arms_and_models(model)
    for arm in models.values():
        assert arm.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@torch.no_grad()
@pytest.mark.parametrize("name", ["window_sinks", "ahn"])
def test_an_advanced_cache_is_the_shape_of_one_that_read_everything(name):
    """The same columns, counters and bytes, so a decoding step does the same work."""
    arms, models, _ = arms_and_models(base())
    model, tokens = models[name], 500
    read, _ = prefill(model, random_ids(model, tokens), chunk_size=None)
    filled = fill_cache(model, arms[name], tokens)
    for _ in range(3):
        for mine, theirs in zip(filled.layers, read.layers, strict=True):
            counters = ("seen", "folded", "first", "pinned")
            assert [getattr(mine, c) for c in counters] == [getattr(theirs, c) for c in counters]
            assert mine.keys.shape == theirs.keys.shape
            assert mine.nbytes() == theirs.nbytes()
        for cache in (read, filled):
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)


@torch.no_grad()
def test_advancing_moves_positions_and_keeps_what_is_seen():
    """With rotary positions only differences matter inside the window; sinks move further away."""
    arms, models, _ = arms_and_models(base(), sinks=0)
    model, token = models["window_sinks"], torch.zeros(1, 1, dtype=torch.long)
    here, there = (fill_cache(model, arms["window_sinks"], 2 * WINDOW) for _ in range(2))
    advance(there, 0)
    a, b = (model(token, past_key_values=cache).logits for cache in (here, there))
    assert torch.equal(a, b)
    advance(there, 100)
    a, b = (model(token, past_key_values=cache).logits for cache in (here, there))
    assert there.get_seq_length() == here.get_seq_length() + 100
    assert not torch.allclose(a, b, atol=1e-4)  # new keys stand 100 positions from the old ones


def test_transformers_own_rule_is_called_as_ours(script):
    q, k, v = (torch.randn(1, 3, 70, 8) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    g, beta = -torch.rand(1, 3, 70), torch.rand(1, 3, 70)
    ours, theirs = chunk_gated_delta(q, k, v, g, beta), script.transformers_rule(q, k, v, g, beta)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-5, rtol=0)
    undecayed = chunk_gated_delta(q, k, v, None, beta)
    assert not torch.allclose(undecayed[0], theirs[0], atol=1e-5, rtol=0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are reset on Linux")
def test_a_peak_starts_anew():
    """What the process needed earlier is not counted; what was freed before the end is."""
    need = 2**28  # bytes, far above what an allocator keeps for itself
    start = bench_room.reset_peak()
    torch.ones(need // 4)
    assert bench_room.peak_bytes() - start > 0.9 * need  # the kernel counts in batches
    start = bench_room.reset_peak()
    assert bench_room.peak_bytes() - start < need // 4


def test_rules_are_reported_per_length_and_form():
    rows = bench_rules([3, 5], 1)
    assert [(r["rule"], r["form"], r["tokens"]) for r in rows] == [
        (rule, form, tokens)
        for tokens in (3, 5)
        for rule in ("gated_delta", "delta", "ssd")
        for form in ("chunk", "recurrent")
    ]


def test_arms_take_turns_and_each_is_first_once():
    calls: list[str] = []
    times = take_turns({name: lambda n=name: calls.append(n) for name in "abc"}, 3, warmup=0)
    assert "".join(calls) == "abcbcacab"
    assert all(len(timing.wall) == len(timing.cpu) == 3 for timing in times.values())


def test_a_ratio_is_taken_within_its_round():
    """A slow round counts once: the ratio of medians would be 2 here."""
    mine, theirs = Timing([1.0, 20.0, 4.0], [0.0] * 3), Timing([1.0, 20.0, 2.0], [0.0] * 3)
    assert mine.over(theirs) == 1.0
    assert mine.ms() == 4000.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512", [512]), ("0.5k, 2K", [512, 2048]), ("64k", [65536]), ("1M", [1 << 20]), ("none", [])],
)
def test_lengths_count_in_units_of_1024(script, text, expected):
    assert script._lengths(text) == expected


@pytest.mark.parametrize("text", ["", "8k,", "-1", "0", "0.3k", "many"])
def test_a_bad_length_is_named(script, text):
    with pytest.raises(ConfigError, match="length"):
        script._lengths(text)


def test_an_error_of_ours_is_a_message_and_status_2(script, tmp_path, capsys):
    with pytest.raises(script.typer.Exit) as stopped:
        script.main(base=str(tmp_path / "none"), json_file=None)
    assert stopped.value.exit_code == 2
    assert issubclass(ConfigError, MemretrofitError)
    assert str(tmp_path / "none") in capsys.readouterr().err.replace("\n", "")
