"""Pages that name a test, a file or a command name one that is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def defined() -> set[str]:
    return {name for path in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_it_names_exist(page: Path) -> None:
    named = set(re.findall(r"`(?:[\w/]+\.py::)?(test_\w+)`", page.read_text(encoding="utf-8")))
    assert named - defined() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_programs_and_configs_it_names_exist(page: Path) -> None:
    pattern = r"(?<![\w/])((?:launch|bench|configs)/[\w/]+\.(?:py|yaml))\b"
    named = set(re.findall(pattern, page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_fault_has_a_row_and_every_row_a_test() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"), re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 29))
    assert all("`test_" in text for _, text in rows)
