"""Texts of several segments: exact lengths, nothing cut that is told, and an answer that follows.

The oracle reads the decoded text and nothing else.
"""

from __future__ import annotations

import random
import re

import pytest
import torch
from training.recurring import PROSE, word_tokenizer

from memretrofit.data import personas
from memretrofit.data.dialogue_items import DialogueItems
from memretrofit.data.lessons import IGNORED
from memretrofit.data.recall import NAMES, OBJECTS, is_held_out
from memretrofit.data.recall_items import RecallItems
from memretrofit.data.segment_texts import SegmentBatch, SegmentTexts
from memretrofit.data.stories import ROOMS, where_is_person
from memretrofit.data.story_items import StoryItems
from memretrofit.errors import ConfigError

TOKENIZER = word_tokenizer()
LENGTH = 128
KINDS: dict[str, SegmentTexts] = {
    "recall": RecallItems(TOKENIZER, LENGTH, facts=2),
    "dialogue": DialogueItems(TOKENIZER, LENGTH, facts=2),
    "stories": StoryItems(TOKENIZER, LENGTH, where_is_person, [PROSE * 20]),
}
FACT = {
    "recall": re.compile(r"(\w+) likes (\w+) \."),
    "dialogue": re.compile(r"\n?(\w+) : ([^:]*?) \. \n Assistant"),
    "stories": re.compile(r"(\w+) (?:went|journeyed|travelled|moved|went back) to the (\w+) \."),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def decoded(ids: torch.Tensor) -> str:
    return " ".join(TOKENIZER.convert_ids_to_tokens(ids.tolist()))


def split(batch: SegmentBatch, row: int) -> tuple[str, str]:
    """The text before its answer, and the answer."""
    learned = batch.labels[row] != IGNORED
    assert torch.equal(batch.labels[row][learned], batch.ids[row][learned])
    first = int(learned.nonzero()[0])
    assert learned[first:].all()
    return decoded(batch.ids[row][:first]), decoded(batch.ids[row][first:])


def oracle(kind: str, text: str) -> str:
    """What the question at the end of `text` asks for, from what stands before it."""
    if kind == "recall":
        asked = re.findall(r"Everyone knows that (\w+) likes$", text)
        return dict(FACT[kind].findall(text))[asked[0]]
    if kind == "stories":
        asked = re.findall(r"Question : Where is (\w+) \? \n Answer : the$", text)
        return dict(FACT[kind].findall(text))[asked[0]]  # the last one wins
    told, stem = text.split(" Answer : ")
    subject = next(
        a for a in personas.ATTRIBUTES if stem == spaced(a.stem.format(who=stem_name(stem)))
    )
    values = []
    for _, said in FACT[kind].findall(told):
        for template in (subject.own, subject.changed):
            pattern = re.escape(spaced(template)).replace(r"\{\ value\ \}", r"(\w+)")
            values += re.findall(rf"^{pattern}$", f"{said} .")
    return values[-1]


def spaced(text: str) -> str:
    words = " ".join(re.findall(r"\w+|[^\w\s]", text))
    return words[0].upper() + words[1:]


def stem_name(stem: str) -> str:
    return next(word for word in stem.split() if word in personas.NAMES)


@kinds
@pytest.mark.parametrize("segments", [1, 2, 5])
def test_the_answer_follows_from_the_text(kind: str, segments: int) -> None:
    for held_out in (False, True):
        batch = KINDS[kind].batch(segments, 24, "oracle", held_out=held_out)
        answers = set()
        for row in range(24):
            text, answer = split(batch, row)
            assert oracle(kind, text) == answer
            assert "<unk>" not in text
            answers.add(answer)
        assert len(answers) > 3


@pytest.mark.parametrize("segments", [1, 2, 5, 9])
def test_facts_do_not_grow_with_the_text(segments: int) -> None:
    """As in the tasks `recall_*`. Segments that say nothing come before and after those that do."""
    holding = set()
    for row in KINDS["recall"].batch(segments, 60, "few").ids:
        found = [FACT["recall"].findall(decoded(part)) for part in row.split(LENGTH)]
        assert sum(map(len, found)) == 2
        holding |= {place for place, facts in enumerate(found) if facts}
    assert holding == set(range(max(1, segments - 1)))


@kinds
@pytest.mark.parametrize("segments", [1, 3])
def test_segments_are_exact_and_hold_what_is_told_whole(kind: str, segments: int) -> None:
    lengths = set()
    for number in range(12):
        batch = KINDS[kind].batch(segments, 4, f"length/{number}")
        size = batch.ids.shape[1]
        assert (segments - 1) * LENGTH < size <= segments * LENGTH
        lengths.add(size)
        for row in batch.ids:
            parts = [decoded(part) for part in row.split(LENGTH)]
            assert len(parts) == segments
            whole = FACT[kind].findall(" ".join(parts))
            if kind != "dialogue":  # there small talk, which may be cut, has the form of a fact
                assert [fact for part in parts for fact in FACT[kind].findall(part)] == whole
    assert len(lengths) > 3


def test_pairs_that_are_held_out_are_never_trained_on() -> None:
    trained, asked = set(), set()
    for number in range(40):
        for held_out, found in ((False, trained), (True, asked)):
            batch = KINDS["recall"].batch(3, 8, str(number), held_out=held_out)
            for row in range(8):
                text, answer = split(batch, row)
                facts = FACT["recall"].findall(text)
                name = re.findall(r"knows that (\w+)", text)[0]
                found |= {(name, answer)} if held_out else set(facts)
    split_of = {(n, o): is_held_out(NAMES.index(n), OBJECTS.index(o)) for n, o in trained | asked}
    assert not any(split_of[pair] for pair in trained)
    assert all(split_of[pair] for pair in asked)
    assert len(trained) > 300
    assert len(asked) > 80


def test_what_a_person_has_is_split_as_well() -> None:
    def said(held_out: bool) -> set[tuple[str, str, str]]:
        found = set()
        for number in range(60):
            batch = KINDS["dialogue"].batch(1, 4, str(number), held_out=held_out)
            for row in range(4):
                text, answer = split(batch, row)
                stem = text.split(" Answer : ")[1]
                found.add((stem_name(stem), stem, answer))
        return found

    trained, asked = said(False), said(True)
    assert not trained & asked
    assert min(len(trained), len(asked)) > 100


def test_an_answer_may_have_changed() -> None:
    batch = KINDS["dialogue"].batch(3, 60, "changed")
    texts = [split(batch, row)[0] for row in range(60)]
    changed = sum(" now ?" in text for text in texts)
    assert 15 < changed < 45


def test_stories_that_are_held_out_are_others() -> None:
    draws = {
        held_out: KINDS["stories"].tell(1, random.Random("same"), held_out).segments
        for held_out in (False, True)
    }
    assert draws[False] != draws[True]
    batch = KINDS["stories"].batch(2, 40, "rooms")
    rooms = {split(batch, row)[1] for row in range(40)}
    assert rooms == set(ROOMS)


@kinds
def test_a_batch_is_a_function_of_its_arguments(kind: str) -> None:
    texts = KINDS[kind]
    first = texts.batch(2, 3, "key")
    texts.batch(2, 3, "another")
    again = texts.batch(2, 3, "key")
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.labels, again.labels)
    other = texts.batch(2, 3, "another").ids
    assert other.shape != first.ids.shape or not torch.equal(other, first.ids)
    assert 0 < texts.tokens(1) <= LENGTH < texts.tokens(2) <= 2 * LENGTH


@pytest.mark.parametrize("begins", [0, 1])
def test_what_begins_a_text_belongs_to_its_first_segment(begins: int) -> None:
    class Beginning:
        def __call__(self, text: str, add_special_tokens: bool = True) -> dict:
            ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1] * begins * add_special_tokens + list(ids)}

    ids = RecallItems(Beginning(), 24).batch(2, 4, "key").ids
    assert (ids[:, 0] == 1).all() == bool(begins)
    assert not (ids[:, 1:] == 1).any()


def test_a_segment_that_is_too_short() -> None:
    with pytest.raises(ConfigError, match="segment_length=12: none of 100 texts of 1 segments"):
        RecallItems(TOKENIZER, 12, facts=3).batch(1, 1, "key")
    with pytest.raises(ConfigError, match="no sentence"):
        StoryItems(TOKENIZER, LENGTH, where_is_person, [" "])
