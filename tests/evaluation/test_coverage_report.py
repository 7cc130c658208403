"""The file and the table of architectures, by hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from memretrofit.errors import CheckpointError
from memretrofit.evaluation.coverage.report import broken, changes, markdown, read, report, write

SCRIPT = Path(__file__).parents[2] / "scripts" / "try_types.py"
LIVE = {"status": "live", "places": "2 of 6 layers"}
REFUSED = {"status": "unsupported", "reason": "calls attention 2 times"}
BROKEN = {"status": "broken", "reason": "pieces are 3e-01 from one pass"}
ROWS = {
    "zeta": {"seams": {"attention": LIVE, "ffn": LIVE, "sequence": BROKEN}},
    "alpha": {"seams": {"attention": REFUSED, "ffn": LIVE, "sequence": REFUSED}},
    "hung": {"fault": "took more than 120 seconds"},
}
FOUND = report(ROWS, {"transformers": "5.0"})


def test_the_status_of_a_type_is_that_of_its_attention():
    assert list(FOUND["types"]) == ["alpha", "hung", "zeta"]
    assert FOUND["types"]["zeta"]["status"] == "live"
    assert "reason" not in FOUND["types"]["zeta"]
    assert FOUND["types"]["alpha"]["status"] == "unsupported"
    assert FOUND["types"]["alpha"]["reason"] == "calls attention 2 times"
    assert FOUND["counts"]["ffn"] == {"live": 2, "unsupported": 0, "broken": 1}


def test_there_is_no_third_class():
    faults = broken(FOUND["types"])
    assert faults["zeta, segments"] == BROKEN["reason"]
    assert {name for name in faults if name.startswith("hung")} == {
        "hung, attention",
        "hung, FFN",
        "hung, segments",
    }
    assert len(faults) == 4


def test_what_changed_is_said_by_seam():
    after = report(
        {
            "alpha": {"seams": {"attention": LIVE, "ffn": REFUSED, "sequence": REFUSED}},
            "beta": {"seams": {"attention": LIVE, "ffn": LIVE, "sequence": LIVE}},
        },
        {"transformers": "6.0"},
    )
    found = changes(FOUND, after, whole=True)
    assert found["lost"] == ["alpha, FFN: live -> unsupported calls attention 2 times"]
    assert found["won"] == ["alpha, attention: unsupported -> live"]
    assert found["new"] == ["beta: live"]
    assert found["gone"] == ["hung: was broken", "zeta: was live"]
    assert "gone" not in changes(FOUND, after, whole=False)
    assert changes(FOUND, FOUND, whole=True) == {}


def test_the_table_has_every_type_and_each_reason_once():
    text = markdown(FOUND)
    assert "| zeta | live, 2 of 6 layers | live, 2 of 6 layers | broken |" in text
    assert "Of the 3 types" in text
    assert text.count("| calls attention 2 times |") == 2  # at two sites
    assert "| attention | hung | took more than 120 seconds |" in text


def test_the_file_is_read_back(tmp_path):
    path = tmp_path / "coverage.json"
    assert read(path) is None
    write(path, FOUND)
    assert read(path) == FOUND
    assert path.with_suffix(".md").read_text() == markdown(FOUND)
    for text in ("{", "[]", '{"schema_version": 99}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"coverage\.json"):
            read(path)


def test_a_run_fails_on_what_is_broken_and_on_what_was_lost(capsys):
    spec = importlib.util.spec_from_file_location("try_types_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.told(FOUND, None, whole=True) == 1
    assert "broken: zeta, segments: pieces are" in capsys.readouterr().out
    good = report({"alpha": ROWS["alpha"]}, {"transformers": "5.0"})
    assert script.told(good, None, whole=True) == 0
    worse = report(
        {"alpha": {"seams": dict.fromkeys(ROWS["alpha"]["seams"], REFUSED)}},
        {"transformers": "6.0"},
    )
    assert script.told(worse, good, whole=True) == 1
    assert "lost: alpha, FFN: live -> unsupported" in capsys.readouterr().out
