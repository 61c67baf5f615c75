"""The notebook examples/tour.ipynb holds the scripts, and its cells run one after the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.examples.conftest import EXAMPLES, ROOT

NOTEBOOK = EXAMPLES / "tour.ipynb"


def test_notebook_equals_the_scripts(example: Callable[[str], ModuleType]) -> None:
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert stored == example("make_notebook").notebook()


def test_notebook_is_of_jupyters_format() -> None:
    """What nbformat 4.5 requires of a cell: a unique id of letters, digits, - and _."""
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (stored["nbformat"], stored["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in stored["cells"]]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w-]{1,64}", name) for name in names)
    for cell in stored["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            wanted |= {"execution_count", "outputs"}
        assert set(cell) == wanted


@pytest.mark.long
def test_notebook_runs_from_the_first_cell_to_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            text = "".join(cell["source"]).replace("runs/examples", str(tmp_path))
            exec(compile(text, f"cell {cell['id']}", "exec"), names)
    assert len(names["means"]) == 10
    assert names["means"][-1] > names["means"][0]
    assert names["metrics"]["train/loss"] > 0
    assert "winner" in capsys.readouterr().out
