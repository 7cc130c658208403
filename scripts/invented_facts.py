"""Lessons that no model knows: facts about invented towns, as `memretrofit inject` reads them.

    python scripts/invented_facts.py --seed 0 --number 100 > facts.jsonl

Each has two training phrasings, in which the town comes before what is said of it, one held-out
phrasing and one held-out question.
"""

from __future__ import annotations

import argparse
import json

from memretrofit.evaluation.material.facts import Fact, facts

PHRASINGS = 2


def as_lesson(fact: Fact) -> dict[str, object]:
    """One line of a file of lessons."""
    texts = [x for x in fact.statements if x.index(fact.town) < x.index(fact.value)]
    return {
        "texts": texts[:PHRASINGS],
        "answer": fact.value,
        "held_out": [fact.held_out],
        "held_out_questions": [fact.question],
    }


def main() -> None:
    """Print the lessons."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=100)
    given = parser.parse_args()
    for fact in facts(given.seed, given.number):
        print(json.dumps(as_lesson(fact)))


if __name__ == "__main__":
    main()
