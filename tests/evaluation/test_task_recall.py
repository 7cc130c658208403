"""Facts in the first half, what says nothing around them, and who can answer."""

import random
import re

import pytest
from task_checks import (
    check_blind,
    check_form,
    check_key_blind,
    check_oracle,
    check_size,
    golden,
    items_of,
)

from memretrofit.data.recall import HELD_OUT, NAMES, OBJECTS, draw_facts, is_held_out
from memretrofit.errors import ConfigError
from memretrofit.evaluation.tasks.recall import RECALL_1, RECALL_4, RECALL_16

every = pytest.mark.parametrize("task", [RECALL_1, RECALL_4, RECALL_16], ids=lambda x: x.name)


def recalled(prompt):
    context, _, question = prompt.rpartition(" Everyone knows that ")
    return re.findall(rf"{question} (\w+)\.", context)


def pairs(context):
    """Numbers of name and object of every fact that is told."""
    told = re.findall(r"(\w+) likes (\w+)\.", context)
    return [(NAMES.index(name), OBJECTS.index(thing)) for name, thing in told]


@every
def test_the_fact_tells(task):
    check_oracle(task, recalled, [120, 500, 2000], 20)


@every
def test_blind_guessers_are_at_chance(task):
    # 24 objects: the most frequent of 600 answers is some 40 of them, 7 %.
    check_blind(task, 150, strict_below=0.09)


@pytest.mark.parametrize("task", [RECALL_4, RECALL_16], ids=lambda x: x.name)
def test_to_know_what_was_said_is_not_enough(task):
    check_key_blind(task, 150)


@every
def test_sizes(task):
    check_size(task, [120, 700])


@every
def test_form(task):
    check_form(task, [120, 512])


@every
def test_facts_stand_in_the_first_half_and_their_number_stays(task):
    """So that from two segments on the last one holds none of them. They do reach the middle."""
    reached = []
    for item in items_of(task, [120, 2000], 20):
        sentences = re.findall(r"[^.]+\.", item.draft.context)
        told = [number for number, text in enumerate(sentences) if " likes " in text]
        assert len(told) == task.facts
        filler = len(sentences) - task.facts
        before = told[-1] - (task.facts - 1)
        assert before <= (filler + 1) / 2
        reached.append(before / filler)
    assert max(reached) > 0.4


def test_what_is_asked_was_never_trained_on():
    """And everything else that is told was, as in training."""
    for item in items_of(RECALL_16, [150], 50):
        asked = NAMES.index(item.draft.question.split()[3])
        for name, thing in pairs(item.draft.context):
            assert is_held_out(name, thing) == (name == asked)
    for seed in range(50):
        facts = draw_facts(16, random.Random(seed), held_out=False)
        assert not any(is_held_out(fact.name, fact.thing) for fact in facts)
        assert len({fact.name for fact in facts}) == len({fact.thing for fact in facts}) == 16
    for name in range(len(NAMES)):
        kept = [is_held_out(name, thing) for thing in range(len(OBJECTS))]
        assert sum(kept) == len(OBJECTS) // HELD_OUT


def test_as_many_facts_as_there_are_objects():
    assert len(draw_facts(len(OBJECTS), random.Random(0), held_out=True)) == len(OBJECTS)
    for number in (0, len(OBJECTS) + 1):
        with pytest.raises(ConfigError, match=f"from 1 to {len(OBJECTS)} have an object"):
            draw_facts(number, random.Random(0), held_out=True)


def test_golden():
    assert golden(RECALL_4, 150, 2) == ["171d0526638d72b3-2cee9afd", "2cf0e61ce2050db4-309dd834"]
