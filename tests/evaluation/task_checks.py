"""What every generated task has to pass, and seeded prose to hide things in.

Sizes are counted in words, so no tokenizer is needed. Every check asks for items with fixed seeds:
it passes always or never.
"""

import hashlib
import random
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache

from memretrofit.data.words import ADJECTIVES, NOUNS
from memretrofit.evaluation.material.prose import Prose
from memretrofit.evaluation.scoring import rank_match, strict_match
from memretrofit.evaluation.task import Draft, Item, Task

Solve = Callable[[str], Sequence[str]]
"""From the characters of a prompt to its answers."""
Choose = Callable[[Sequence[str], Sequence[str]], int]
"""From what was solved and the candidates to the place of one candidate."""
Guess = Callable[[str, Sequence[str]], int]
"""From question and candidates, without the context, to the place of one candidate."""

NAMES = re.findall(
    r"\w+",
    "Alice Boris Clara David Emma Felix Grace Henry Irene Jacob Karen Louis Maria Nora Oscar Paula "
    "Quentin Rosa Simon Tessa",
)
VERBS = re.findall(
    r"\w+", "found carried followed painted visited watched described remembered washed sold"
)
PREPOSITIONS = re.findall(
    r"\w+", "in on under near behind with from before after over through between"
)
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
"""A version-4 UUID."""


def count(text: str) -> int:
    """Words: the size of a text where no tokenizer is at hand."""
    return len(text.split())


@cache
def prose(seed: int = 0, documents: int = 4, sentences: int = 300) -> Prose:
    """Made-up English: 5 to 25 words a sentence, names in the middle, prepositions, no digits."""
    draw = random.Random(f"prose/{seed}")

    def thing() -> str:
        return f"the {draw.choice(ADJECTIVES)} {draw.choice(NOUNS)}"

    def place() -> str:
        return f"{draw.choice(PREPOSITIONS)} {draw.choice([thing(), draw.choice(NAMES)])}"

    def sentence() -> str:
        who = draw.choice([draw.choice(NAMES), thing(), f"{thing()} {place()}"])
        parts = [who, draw.choice(VERBS), draw.choice([thing(), draw.choice(NAMES)]), place()]
        parts += [place() for _ in range(draw.randrange(2))]
        if draw.random() < 0.4:
            parts += ["and", draw.choice(NAMES), draw.choice(VERBS), thing()]
        text = " ".join(parts)
        return text[0].upper() + text[1:] + "."

    texts = tuple(tuple(sentence() for _ in range(sentences)) for _ in range(documents))
    titles = tuple(f"Book {number}" for number in range(documents))
    return Prose(source="test", licence="none", documents=texts, titles=titles)


def items_of(task: Task, lengths: Sequence[int], number: int, seed: int = 0) -> list[Item]:
    """`number` items at each length, on the made-up prose."""
    return [
        item
        for length in lengths
        for item in task.items(count, prose(), length=length, number=number, seed=seed)
    ]


def bare(text: str) -> str:
    """A candidate or an answer without the quotes, stops and spaces around it, in lower case."""
    return text.strip(" \"'.,;\n").lower()


def same_text(solved: Sequence[str], candidates: Sequence[str]) -> int:
    """The one candidate that is among what was solved; more or fewer is a failure."""
    known = {bare(answer) for answer in solved}
    places = [place for place, text in enumerate(candidates) if bare(text) in known]
    assert places, f"{list(solved)} not among {list(candidates)}"
    return places[0]


def check_oracle(
    task: Task, solve: Solve, lengths: Sequence[int], number: int, choose: Choose = same_text
) -> None:
    """An answerer that reads only characters is right on every item, by both scores."""
    items = items_of(task, lengths, number)
    assert len(items) >= 50, "too few items to prove anything"
    for item in items:
        solved = solve(item.prompt)
        where = f"{item.task} {item.length} {item.number}: {list(solved)}"
        text = " " + ", ".join(solved)
        assert strict_match(text, item.draft.answers, task.match) == 1, where
        if "rank" in task.scores:
            place = choose(solved, item.draft.candidates)
            values = [float(other == place) for other in range(len(item.draft.candidates))]
            assert rank_match(values, item.draft.correct) == 1, where


