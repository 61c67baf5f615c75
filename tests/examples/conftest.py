"""Load an example as Python does when it runs the script: its folder first on sys.path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import an example by its name, with the repository's root as the folder."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        for script in EXAMPLES.glob("*.py"):
            monkeypatch.delitem(sys.modules, script.stem, raising=False)
        return importlib.import_module(name)

    return load
