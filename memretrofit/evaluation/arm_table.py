"""What is compared with what: every arm and every difference, with its words and its looks."""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """How the line of an arm looks."""

    colour: str
    style: str
    width: float


class ArmInfo(NamedTuple):
    """A row of the table of arms."""

    words: str
    """What the arm is."""
    line: Line
    is_control: bool = False
    """Whether it only serves to judge another arm; a comparison of runs leaves it out."""
    of_text: bool = False
    """Whether it is also scored on plain rows of text."""


# Okabe and Ito's colours: apart under all common kinds of colour blindness; dashes keep them apart
# in grey.
ARM_TABLE = {
    "full": ArmInfo("full attention", Line("#000000", "-", 1.6), of_text=True),
    "window": ArmInfo("window + sinks", Line("#D55E00", "-", 1.6), of_text=True),
    "untrained": ArmInfo(
        "patched, untrained", Line("#999999", "--", 1.4), is_control=True, of_text=True
    ),
    "trained": ArmInfo("patched, trained", Line("#0072B2", "-", 2.4), of_text=True),
    "zeroed": ArmInfo(
        "trained, memory left out", Line("#D55E00", ":", 1.8), is_control=True, of_text=True
    ),
    "no_write": ArmInfo(
        "trained, writes disabled", Line("#E69F00", ":", 1.8), is_control=True, of_text=True
    ),
    "shuffled": ArmInfo(
        "trained, another row's state", Line("#009E73", "--", 1.8), is_control=True, of_text=True
    ),
    "stale": ArmInfo(
        "trained, begun with another item's state", Line("#009E73", ":", 1.8), is_control=True
    ),
    "bm25": ArmInfo("BM25, the best chunks as text", Line("#CC79A7", "-", 1.6)),
    "oprm": ArmInfo("OPRM, the surest chunk as text", Line("#56B4E9", "-", 1.6)),
}
"""Every arm, in the order of the tables."""
TASK_ARMS = {name: arm.words for name, arm in ARM_TABLE.items()}
"""Name of every arm of a task run, and what it is."""
ARMS = {name: arm.words for name, arm in ARM_TABLE.items() if arm.of_text}
"""The same for the report on plain text."""


class Difference(NamedTuple):
    """A row of the table of differences."""

    title: str
    is_gain: bool
    """Whether above zero speaks for the memory; otherwise it is what the memory loses."""


DIFFERENCES = {
    ("trained", "shuffled"): Difference("memory gain", is_gain=True),
    ("trained", "window"): Difference("over the window", is_gain=True),
    ("trained", "zeroed"): Difference("over no memory", is_gain=True),
    ("trained", "no_write"): Difference("over writing nothing", is_gain=True),
    ("full", "trained"): Difference("still lost to full attention", is_gain=False),
    # `stale` rows still read and write their own text, so this is no gain of having the right one.
    ("trained", "stale"): Difference("harm of not resetting", is_gain=False),
}
"""(arm that ought to be better, other arm): what the difference of the two is, in the order of the
tables."""