def blind_guesses(known: Sequence[Item]) -> dict[str, Guess]:
    """Ways to guess without the context; the last ones learn from the answers of other items."""
    texts = Counter(item.draft.candidates[c] for item in known for c in item.draft.correct)
    places = Counter(c for item in known for c in item.draft.correct)

    def best(key: Callable[[str], object]) -> Guess:
        return lambda question, found: max(range(len(found)), key=lambda c: key(found[c]))  # pyright: ignore[reportArgumentType, reportCallIssue]

    def in_question(question: str, found: Sequence[str], wanted: bool) -> int:
        held = [bare(text) in question.lower() for text in found]
        return held.index(wanted) if wanted in held else 0

    def usual_place(question: str, found: Sequence[str]) -> int:
        return max(range(len(found)), key=lambda c: places[c])

    return {
        "first": lambda question, found: 0,
        "last": lambda question, found: len(found) - 1,
        "longest": best(len),
        "shortest": best(lambda text: -len(text)),
        "alphabetical": lambda question, found: found.index(min(found)),
        "in the question": lambda question, found: in_question(question, found, True),
        "not in the question": lambda question, found: in_question(question, found, False),
        "most frequent answer": best(lambda text: texts[text]),
        "most frequent place": usual_place,
    }


def check_blind(
    task: Task,
    length: int,
    number: int = 300,
    strict_below: float = 0.01,
    also: Mapping[str, Guess] | None = None,
) -> None:
    """Guessers are right as often as chance, within 99.9 %, and hardly ever by `strict`.

    `number` items are guessed, by what as many others taught. Far below chance fails as well: who
    guesses the other way round would be far above.
    """
    items = items_of(task, [length], number, seed=1)
    known = items_of(task, [length], number, seed=2)
    expected = sum(item.chance for item in items)
    spread = sum(item.chance * (1 - item.chance) for item in items) ** 0.5
    for name, guess in {**blind_guesses(known), **(also or {})}.items():
        places = [guess(item.draft.question, item.draft.candidates) for item in items]
        hits = sum(at in item.draft.correct for at, item in zip(places, items, strict=True))
        # 3.29 standard deviations hold 99.9 % of a normal; the half is the step of a count.
        band = 3.29 * spread + 0.5
        assert abs(hits - expected) <= band, f"{name}: {hits} of {number}, expected {expected:.1f}"
    common = Counter(answer for item in known for answer in item.draft.answers).most_common(1)
    said = " " + " ".join(answer for answer, _ in common)
    strict = sum(strict_match(said, item.draft.answers, task.match) for item in items) / number
    assert strict <= strict_below, f"{said!r} is right on {strict:.3f}"


def check_key_blind(task: Task, length: int, number: int = 300) -> None:
    """Who knows all that was said but not what is asked is at chance, within 99.9 %.

    Every candidate stands in the context, so none is out because it was not said; and the right one
    is as often the first, the last or any other of them in the text.
    """
    items = items_of(task, [length], number, seed=1)
    places = Counter()
    for item in items:
        said = sorted(item.draft.candidates, key=item.draft.context.index)
        (right,) = item.draft.correct
        places[said.index(item.draft.candidates[right])] += 1
    chance = items[0].chance
    band = 3.29 * (number * chance * (1 - chance)) ** 0.5 + 0.5
    for place in range(len(items[0].draft.candidates)):
        hits = places[place]
        assert abs(hits - number * chance) <= band, f"said as number {place}: {hits} of {number}"


