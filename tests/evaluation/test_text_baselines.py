"""BM25 by hand, chunks that lose nothing, and answerers written in the test."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memretrofit.errors import ConfigError
from memretrofit.evaluation.reader import Outcome, Reading
from memretrofit.evaluation.runs.baselines import (
    CHUNK_TOKENS,
    MOST_TOKENS,
    bm25,
    bm25_scores,
    oprm,
    split_chunks,
)


def count(text):
    """Words, and one special token, as a tokenizer that adds a BOS has."""
    return len(text.split()) + 1


FILLER = "the grass is green and the sky is blue. "
NEEDLE = "the key of wim is 4711. "
QUESTION = "What is the key of wim? It is"


def reading(context, question=QUESTION, instruction="Read this.\n", **change):
    span = (len(instruction), len(instruction) + len(context))
    return Reading(prompt=instruction + context + question, context=span, **change)


def echo(seen):
    """Answers with the prompt itself."""

    def answer(readings):
        seen.append([r.prompt for r in readings])
        return [
            Outcome(text=r.prompt, log_likelihoods=(), token_counts=(), entropy=0.0)
            for r in readings
        ]

    return answer


@given(
    text=st.text(alphabet="ab .!?\n\"'", max_size=120),
    size=st.integers(1, 9),
    longest=st.none() | st.integers(9, 20),
)
@settings(max_examples=200, deadline=None)
def test_chunks_join_to_the_text_and_keep_their_size(text, size, longest):
    chunks = split_chunks(text, count, size, longest=longest)
    assert "".join(chunks) == text
    assert all(count(chunk) - 1 <= (longest or size) for chunk in chunks)


def test_chunks_end_with_a_sentence_or_a_line():
    text = 'One two. "Three four!" Five six?\nseven eight\nnine ten eleven twelve. last'
    assert split_chunks(text, count, 4) == [
        'One two. "Three four!" ',
        "Five six?\nseven eight\n",
        "nine ten eleven twelve. ",
        "last",
    ]
    # a sentence that is longer is cut between words, or stands alone where that is allowed
    assert split_chunks(text, count, 3)[-3:] == [
        "seven eight\nnine ",
        "ten eleven twelve. ",
        "last",
    ]
    assert split_chunks(text, count, 3, longest=4)[-2:] == ["nine ten eleven twelve. ", "last"]


def test_bm25_by_hand():
    """Three chunks of 2, 4 and 3 words: mean 3. `red` is in two of them, `fox` in one."""
    scores = bm25_scores("Red fox, red fox?", ["red fox", "RED red sun sea", "a b c"])
    red, fox = math.log(1 + 1.5 / 2.5), math.log(1 + 2.5 / 1.5)
    short = 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 3))
    long = 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 4 / 3))
    assert scores == pytest.approx([(red + fox) * short, red * long, 0.0], rel=1e-12)
    # without length normalisation, or with the words of the question counted twice, it is not this
    assert bm25_scores("red fox", ["red fox", "RED red sun sea", "a b c"], b=0) != pytest.approx(
        scores, rel=1e-2
    )


def test_bm25_feeds_the_best_chunks_in_their_order_within_the_budget():
    context = FILLER * 6 + NEEDLE + FILLER * 6 + "the key of ann is 5. " + FILLER * 6
    seen = []
    (outcome,) = bm25(echo(seen), count, budget=16)([reading(context)])
    assert seen == [[outcome.text]]
    assert outcome.text.startswith("Read this.\n")
    assert outcome.text.endswith(QUESTION)
    kept = outcome.text.removeprefix("Read this.\n").removesuffix(QUESTION)
    assert "4711" in kept
    assert kept.index("4711") < kept.index("ann")
    assert count(kept) - 1 <= 16
    # both sentences have six words, and with eleven the second best no longer fits
    (less,) = bm25(echo([]), count, budget=11)([reading(context)])
    assert "4711" in less.text
    assert "ann" not in less.text


def test_bm25_without_a_hint_keeps_the_end_as_a_window_does():
    context = "".join(f"line number {n}. " for n in range(100))
    (outcome,) = bm25(echo([]), count, budget=30)([reading(context, question="?")])
    kept = outcome.text.removeprefix("Read this.\n").removesuffix("?")
    assert context.endswith(kept)
    assert 0 < count(kept) - 1 <= 30


def test_bm25_keeps_a_quarter_of_the_context_by_default():
    context = FILLER * 80
    (outcome,) = bm25(echo([]), count)([reading(context)])
    kept = outcome.text.removeprefix("Read this.\n").removesuffix(QUESTION)
    whole = count(context) - 1
    assert whole / 4 - CHUNK_TOKENS < count(kept) - 1 <= whole / 4


@pytest.mark.parametrize("baseline", [bm25, oprm])
def test_a_context_that_fits_or_is_not_named_is_read_as_it_is(baseline):
    whole = reading(FILLER * 3 + NEEDLE)
    bare = Reading(prompt=whole.prompt)
    size = 10_000
    for asked in (whole, bare):
        (outcome,) = baseline(echo([]), count, **{_budget(baseline): size})([asked])
        assert outcome.text == whole.prompt


def _budget(baseline):
    return "budget" if baseline is bm25 else "chunk_tokens"


@pytest.mark.parametrize("baseline", [bm25, oprm])
@pytest.mark.parametrize("size", [0, -3])
def test_no_budget_is_refused(baseline, size):
    with pytest.raises(ConfigError, match=str(size)):
        baseline(echo([]), count, **{_budget(baseline): size})


def certain_of(word):
    """Sure where it sees the word; writes whether it did."""
    calls = []

    def answer(readings):
        calls.append(list(readings))
        return [
            Outcome(
                text=str(word in r.prompt),
                log_likelihoods=tuple(float(len(c)) for c in r.candidates),
                token_counts=(),
                entropy=0.1 if word in r.prompt else 2.0,
            )
            for r in readings
        ]

    return answer, calls


@pytest.mark.parametrize("place", [0, 7, 19])
def test_oprm_answers_from_the_chunk_it_is_surest_of(place):
    sentences = [FILLER] * 20
    sentences[place] = NEEDLE
    answer, calls = certain_of("4711")
    asked = reading("".join(sentences), candidates=(" 4711", " 12"), max_new_tokens=5)
    other = reading(FILLER * 20, candidates=(" 1",), max_new_tokens=3)
    sure, unsure = oprm(answer, count, chunk_tokens=20)([asked, other])
    assert sure.text == "True"
    assert sure.log_likelihoods == (5.0, 3.0)
    assert unsure.text == "False"
    # chunks are only looked at; the chosen two are read with everything that was asked
    *looks, last = calls
    assert all(r.max_new_tokens == 0 and not r.candidates for call in looks for r in call)
    assert [r.max_new_tokens for r in last] == [5, 3]
    for read in last:
        assert read.prompt.startswith("Read this.\n")
        assert read.prompt.endswith(QUESTION)
        assert count(read.prompt) < count(other.prompt) / 4
    whole = 2 * count(other.prompt)
    assert all(len(call) * max(count(r.prompt) for r in call) <= whole for call in looks)


def test_oprm_of_equally_sure_chunks_takes_the_first():
    context = "".join(f"line number {n}. " for n in range(40))
    (outcome,) = oprm(echo([]), count, chunk_tokens=12)([reading(context)])
    assert "number 0." in outcome.text
    assert "number 5." not in outcome.text


def test_the_least_entropy_wins_not_the_most():
    """A reader that is less sure of the needle is led astray: the criterion is what it is."""

    def answer(readings):
        return [
            Outcome(
                text=r.prompt,
                log_likelihoods=(),
                token_counts=(),
                entropy=3.0 if "4711" in r.prompt else 1.0,
            )
            for r in readings
        ]

    (outcome,) = oprm(answer, count, chunk_tokens=20)([reading(FILLER * 5 + NEEDLE + FILLER * 5)])
    assert "4711" not in outcome.text


def test_oprm_reads_no_more_at_once_than_its_paper():
    """A quarter of a long text would be beyond the positions of the model that reads it."""
    calls = []
    context = FILLER * (5 * MOST_TOKENS // (count(FILLER) - 1))
    oprm(echo(calls), count)([reading(context)])
    longest = max(count(prompt) for call in calls for prompt in call)
    assert 0.9 * MOST_TOKENS < longest < 1.1 * MOST_TOKENS
