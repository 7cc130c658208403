"""Scores along the length: the table's numbers, what is drawn, and for which runs."""

from __future__ import annotations

import pytest
from task_run_cases import size, tables, write_run

from memretrofit.errors import ConfigError
from memretrofit.evaluation.runs.comparison import write_comparison
from memretrofit.evaluation.runs.curves import curve_tables, draw_curves, plot_by_length
from memretrofit.evaluation.runs.report import write_report
from memretrofit.evaluation.runs.saved import read_run

LENGTHS = (256, 512, 1024, 4096)
SETTINGS = {"segment_length": 100, "trained_tokens": 600, "rank_by_presence": []}
KNOWN = {256: 10, 512: 9, 1024: 8, 4096: 3}
"""Length -> items of ten that the trained memory knows."""


def knows(task, length, number, arm, score):
    return float(number < {"trained": KNOWN[length], "full": 10}.get(arm, 2))


def write(folder, **changes):
    options = {
        "arms": ("full", "trained", "zeroed"),
        "tasks": {"recall": 0.25},
        "lengths": LENGTHS,
        "number": 10,
        "value": knows,
        "settings": SETTINGS,
    }
    return write_run(folder, **options | changes)


def test_the_table_counts_segments_and_what_is_lost_since_the_trained_length(tmp_path):
    """600 tokens were trained on: what is lost counts from 512, the longest below."""
    report = write_report(write(tmp_path)).read_text()
    rows = tables(report)["Along the length, by rank"]
    found = [
        (row["length"], row["segments"], row["of trained length"], row["lost since trained length"])
        for row in rows
    ]
    assert found == [
        ("256", "3", "0.427", "–"),
        ("512", "6", "0.853", "–"),
        ("1k", "11", "1.71", "+0.10"),
        ("4k", "41", "6.83", "+0.60"),
    ]
    assert [row["trained"][:4] for row in rows] == ["1.00", "0.90", "0.80", "0.30"]
    # Wilson's interval of 3 right of 10
    assert rows[-1]["trained"] == "0.30 (0.11 to 0.60)"
    for name in ("length_recall_rank.png", "length_recall_strict.png"):
        assert f"]({name})" in report
        assert min(size(tmp_path / name)) > 300


def test_only_what_reads_in_segments_at_several_lengths_has_curves(tmp_path):
    without = read_run(write(tmp_path / "a", settings={"rank_by_presence": []}))
    alone = read_run(write(tmp_path / "b", lengths=(512,)))
    for run in (without, alone):
        assert curve_tables(run) == []
        assert draw_curves(run) == {}


def test_no_trained_length_no_multiples(tmp_path):
    settings = SETTINGS | {"trained_tokens": None}
    (table, _) = curve_tables(read_run(write(tmp_path, settings=settings)))
    assert table.columns == ["task", "length", "segments", "full", "trained", "zeroed"]
    # a memory that was trained on longer texts alone has lost nothing yet
    settings = SETTINGS | {"trained_tokens": 128}
    (table, _) = curve_tables(read_run(write(tmp_path / "long", settings=settings)))
    assert {row[table.columns.index("lost since trained length")] for row in table.rows} == {"–"}


def test_a_comparison_has_the_curve_of_every_run(tmp_path):
    first, second = write(tmp_path / "first"), write(tmp_path / "second")
    text = write_comparison([first, second], tmp_path / "both").read_text()
    assert "](length_recall_rank.png)" in text
    assert (tmp_path / "both" / "length_recall_strict.png").is_file()
    plain = [write(tmp_path / name, settings={"rank_by_presence": []}) for name in "xy"]
    write_comparison(plain, tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("length_*"))


def test_an_arm_may_end_before_the_others(tmp_path):
    value = (0.5, 0.4, 0.6)
    lines = {"full": {128: value}, "trained": dict.fromkeys((128, 4096), value), "zeroed": {}}
    plot_by_length(lines, tmp_path / "a.png", label="score", marks={"here": 128, "far": 9999})
    assert min(size(tmp_path / "a.png")) > 300
    with pytest.raises(ConfigError, match="no scores by length"):
        plot_by_length({"full": {}}, tmp_path / "b.png", label="score")