def echoed(task: Task, length: int, number: int = 40) -> float:
    """Mean strict score of who says the first words of the context, or the last; the better one.

    Of as many words as the answer has room for. The evidence is in the middle, since at depth 0 or
    1 it is itself what is said.
    """
    items = task.items(count, prose(), length=length, number=number, depths=(0.5,))
    room, match = task.answer_tokens, task.match
    words = [item.draft.context.split() for item in items]
    return max(
        sum(
            strict_match(" " + " ".join(said), item.draft.answers, match)
            for said, item in zip(ends, items, strict=True)
        )
        / number
        for ends in ([text[:room] for text in words], [text[-room:] for text in words])
    )


def golden(task: Task, length: int, number: int = 3) -> list[str]:
    """`prompt_hash` of a few items, and eight hex digits of all else that scoring sees."""
    found = []
    for item in items_of(task, [length], number):
        rest = (item.draft.answers, item.draft.candidates, item.draft.correct, item.draft.evidence)
        found.append(f"{item.prompt_hash}-{hashlib.sha256(repr(rest).encode()).hexdigest()[:8]}")
    return found


def drafts_around(task: Task, item: Item, seed: int = 0) -> tuple[Draft, Draft]:
    """The item's draft, written anew, and the one with one more unit."""

    writer = task.variant(item.length, item.number)

    def write(units: int) -> Draft:
        key = task.key(item.length, item.number, seed)
        return writer.draft(units, item.depth, random.Random(key), prose())

    size, above = len(item.draft.context), task.least_units + 1
    while len(write(above).context) < size:
        above *= 2
    units = bisect_left(
        range(above + 1), size, lo=task.least_units, key=lambda units: len(write(units).context)
    )
    return write(units), write(units + 1)


def check_size(task: Task, lengths: Sequence[int], number: int = 5, grows: bool = True) -> None:
    """Each item fits, one more unit would not, and what is asked does not depend on the units.

    `grows=False` is for a task whose units run out.
    """
    for item in items_of(task, lengths, number):
        room = max([task.answer_tokens, *map(count, item.draft.candidates)])
        assert count(item.prompt) + room <= item.length
        same, more = drafts_around(task, item)
        assert same == item.draft
        if grows or more != same:
            assert count(more.prompt) + room > item.length, f"{item.number}: room for one more unit"
        for name in ("instruction", "question", "answers", "candidates", "correct"):
            assert getattr(same, name) == getattr(more, name), f"{name} depends on the units"


def check_form(task: Task, lengths: Sequence[int], number: int = 10) -> None:
    """Items are all different and the same each time; texts join; offsets point at evidence."""
    items = items_of(task, lengths, number)
    assert items == items_of(task, lengths, number)
    assert not {i.prompt for i in items} & {i.prompt for i in items_of(task, lengths, number, 1)}
    assert len({item.prompt for item in items}) == len(items)
    for item in items:
        draft = item.draft
        assert item.prompt == item.prompt.rstrip()
        assert len(set(draft.candidates)) == len(draft.candidates)
        assert all(re.match(r" ?\S", text) for text in (*draft.candidates, *draft.answers))
        assert all(0 <= place < len(draft.candidates) for place in draft.correct)
        assert all(draft.context.count(text) == 1 for text in draft.evidence)
        assert [item.prompt[a:b] for a, b in item.offsets] == list(draft.evidence)


def check_depth(
    task: Task,
    lengths: Sequence[int],
    unit: float = 1,
    number: int = 20,
    measure: Callable[[str], int] = count,
) -> None:
    """The evidence has `depth` of the rest of the context before it, within `unit`.

    `measure` says how much a text holds, in words or in the task's own units.
    """
    assert task.has_depth
    items = items_of(task, lengths, number)
    assert {item.depth for item in items} == {0.0, 0.25, 0.5, 0.75, 1.0}
    for item in items:
        first = item.draft.context.index(item.draft.evidence[0])
        before = measure(item.draft.context[:first])
        others = measure(item.draft.context) - measure(item.draft.evidence[0])
        assert item.depth is not None
        assert abs(before - item.depth * others) <= unit, f"{item.depth}: {before} of {others}"
        # Without a middle the check would pass for evidence that is always at the beginning.
        assert others > 8 * unit, "context too short to tell depths apart"
