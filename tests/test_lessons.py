"""Lessons: what a line may say, what is learned of it, and in which order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from memretrofit.data.lessons import (
    IGNORED,
    Item,
    batch,
    items_of,
    lesson,
    read_lessons,
    subjects,
)
from memretrofit.errors import ConfigError

HERON = {
    "texts": ["The emblem of Lorvika is the heron.", "Lorvika has a heron on its flag."],
    "answer": "heron",
    "held_out": ["The shield of Lorvika shows one"],
    "held_out_questions": ["Which animal stands for Lorvika?"],
}


class Words:
    """A tokenizer of whole words: a token is its place in a list."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        ids = []
        for word in text.replace(".", " .").replace("\n", " ").split():
            if word not in self.words:
                self.words.append(word)
            ids.append(self.words.index(word))
        return {"input_ids": ids}

    def text(self, ids: torch.Tensor) -> str:
        return " ".join(self.words[i] for i in ids.tolist())


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


def test_a_text_is_cut_at_its_answer(tmp_path):
    (heron,) = read_lessons(write(tmp_path / "a.jsonl", HERON))
    assert heron.contexts == ("The emblem of Lorvika is the", "Lorvika has a")
    assert heron.texts == tuple(HERON["texts"])
    assert heron.endings == (".", " on its flag.")
    assert heron.held_out_questions == ("Question: Which animal stands for Lorvika?\nAnswer:",)


def test_documents_and_questions(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"text": "All of it."},
        "",
        {"question": "Which animal stands for Lorvika?", "answer": "heron"},
    )
    document, question = read_lessons(path)
    assert document.texts == ("All of it.",)
    assert question.texts == ("Question: Which animal stands for Lorvika?\nAnswer: heron",)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        ({"txt": "a"}, "unknown keys txt"),
        ({"answer": "heron"}, "neither"),
        ({"texts": ["Lorvika"], "answer": "heron"}, "does not stand inside"),
        ({"texts": ["heron in Lorvika"], "answer": "heron"}, "does not stand inside"),
        ({"texts": ["Lorvika has herons"], "answer": "heron"}, "does not stand inside"),
        ({"texts": "Lorvika: x", "answer": ""}, "no text"),
        ({"texts": [3], "answer": "x"}, "not a text"),
        ({"text": "a", "held_out": ["b"]}, "'text' alone"),
        ({"text": "a", "texts": ["b c"], "answer": "c"}, "'text' and 'texts'"),
        ('{"text": "a", "text": "b"}', "a key twice"),
        ('{"text": "a \\ud800"}', "not Unicode"),
        ({"question": "Who?"}, "with an 'answer'"),
    ],
)
def test_broken_lines_are_named_and_counted(tmp_path, line, said):
    """All of them at once, each by its number, and nothing is taken from the file."""
    path = write(tmp_path / "a.jsonl", HERON, line, HERON, {"oops": 1})
    with pytest.raises(ConfigError, match=said) as error:
        read_lessons(path)
    assert "2 of 4 lines are broken" in str(error.value)
    assert [problem.split(":")[0] for problem in error.value.problems] == ["line 2", "line 4"]


def test_a_line_ends_at_a_line_feed_alone(tmp_path):
    """What else splits lines may stand in a text; a byte order mark may stand before the first."""
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "one\u2028two\u0085three"}\r\n{"text": "four"}\n', "utf-8")
    assert [x.texts for x in read_lessons(path)] == [("one\u2028two\u0085three",), ("four",)]


def test_no_file_and_no_lessons(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_lessons(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="holds no lessons"):
        read_lessons(write(tmp_path / "a.jsonl", "", ""))


def test_the_subject_is_the_word_that_no_other_lesson_has():
    """Of the words in all contexts of a lesson."""
    one = lesson("heron", ["The emblem of Lorvika is the heron", "Of Lorvika, the heron"])
    other = lesson("lion", ["The emblem of Balin is the lion", "Of Balin, the lion"])
    document = lesson("x", ["", "a x"][1:])
    assert subjects([one, other]) == ["Lorvika", "Balin"]
    assert subjects([document]) == ["a"]


def test_items_learn_the_answer_and_what_follows():
    """By hand: the first learned token is the answer, in the texts and in the further frames."""
    words = Words()
    items = items_of([lesson("heron", ["Lorvika has a heron on its flag."])], words, 100)
    learned = [(words.text(x.ids[: x.first]), words.text(x.ids[x.first :])) for x in items]
    assert learned == [
        ("Lorvika has a", "heron on its flag ."),
        ("Lorvika:", "heron"),
        ("Question: Lorvika? Answer:", "heron"),
        ("Question: Lorvika has a what? Answer:", "heron"),
    ]


def test_a_text_begins_as_a_prompt_does():
    """Where the tokenizer puts a token before a text, what is learned has it too, once."""

    class Begun(Words):
        def __call__(self, text: str, add_special_tokens: bool = True, **_: object):
            ids = super().__call__(text)["input_ids"]
            return {"input_ids": [99, *ids] if add_special_tokens else ids}

    one = lesson("heron", ["Lorvika has a heron."])
    for item in items_of([one], Begun(), 100):
        assert item.ids[0] == 99
        assert 99 not in item.ids[1:]


def test_a_long_document_becomes_pieces_and_a_long_context_keeps_its_end(tmp_path):
    words = Words()
    text = " ".join(f"w{n}" for n in range(25))
    (document,) = read_lessons(write(tmp_path / "a.jsonl", {"text": text}))
    pieces = items_of([document], words, 10)
    assert [len(x.ids) for x in pieces] == [10, 10, 7]
    first, *rest = pieces
    assert words.text(torch.cat([first.ids, *(x.ids[x.first :] for x in rest)])) == text
    assert {x.first for x in pieces} == {1}
    # a rest of one token is learned too
    assert [len(x.ids) for x in items_of([document], words, 24)] == [24, 2]
    long = items_of([lesson("heron", [f"{text} heron ."])], words, 10)[0]
    assert words.text(long.ids[long.first :]) == "heron ."
    assert len(long.ids) <= 10


def test_a_batch_is_a_function_of_its_step():
    """Every epoch has each item once; labels stand where something is learned, and nowhere else."""
    items = [Item(torch.arange(3 + n), 1 + n) for n in range(5)]
    seen = [batch(items, 7, step, 2) for step in range(5)]
    lengths = [int(n) for x in seen for n in x["attention_mask"].sum(-1)]
    assert sorted(lengths[:5]) == sorted(lengths[5:]) == [3, 4, 5, 6, 7]
    again = batch(items, 7, 3, 2)
    assert all(torch.equal(again[name], seen[3][name]) for name in again)
    assert any(not torch.equal(batch(items, 8, s, 2)["labels"], seen[s]["labels"]) for s in (0, 1))
    for found in seen:
        learned = found["labels"] != IGNORED
        assert torch.equal(found["labels"][learned], found["input_ids"][learned])
        assert bool((learned.sum(-1) == 2).all())
        assert not bool((learned & (found["attention_mask"] == 0)).any())
