"""Talks: a reader of lines answers all six kinds of question, and nobody else any."""

import random
import re
from datetime import date

import pytest
from task_checks import (
    check_blind,
    check_form,
    check_oracle,
    check_size,
    count,
    golden,
    items_of,
    prose,
)

from memretrofit.data.personas import (
    ATTRIBUTES,
    EVENTS,
    HABITS,
    NAMES,
    RELATIVES,
    REPLIES,
)
from memretrofit.evaluation.tasks.dialogue import (
    DIALOGUE_ABSTENTION,
    DIALOGUE_COUNT,
    DIALOGUE_FACT,
    DIALOGUE_ORDER,
    DIALOGUE_TWO_HOP,
    DIALOGUE_UPDATE,
)

LENGTHS = (240, 300, 600)
ALL = [
    DIALOGUE_FACT,
    DIALOGUE_UPDATE,
    DIALOGUE_TWO_HOP,
    DIALOGUE_ORDER,
    DIALOGUE_COUNT,
    DIALOGUE_ABSTENTION,
]
KIN = "|".join(RELATIVES)
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six"]
VALUES = {value for attribute in ATTRIBUTES for value in attribute.values}

tasks = pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)


def first(pattern, text):
    """The group of the pattern where it stands first."""
    return re.findall(pattern, text)[0]


def lines(prompt):
    """What the person said, without the small talk, in order; and the question."""
    text, question = prompt.rsplit("\n\nQuestion: ", 1)
    name = first(r"These are talks of (\w+)", text)
    said = re.findall(rf"^{name}: (.+)$", text, re.MULTILINE)
    return name, [line for line in said if not line.startswith("I have read")], question


def asked(question):
    """The attribute in question, told by the words of the question that are not names."""
    found = [a for a in ATTRIBUTES if re.match(a.question[:-1].replace("{who}", ".+"), question)]
    (attribute,) = found
    return attribute


def values_in(line, attribute):
    return [word for word in re.findall(r"\w+", line) if word in attribute.values]


def own(said, attribute):
    """Values of the attribute in the lines about the speaker, in order."""
    return [
        value
        for line in said
        if re.search(r"\b(I|My|my)\b", line) and not re.search(rf"\b[Mm]y ({KIN})", line)
        for value in values_in(line, attribute)
    ]


def solve_single(prompt):
    _, said, question = lines(prompt)
    found = own(said, asked(question))
    assert len(found) == 1
    return found


def solve_update(prompt):
    _, said, question = lines(prompt)
    found = own(said, asked(question.replace(" now?", "?")))
    assert len(found) == 3
    return found[-1:]


def solve_two_hop(prompt):
    name, said, question = lines(prompt)
    attribute = asked(question)
    (who,) = re.findall(rf"the (\w+) of {name}", question.splitlines()[0])
    (called,) = re.findall(rf"My {who} is called (\w+)\.", "\n".join(said))
    return [v for line in said if called in line for v in values_in(line, attribute)]


def solve_order(prompt):
    _, said, question = lines(prompt)
    listed = first(r"first: (.+)\?", question).split(", ")
    return [next(event for line in said for event in listed if event in line)]


def solve_count(prompt):
    _, said, question = lines(prompt)
    habit = first(r"said: I (.+?)\?", question)
    times = sum(line.startswith(f"Today I {habit} ") for line in said)
    return [NUMBERS[times]]


def solve_abstention(prompt):
    _, said, question = lines(prompt)
    return own(said, asked(question)) or ["unknown"]


SOLVERS = {
    DIALOGUE_FACT: solve_single,
    DIALOGUE_UPDATE: solve_update,
    DIALOGUE_TWO_HOP: solve_two_hop,
    DIALOGUE_ORDER: solve_order,
    DIALOGUE_COUNT: solve_count,
    DIALOGUE_ABSTENTION: solve_abstention,
}

# Strict of who always says the commonest answer. Ten of the twelve values of one attribute in
# twelve are asked; a count is one of six, and half of the abstentions are right.
STRICT_BELOW = {DIALOGUE_ORDER: 0.15, DIALOGUE_COUNT: 0.24, DIALOGUE_ABSTENTION: 0.6}


@tasks
def test_a_reader_of_characters_is_always_right(task):
    check_oracle(task, SOLVERS[task], LENGTHS, number=20)


@tasks
def test_nobody_guesses_without_the_context(task):
    check_blind(task, length=175, strict_below=STRICT_BELOW.get(task, 0.05))


@tasks
def test_items_are_well_formed(task):
    check_form(task, LENGTHS)


@tasks
def test_items_are_as_long_as_they_may_be(task):
    check_size(task, LENGTHS)


@pytest.mark.parametrize("pick", [0, -1], ids=["the first value", "the last value"])
@pytest.mark.parametrize("task", [DIALOGUE_FACT, DIALOGUE_UPDATE], ids=lambda task: task.name)
def test_to_take_the_first_or_last_value_of_the_class_is_not_enough(task, pick):
    """Whoever does not read whose value it is, is wrong on most items."""
    items, hits = items_of(task, [240], 200), 0
    for item in items:
        told = [c for c in item.draft.candidates if re.search(rf"{c}\b", item.draft.context)]
        place = sorted(told, key=item.draft.context.index)[pick]
        hits += item.draft.candidates.index(place) in item.draft.correct
    # One in three, and four standard deviations of 200; always right would be 200.
    assert hits <= 67 + 27


