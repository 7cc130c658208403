"""A type that crashes, hangs or eats the memory is a row; a run that was stopped goes on."""

from __future__ import annotations

import json

import pytest
from coverage_work import work

from memretrofit.evaluation.coverage.runner import Progress, examined, run_each, told

KEY = {"transformers": "1", "source": "a"}


def test_a_type_that_fails_is_a_row_and_the_others_go_on():
    names = ["a", "raise", "crash", "eat", "b"]
    found = {n: x for n, *x in run_each(names, work, seconds=300, megabytes=256, preloaded=[])}
    assert found["a"] == ["A", ""]
    assert found["b"] == ["B", ""]
    assert found["raise"] == [None, "ValueError: no such layer"]
    assert found["crash"] == [None, "its process ended with code 3"]
    assert found["eat"] == [None, "took more than 256 MB"]


def test_a_type_that_hangs_is_ended():
    ((_, found, fault),) = run_each(["hang"], work, seconds=1, preloaded=[])
    assert found is None
    assert fault == "took more than 1 seconds"


def test_a_run_that_was_stopped_goes_on(tmp_path):
    path, said = tmp_path / "coverage.running", []
    first = Progress(path, KEY)
    first.add({"type": "a", "seams": {"ffn": {"status": "live"}}})
    with path.open("a") as file:
        file.write('{"type": "b", "sea')  # killed while it wrote
    rows = examined(["a", "raise"], work, Progress(path, KEY), said.append, preloaded=[])
    assert rows["a"]["seams"]["ffn"]["status"] == "live"
    assert rows["raise"]["fault"].startswith("ValueError")
    (line,) = said
    assert line.startswith("2/2 raise: broken: ValueError: no such layer")
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row.get("type") for row in kept] == [None, "a", "raise"]


@pytest.mark.parametrize("changed", ["transformers", "source"])
def test_results_of_other_code_are_dropped(tmp_path, changed):
    path = tmp_path / "coverage.running"
    Progress(path, KEY).add({"type": "a", "fault": "x"})
    assert Progress(path, KEY).found
    assert not Progress(path, KEY | {changed: "other"}).found


def test_one_row_in_words():
    assert told({"fault": "took more than 1 seconds"}) == "broken: took more than 1 seconds"
    seams = {"ffn": {"status": "live"}, "sequence": {"status": "unsupported"}}
    assert told({"seams": seams}) == "ffn live, sequence unsupported"
