"""What the pages in docs/ and recipes/ promise: every error class and recipe, and links that lead
somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer

from memretrofit import errors
from memretrofit.cli import app
from memretrofit.errors import ConfigError, MemretrofitError
from memretrofit.recipe import load_recipe
from memretrofit.retrofit import describe
from memretrofit.training.base import load_base_config
from memretrofit.training.small import shapes_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "recipes" / "README.md"]
TRAIN = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
CLASSES = {
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, MemretrofitError)
}


def anchors(page: Path) -> list[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_every_error_class_has_its_section_and_says_where():
    sections = {f"docs/errors.md#{anchor}" for anchor in anchors(DOCS / "errors.md")[1:]}
    assert {value.section for value in CLASSES} == sections
    for value in CLASSES:
        assert value("message").__notes__ == [f"Causes and remedies: {value.section}"]


def test_a_note_is_the_errors_own():
    first, second = ConfigError("one"), ConfigError.listing("two", ["a", "b"])
    first.__notes__.append("of a caller")
    assert second.__notes__ == ConfigError("three").__notes__
    assert str(first) == "one"


def messages() -> str:
    """Every text in the code, with ... for what is filled in."""
    texts: list[str] = []
    for path in sorted((ROOT / "memretrofit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "..." for x in node.values]
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_causes_quote_messages_that_exist():
    causes = re.findall(r"^- \*\*(.*?)\*\*", (DOCS / "errors.md").read_text("utf-8"), re.M)
    code = messages()
    quoted = [quote for cause in causes for quote in re.findall(r"`([^`]*)`", cause)]
    assert len(quoted) > 10
    for quote in quoted:
        for part in re.split(r" ?\.\.\.,? ?", quote):
            assert part in code, quote


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_lists_every_page():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\(([^)\s#]+)\)", index)
    pages = {path.name for path in DOCS.iterdir() if path.suffix in {".md", ".ipynb"}}
    assert {link for link in linked if "/" not in link} == pages - {"README.md"}
    assert len(linked) == len(set(linked))


RECIPES = sorted(path for path in (ROOT / "recipes").glob("[!_]*.yaml"))
NEEDS, COSTS = (
    section.partition("\n## ")[0]
    for section in (ROOT / "recipes" / "README.md").read_text("utf-8").split("\n## ")[1:3]
)


def test_every_recipe_is_named_for_a_need_and_has_its_cost():
    names = [path.name for path in RECIPES]
    for section in (NEEDS, COSTS):
        assert sorted(re.findall(r"\]\((\w+\.yaml)\)", section)) == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_cost_of_a_recipe_says_how_much_it_learns(path):
    train = load_recipe(path).train
    parts = []
    for stage in train.stages:
        own = getattr(train, stage, None)
        steps, size = (own.steps, own.batch_size) if own else (train.max_steps, train.batch_size)
        parts.append(f"{stage} {steps} × {size}")
    learns = re.search(rf"^\| \[`{path.stem}`\].*? \| (.*?) \|", COSTS, re.M)
    assert learns
    assert learns[1] == (", ".join(parts) or "nothing")


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_cost_of_a_recipe_is_that_of_its_shapes(path):
    recipe = load_recipe(path)
    model, _ = shapes_of(recipe, load_base_config(recipe.base.model))
    told = describe(model).replace(",", "")
    bank = re.search(r"in the bank: (\d+); parameters that train: (\d+)", told)
    if bank is not None:
        adds = [numbers(int(bank[2]))] * (bank[2] != "0") + [numbers(int(bank[1])) + " in a bank"]
    else:
        added = re.search(r"(?:added parameters|parameters added): (\d+)", told)
        assert added
        adds = [numbers(int(added[1]))] + ["LoRA"] * (recipe.train.trainable == "memory+lora")
    most = re.search(r"it is (at most \S+ \S+)", told)
    cache = most or re.search(r"\b32k +\S+ \S+ +(\S+ \S+)", told)
    row = re.search(rf"^\| \[`{path.stem}`\].*? \| .*? \| (.*?) \| (.*?) \|", COSTS, re.M)
    assert row
    assert row.groups() == (" and ".join(adds), cache[1] if cache else "the base's")


def numbers(count: int) -> str:
    return f"{count / 1e6:.3f}M" if count >= 1000 else f"{count} numbers" if count else "0"


def test_the_recipes_and_overrides_of_the_page_validate(tmp_path, monkeypatch):
    page = (ROOT / "recipes" / "README.md").read_text("utf-8")
    own = ROOT / "recipes" / "_base.yaml"
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", page, re.S)):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text.replace("_base.yaml", str(own)))
        assert load_recipe(path).method is not None
    monkeypatch.chdir(ROOT)
    lines = re.findall(r"^memretrofit train (.*?)(?:#.*)?$", page, re.M)
    assert lines
    for line in lines:
        words = TRAIN.make_context("train", shlex.split(line)).params
        load_recipe(words["recipe"], words["overrides"] or [])