@tasks
def test_sessions_are_dated_in_order_and_of_twelve_turns_at_most(task):
    for item in items_of(task, [800], 5):
        sessions = item.draft.context.split("\n\n")
        days = [date.fromisoformat(session.split()[2]) for session in sessions]
        assert days == sorted(days)
        sizes = [len(session.splitlines()) - 1 for session in sessions]
        assert max(sizes) <= 12
        # All but the small talk that was cut to the length.
        assert sum(size < 6 for size in sizes) <= 1
        assert len(sessions) > 6


@tasks
def test_what_is_said_of_life_does_not_depend_on_the_length(task):
    """The same draw with more small talk: the same lines, on the same days."""
    drafts = [task.draft(units, None, random.Random("life"), prose()) for units in (0, 7, 40)]
    prompts = [draft.instruction + draft.context + draft.question for draft in drafts]
    assert lines(prompts[0]) == lines(prompts[1]) == lines(prompts[2])
    assert set(drafts[0].context.splitlines()) <= set(drafts[2].context.splitlines())
    assert [draft.context.count("I have read") for draft in drafts] == [0, 7, 40]
    assert drafts[0].evidence == drafts[1].evidence == drafts[2].evidence


@tasks
def test_small_talk_holds_all_of_its_sentence(task):
    (item,) = items_of(task, [600], 1)
    read = re.findall(r'I have read this: "(.+)"', item.draft.context)
    known = {sentence for document in prose().documents for sentence in document}
    assert read
    assert set(read) <= known


def test_half_of_the_abstentions_have_an_answer():
    items = items_of(DIALOGUE_ABSTENTION, [240], 200)
    unknown = [item for item in items if item.draft.answers == ("unknown",)]
    assert len(unknown) == 100
    for even in (items[:number] for number in (2, 20)):
        assert sum(item in unknown for item in even) == len(even) // 2
    # What is not said of the person is said of relatives, so both kinds look alike.
    assert all(item.draft.candidates[1 - item.draft.correct[0]] in item.prompt for item in unknown)
    assert not [item for item in unknown if item.draft.evidence]


def test_counts_are_all_equally_likely():
    items = items_of(DIALOGUE_COUNT, [240], 300)
    for word in NUMBERS[1:]:
        number = sum(item.draft.answers == (word,) for item in items)
        assert abs(number - 50) < 26  # four standard deviations
    assert all(len(item.draft.evidence) >= 1 for item in items)


def test_the_lists_are_well_formed():
    """Names are no values, values are no names, and what is said of life is not said in replies."""
    assert len(ATTRIBUTES) == 12
    for attribute in ATTRIBUTES:
        assert len(set(attribute.values)) == len(attribute.values) >= 12
        for text in (attribute.own, attribute.changed, attribute.other):
            assert text.count("{value}") == 1
        assert "{who}" in attribute.question
        assert not attribute.stem.endswith(" ")
    assert not VALUES & set(NAMES)
    words = set(re.findall(r"\w+", " ".join(REPLIES)))
    assert not words & (VALUES | set(NAMES))
    assert len(set(EVENTS)) >= 6
    assert len(set(HABITS)) >= 2
    assert count(" ".join(NAMES)) == len(set(NAMES))


GOLDEN = {
    DIALOGUE_FACT: [
        "c7b7f2d98e435300-7a5bf468",
        "14b218057a75da26-2dddee24",
        "d9e373f059da7f92-8a1893bc",
    ],
    DIALOGUE_UPDATE: [
        "21b8e1c715c0417a-8dbe27ac",
        "83aa3e52c6d7192d-2b4a3006",
        "8e76f7e449c051ab-07f15a98",
    ],
    DIALOGUE_TWO_HOP: [
        "8d808cbd66f08a42-6d0e1eb6",
        "31ff8275d42e86de-0262f93c",
        "8ed06611acedbb9c-48374bbe",
    ],
    DIALOGUE_ORDER: [
        "9b2ea38c3f56a1d8-7dc1b857",
        "a9bfeb73b45943dd-1b1da1d8",
        "7c8065cdb1ba5ee7-34de28e6",
    ],
    DIALOGUE_COUNT: [
        "f3654a25f85ab69a-6ef9adb8",
        "6f213dbd92a0693e-62a0e1c3",
        "6fe1b9ba6d80c75c-2a4b4c71",
    ],
    DIALOGUE_ABSTENTION: [
        "253a48707f875a8c-0f895361",
        "4c52b39a99a676c9-80e6e864",
        "5990579a62f69dd6-7706e4cb",
    ],
}


@tasks
def test_items_are_the_same_on_every_machine(task):
    assert golden(task, 300) == GOLDEN[task]
