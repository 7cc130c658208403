"""Two CPU processes under torchrun give the run that one process gives with twice the rows."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.tiny import SHORT_ROWS, distilled, losses, patched, rows, write_base

SCRIPT = Path(__file__).with_name("tiny.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_base(folder)
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run(
        [sys.executable, "-m", *command, "processes", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in (0, 1)]
    return [*found, folder / "run"]


@pytest.mark.parametrize("run", ["transfer", "memory", "memory+lora"])
def test_processes_end_with_the_same_parameters(results, run):
    (curve, first), (_, second) = (result[run] for result in results[:2])
    assert 0.0 in curve, "rows shorter than the window are part of this test"
    assert max(curve) > 0
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_recipe_is_logged_and_saved_once(results):
    run = results[2]
    steps = [(stage, step) for stage in ("transfer", "distill") for step in range(1, 7)]
    assert [(stage, step) for stage, step, _ in losses(run)] == steps
    assert (run / "memory.safetensors").is_file()
    assert (run / "loss.png").is_file()


def test_processes_read_rows_of_their_own(results):
    first, second = (result["transfer"][0] for result in results[:2])
    assert first != second


@pytest.mark.parametrize("mode", ["memory", "memory+lora"])
def test_two_processes_are_one_with_twice_the_rows(results, mode, tmp_path):
    found, parameters = results[0][mode]

    def alone(batch_size):
        settings = replace(SHORT_ROWS, batch_size=batch_size)
        folder = tmp_path / str(batch_size)
        _, promised, steps = distilled(patched(), settings, folder, mode=mode, data=rows(length=40))
        return [step.loss for step in steps], promised

    whole, promised = alone(4)
    assert found == pytest.approx(whole, rel=1e-4)
    for name, value in parameters.items():
        torch.testing.assert_close(value, promised[name].detach(), rtol=1e-2, atol=1e-4)
    half, _ = alone(2)
    assert half != pytest.approx(whole, rel=1e-2)
