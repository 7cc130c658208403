"""The shape of the house: one direction of imports, small files, documented names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from memretrofit.data.sources import SOURCES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "memretrofit"
FILES = sorted(PACKAGE.rglob("*.py"))
CODE = [
    *FILES,
    *sorted((ROOT / "tests").rglob("*.py")),
    *sorted((ROOT / "scripts").glob("*.py")),
]
MOST_LINES = 400

# A file may import from its own row and the rows above it. A name is a file or a folder of ours.
ROWS = [
    {"errors", "files", "markdown"},
    {"config", "strict_yaml"},
    {"ops"},
    {"modules"},
    {"data"},
    {"patching"},
    {"methods"},
    {"recipe_source", "recipe_stages", "recipe"},
    {
        "retrofit",
        "description",
        "bank_description",
        "segment_description",
        "vocabulary_description",
    },
    {"hub", "card"},
    {"training", "evaluation"},
    {"cli"},
    {"__main__"},
]
TASKS = ("memretrofit", "evaluation", "tasks")
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}

# Named here with the reason, because the row alone would forbid it.
LAZY = {
    ("config", "methods"),  # MethodConfig.from_dict finds the class by the method's name
}


def parts(path: Path) -> tuple[str, ...]:
    """memretrofit/ops/delta.py -> ('memretrofit', 'ops', 'delta'); a package is its folder."""
    names = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return names[:-1] if names[-1] == "__init__" else names


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Absolute dotted names that a file imports, those inside functions too."""
    here = parts(path)
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from memretrofit import ops` imports the module ops.
            yield from ((f"{module}.{alias.name}", node) for alias in node.names)


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_dependencies_point_one_way(path: Path) -> None:
    here = parts(path)
    if here == ("memretrofit",):
        return  # the lazy exports; test_exports shows that importing it loads nothing
    own = here[1]
    assert own in RANK, f"{own} has no row in ROWS"
    for name, node in imports(path):
        head, *rest = name.split(".")
        if head != "memretrofit" or rest in ([], ["__version__"]) or (own, rest[0]) in LAZY:
            continue
        target = rest[0]
        where = f"{identify(path)}:{node.lineno} imports {name}"
        assert target in RANK, where
        assert RANK[target] <= RANK[own], where
        if own == target == "methods" and len(here) > 2:
            assert rest[1] == here[2], f"{where}: methods do not import each other"
        if len(here) > 3 and here[:3] == TASKS and rest[:2] == [*TASKS[1:]]:
            assert rest[2:3] == [here[3]], f"{where}: tasks do not import each other"


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_transformers_is_entered_at_one_place(path: Path) -> None:
    """ops, modules and data import none of it; only patching imports below its top level."""
    own = parts(path)[1:2]
    for name, node in imports(path):
        head, *rest = name.split(".")
        if head != "transformers":
            continue
        where = f"{identify(path)}:{node.lineno} imports {name}"
        assert own not in {("ops",), ("modules",), ("data",), ("config",), ("errors",)}, where
        # `from transformers import X` is ['X']; anything longer reaches into a module.
        assert own == ("patching",) or len(rest) <= 1, where


def test_the_direction_test_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in ops that imports hub, absolutely or relatively, inside a function too, is seen."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "memretrofit")
    path = tmp_path / "memretrofit" / "ops" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def f():\n    from ..hub import x\nfrom . import y\nimport transformers.utils\n"
    )
    found = {name for name, _ in imports(path)}
    assert found == {"memretrofit.hub.x", "memretrofit.ops.y", "transformers.utils"}


@pytest.mark.parametrize("path", CODE, ids=identify)
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES, f"{lines} lines: find the second idea in it and give it a file"
    assert "utils" not in path.stem, "name the file after what is in it"


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


@pytest.mark.parametrize("path", FILES, ids=identify)
def test_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    missing = [
        f"{node.name} (line {node.lineno})" for node in public(tree.body) if not docstring(node)
    ]
    assert docstring(tree), "the module has no docstring"
    assert not missing


def docstring(node: ast.Module | ast.FunctionDef | ast.ClassDef) -> str | None:
    # An @overload is documented by the function that follows.
    decorators = getattr(node, "decorator_list", [])
    if any(isinstance(item, ast.Name) and item.id == "overload" for item in decorators):
        return "overload"
    return ast.get_docstring(node)


def test_every_method_has_its_test() -> None:
    methods = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__"}
    tested = {
        path.stem.removeprefix("test_") for path in (ROOT / "tests/methods").glob("test_*.py")
    }
    assert methods
    assert methods <= tested, f"no tests/methods/test_<name>.py for {sorted(methods - tested)}"


def test_the_library_does_not_print() -> None:
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        prints = [
            node.lineno
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
        assert not prints, f"{identify(path)} prints at {prints}"


def pins(name: str) -> dict[str, str]:
    """Package -> version of a requirements file, markers dropped; for Python 3.11 and newer."""
    lines = (ROOT / "scripts" / name).read_text(encoding="utf-8").splitlines()
    wanted = [line.partition(";") for line in lines if line and not line.startswith("#")]
    return {
        pin.strip().partition("==")[0].lower(): pin.strip().partition("==")[2]
        for pin, _, marker in wanted
        if "<" not in marker
    }


def test_one_file_pins_what_the_two_commands_install() -> None:
    """Exact versions, no build and no path in them; torch is installed by the version they pin."""
    pinned = pins("constraints.txt")
    assert all(re.fullmatch(r"[\w.]+", version) for version in pinned.values())
    installed = (ROOT / "scripts" / "_env.sh").read_text(encoding="utf-8")
    assert f"torch=={pinned['torch']} " in installed


def test_the_two_commands_install_every_text_source() -> None:
    packages = {row.package for row in SOURCES.values() if row.package}
    installed = {f"{name}=={version}" for name, version in pins("data-packages.txt").items()}
    assert packages <= installed
