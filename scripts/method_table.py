"""Write the method table of README.md between its markers; --check fails when it is stale."""

from __future__ import annotations

import sys
from pathlib import Path

from memretrofit.methods import available_methods

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- methods: scripts/fix writes this table -->", "<!-- /methods -->"


def linked(paper: str) -> str:
    """An arXiv number as a link; anything else as it is."""
    number = paper.removeprefix("arXiv:")
    return paper if number == paper else f"[{paper}](https://arxiv.org/abs/{number})"


def table() -> str:
    lines = ["| method | family | presets | paper | what it does |", "|---|---|---|---|---|"]
    for info in available_methods().values():
        paper = ", ".join(map(linked, info.paper.split(", ")))
        presets = ", ".join(f"`{name}`" for name in info.presets)
        summary = info.summary.replace("|", "\\|")
        lines.append(
            f"| [`{info.name}`](memretrofit/methods/{info.name}.py) "
            f"| {info.family} | {presets} | {paper} | {summary} |"
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    if text.count(START) != 1 or text.count(END) != 1:
        print(f"README.md: expected one line {START!r} and one line {END!r}")
        return 1
    before, rest = text.split(START)
    current = f"{before}{START}\n{table()}\n{END}{rest.split(END)[1]}"
    if "--check" not in arguments:
        README.write_text(current, encoding="utf-8")
    elif current != text:
        print("README.md: the method table is not current; run scripts/fix")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
