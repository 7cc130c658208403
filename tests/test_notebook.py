"""docs/memretrofit.ipynb: its cells run in order, and print what is stored beside them."""

from __future__ import annotations

import json
import re
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from memretrofit.errors import ConfigError

CELLS = json.loads(
    (Path(__file__).parent.parent / "docs" / "memretrofit.ipynb").read_text(encoding="utf-8")
)["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def printed(cell: dict) -> str:
    return "".join(text for output in cell["outputs"] for text in output["text"])


def without_numbers(text: str) -> list[str]:
    """Bytes, losses, times and rules under tables differ between machines."""
    return re.sub(r"[-+]?[\d.,:]*\d|[─━]+| +", " ", text).split()


def test_the_cells_run_in_order_and_print_what_is_stored(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names: dict = {"__name__": "__main__"}
    for cell in CODE:
        out = StringIO()
        with redirect_stdout(out):
            exec("".join(cell["source"]), names)
        assert without_numbers(out.getvalue()) == without_numbers(printed(cell))
    publishing = "".join(CODE[-1]["source"])
    assert "repository = None" in publishing
    with pytest.raises(ConfigError, match=r"the folder .* others do not have"):
        exec(publishing.replace("repository = None", 'repository = "owner/name"'), names)


def test_outputs_are_of_one_run_and_name_no_machine():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    assert any(map(printed, CODE))
    for cell in CELLS:
        assert not re.search(r"/(tmp|home|root|Users)/", "".join(cell["source"]))
        assert "/tmp/" not in (printed(cell) if cell in CODE else "")
