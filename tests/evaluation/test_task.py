"""Items, scores and prose by hand; and that the checks of every task reject a faulty task."""

import hashlib
import random
from dataclasses import dataclass, replace

import pytest
from task_checks import (
    check_blind,
    check_depth,
    check_form,
    check_oracle,
    check_size,
    count,
    items_of,
    prose,
)

from memretrofit.data.sentences import split_sentences
from memretrofit.errors import ConfigError
from memretrofit.evaluation.material.prose import Prose, load_prose
from memretrofit.evaluation.scoring import SCORES, rank_match, score, strict_match
from memretrofit.evaluation.task import Draft, Item, Task, token_counter
from memretrofit.evaluation.tasks import available_tasks, get_tasks


@dataclass(frozen=True, kw_only=True)
class Colours(Task):
    """Units are the word `and`; the colour lies among them. Each fault is one field."""

    leak: bool = False
    at_front: bool = False
    most: int = 10_000
    shifts: bool = False
    twice: bool = False

    def draft(self, units, depth, draw, prose):
        if self.shifts:
            draw.sample(range(units + 10), units)
        colours = ["c" + str(number) for number in draw.sample(range(10_000), 4)]
        place = 0 if self.leak else draw.randrange(4)
        units = min(units, self.most)
        before = 0 if self.at_front else round((depth or 0) * units)
        words = ["and"] * before + [f"It is {colours[place]}."] + ["and"] * (units - before)
        return Draft(
            instruction="Read. ",
            context=" ".join(words * (1 + self.twice)),
            question=" Colour:",
            answers=(colours[place],),
            candidates=tuple(f" {colour}" for colour in colours),
            correct=(place,),
            evidence=(f"It is {colours[place]}.",),
        )


SOUND = Colours(name="colours", answer_tokens=2, has_depth=True)


def solve(prompt):
    return [prompt.split("It is ")[1].split(".")[0]]


def test_a_sound_task_passes_every_check():
    check_oracle(SOUND, solve, [30, 60], 25)
    check_blind(SOUND, 100)
    check_form(SOUND, [30, 60])
    check_size(SOUND, [30, 60])
    check_depth(SOUND, [60], unit=0.5)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ({"leak": True}, lambda task: check_blind(task, 100)),
        ({"at_front": True}, lambda task: check_depth(task, [60], unit=0.5)),
        ({"most": 20}, lambda task: check_size(task, [60])),
        ({"shifts": True}, lambda task: check_size(task, [60])),
        ({"twice": True}, lambda task: check_form(task, [60])),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_faulty_task_does_not(fault, check):
    with pytest.raises(AssertionError):
        check(replace(SOUND, **fault))


@pytest.mark.parametrize(
    "answer", [lambda prompt: ["c0"], lambda prompt: [solve(prompt)[0] + "0"]], ids=["0", "1"]
)
def test_an_oracle_that_is_wrong_is_noticed(answer):
    with pytest.raises(AssertionError):
        check_oracle(SOUND, answer, [30, 60], 25)


def test_an_item_by_hand():
    draft = Draft(
        instruction="Read: ",
        context="A cat. A dog.",
        question=" Q:",
        candidates=(" x", " y", " z", " w"),
        correct=(1, 3),
        evidence=("A dog.", "A cat."),
    )
    item = Item(task="t", number=0, length=9, depth=None, draft=draft)
    assert item.prompt == "Read: A cat. A dog. Q:"
    assert item.prompt_hash == hashlib.sha256(b"Read: A cat. A dog. Q:").hexdigest()[:16]
    assert item.offsets == ((13, 19), (6, 12))
    assert item.chance == 0.5
    assert item.group == "9/0"
    assert replace(item, draft=replace(draft, group="2:7")).group == "2:7"


def test_the_longest_item_that_fits():
    """`Read. It is c1. Colour:` is five words, the answer two: 13 of 20 are left for units."""
    for length in (7, 8, 20, 1000):
        for item in SOUND.items(count, prose(), length=length, number=2):
            assert item.draft.context.count("and") == length - 7
            assert item.length == length


def test_no_item_that_fits():
    with pytest.raises(ConfigError, match="colours at length 6: its shortest item has 7 tokens"):
        SOUND.items(count, prose(), length=6, number=1)
    with pytest.raises(ConfigError, match="has 9 tokens"):
        replace(SOUND, least_units=2).items(count, prose(), length=8, number=1)


def test_a_long_candidate_takes_more_room_than_the_answer():
    letters = SOUND.items(len, prose(), length=200, number=20)
    for item in letters:
        room = max(2, *(len(text) for text in item.draft.candidates))
        assert 200 - len(" and") < len(item.prompt) + room <= 200


def test_units_that_run_out_end_the_search():
    for item in replace(SOUND, most=3).items(count, prose(), length=500, number=3):
        assert item.draft.context.count("and") == 3


def test_what_an_item_depends_on():
    def prompts(task=SOUND, **change):
        asked = {"length": 40, "number": 5, **change}
        return [item.prompt for item in task.items(count, prose(), **asked)]

    assert len(set(prompts())) == 5
    assert prompts(number=8)[:5] == prompts()
    for other in (prompts(seed=1), prompts(length=41), prompts(replace(SOUND, name="hues"))):
        assert not set(other) & set(prompts())


@dataclass(frozen=True, kw_only=True)
class Pairs(Colours):
    """Items 2 n and 2 n + 1 are one draw, the second in capitals."""

    capitals: bool = False

    def key(self, length, number, seed):
        return super().key(length, number // 2, seed)

    def variant(self, length, number):
        return replace(self, capitals=number % 2 == 1)

    def draft(self, units, depth, draw, prose):
        found = super().draft(units, depth, draw, prose)
        return replace(found, context=found.context.upper()) if self.capitals else found


def test_items_may_share_a_draw_and_differ_by_turns():
    first, second, third, _ = Pairs(name="pairs", answer_tokens=2).items(
        count, prose(), length=40, number=4
    )
    assert second.draft.context == first.draft.context.upper() != first.draft.context
    assert second.draft.candidates == first.draft.candidates != third.draft.candidates


def test_depths_take_turns():
    items = SOUND.items(count, prose(), length=40, number=5, depths=(0.0, 1.0))
    assert [item.depth for item in items] == [0.0, 1.0, 0.0, 1.0, 0.0]
    nowhere = replace(SOUND, has_depth=False)
    assert {item.depth for item in items_of(nowhere, [40], 3)} == {None}


def test_tokens_are_counted_as_the_model_reads_them():
    assert token_counter(lambda text: {"input_ids": [0, *text.split()]})("a b c") == 4


@pytest.mark.parametrize(
    ("text", "answers", "match", "expected"),
    [
        (" It is 12345.", ["12345"], "all", 1.0),
        (" 1234 5", ["12345"], "all", 0.0),
        (" PARIS and rome", ["Paris", " Rome", "Oslo", "Bern"], "all", 0.5),
        (" It is 123456789.", ["12345"], "all", 0.0),
        (" He discovered it", ["red"], "all", 0.0),
        (" a red\none", ["red"], "all", 1.0),
        (" a-1b, no", ["a-1b"], "all", 1.0),
        (" —", ["—"], "all", 0.0),
        (" Garden. No, office", ["garden"], "first", 1.0),
        (" office, not garden", ["garden"], "first", 0.0),
        (" gardens", ["garden"], "first", 0.0),
        ("\n\n The old garden!", ["the old garden", "x"], "first", 1.0),
        (" the old", ["the old garden"], "first", 0.0),
        (" well-known", ["well"], "first", 0.0),
        (" 'Garden'", ["garden"], "first", 1.0),
        (" - garden", ["garden"], "first", 1.0),
        (" garden's", ["garden"], "first", 0.0),
        ("", ["garden"], "first", 0.0),
        ("", ["—"], "first", 0.0),
        (" garden", ["—"], "first", 0.0),
        (" A.", ["A"], "letter", 1.0),
        (" (A)", ["A"], "letter", 1.0),
        (" a. The first passage", ["A"], "letter", 0.0),
        (" Ab", ["A"], "letter", 0.0),
        (" B, A", ["A"], "letter", 0.0),
        (" x 2. y 3. z 4. w", ["z", "x", "y"], "list", 1.0),
        (" X, y, and z.", ["z", "x", "y"], "list", 1.0),
        (" and x", ["and", "x"], "list", 1.0),
        (" x\ny\nw\nz", ["x", "y", "z"], "list", 0.0),
        (" x, y", ["x", "y", "z"], "list", 0.0),
        (" x x y z", ["x", "y", "z"], "list", 0.0),
        ("", ["x"], "list", 0.0),
        ("", ["garden"], "all", 0.0),
    ],
)
def test_strict_by_hand(text, answers, match, expected):
    assert strict_match(text, answers, match) == expected


@pytest.mark.parametrize(
    ("values", "correct", "expected"),
    [
        ([-3.0, -1.0, -2.0], (1,), 1.0),
        ([-3.0, -1.0, -2.0], (0, 2), 0.0),
        ([-3.0, -1.0, -2.0], (0, 1), 1.0),
        ([-1.0, -1.0, -2.0], (1,), 0.0),
        ([float("-inf"), -900.0, -901.0], (1,), 1.0),
    ],
)
def test_rank_by_hand(values, correct, expected):
    assert rank_match(values, correct) == expected


def test_the_scores_of_an_item_by_hand():
    draft = Draft(
        context="", question="", answers=("b",), candidates=(" a", " b", " c"), correct=(1,)
    )
    given = (draft, " b.", [-4.0, -6.0, -8.0], [2, 3, 4])
    assert score(SOUND, *given) == {"strict": 1.0, "rank": 0.0}
    assert list(score(replace(SOUND, scores=("rank", "strict")), *given)) == ["rank", "strict"]
    assert score(replace(SOUND, scores=("nll",)), *given) == {"nll": 2.0}
    assert set(SCORES) == {"strict", "rank", "nll"}
    assert {name: words.sign for name, words in SCORES.items()} == {
        name: -1 if name == "nll" else 1 for name in SCORES
    }


def test_tasks_by_name():
    tasks = available_tasks()
    assert get_tasks("passkey, niah_single_1,passkey,") == [
        tasks["passkey"],
        tasks["niah_single_1"],
    ]
    assert get_tasks("all") == get_tasks("passkey,all") == list(tasks.values())
    assert all(name == task.name for name, task in tasks.items())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("paskey", "unknown task 'paskey'; did you mean 'passkey'"),
        ("passkey,nope,niah_single_9", "(?s)2 problems.*'nope'.*'niah_single_9'"),
        (" ,", "no task named; legal: .*passkey"),
        ("all,nope", "unknown task 'nope'"),
    ],
)
def test_unknown_tasks(names, message):
    with pytest.raises(ConfigError, match=message):
        get_tasks(names)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One.  Two?\n\nThree! four.", ["One.", "Two?", "Three! four."]),
        ('He said "Go." She went.', ['He said "Go."', "She went."]),
        ("(\"Why?\") 'Now.' He left", ['("Why?")', "'Now.'", "He left"]),
        ("\u201cGo.\u201d \u201cNo!\u201d", ["\u201cGo.\u201d", "\u201cNo!\u201d"]),
        ("Mr. Bennet met Mrs. Long. It cost 3.5 pounds.", 2),
        ("It was he, e.g. me. 4 came.", ["It was he, e.g. me.", "4 came."]),
        (" \n ", []),
    ],
)
def test_sentences_by_hand(text, sentences):
    found = split_sentences(text)
    assert (len(found) if isinstance(sentences, int) else found) == sentences
    assert " ".join(found) == " ".join(text.split())


def test_a_passage_reads_on_past_the_end():
    book = Prose(source="s", licence="l", documents=(("a", "b"), ("c",), ("d", "e")))
    for seed in range(20):
        passage = book.passage(random.Random(seed))
        taken = passage.take(12)
        assert all(passage.take(size) == taken[:size] for size in range(12))
        assert "".join(taken) in "abcde" * 4
    starts = {book.passage(random.Random(seed)).take(1)[0] for seed in range(50)}
    assert starts == set("abcde")


def test_prose_of_files(tmp_path):
    (tmp_path / "first.txt").write_text("One. Two.")
    (tmp_path / "second.txt").write_text("Three.")
    book = load_prose(tmp_path)
    assert book.documents == (("One.", "Two."), ("Three.",))
    assert load_prose(tmp_path, only=book.titles[1:]).documents == (("Three.",),)
    with pytest.raises(ConfigError, match=r"no document left with only=\['nobody'\]"):
        load_prose(tmp_path, only=["nobody"])
    (tmp_path / "third.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="empty"):
        load_prose(tmp_path)
