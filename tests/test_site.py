"""The documentation as a site: its navigation, the pages made from other files, the build."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.documented import ROOT

DOCS = ROOT / "docs"
MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"


def module(name: str) -> ModuleType:
    """Load a file of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def pages_in(nav: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    inside = nav.values() if isinstance(nav, dict) else nav
    return [page for part in inside for page in pages_in(part)]


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = pages_in(config["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    made = set(module("site_pages").generated_pages())
    assert written & made == set()
    assert sorted(listed) == sorted(written | made)


def test_links_of_the_root_lead_to_pages() -> None:
    moved = module("site_pages").moved_links
    text = "[a](docs/runs.md#scoring) [b](CHANGELOG.md) [c](../CONTRIBUTING.md)"
    want = "[a](runs.md#scoring) [b](changes.md) [c](contributing.md)"
    assert moved(text) == want
    assert moved('<img src="docs/films/a.webp">') == '<img src="films/a.webp">'
    assert moved('<source srcset="docs/a.webp">') == '<source srcset="a.webp">'
    assert moved("[d](results/README.md)") == "[d](results/README.md)"


def test_links_of_generated_pages_exist() -> None:
    pages = module("site_pages").generated_pages()
    for name, text in pages.items():
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in link:
                assert link in pages or (DOCS / link).is_file(), f"{name}: {link}"


def test_every_module_of_the_library_has_an_api_entry() -> None:
    pages = module("site_pages").generated_pages()
    assert "::: alignment.grpo\n" in pages["api/alignment.md"]
    assert "::: rm.baselines.qwen2_vl\n" in pages["api/rm.md"]
    for package in ("rm", "alignment", "generator", "engine", "common"):
        modules = set((ROOT / package).rglob("*.py"))
        modules -= set((ROOT / package).rglob("__init__.py"))
        assert pages[f"api/{package}.md"].count("::: ") == len(modules)


def test_docstrings_keep_columns_and_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns and equations become blocks; brackets and stars are no links and no emphasis."""
    griffe = types.SimpleNamespace(Extension=object, Object=object)
    monkeypatch.setitem(sys.modules, "griffe", griffe)
    markdown_of = module("site_docstrings").markdown_of
    text = """Rewards (B,) of [prompt][cot], B = P * G.

        mean = x - v

    name   of a `list[int]`
    other  of it"""
    assert markdown_of(text) == (
        "Rewards (B,) of \\[prompt\\]\\[cot\\], B = P \\* G.\n\n"
        "```text\n    mean = x - v\n```\n\n"
        "```text\nname   of a `list[int]`\nother  of it\n```"
    )
    assert markdown_of("A `list[int]` [B]") == "A `list[int]` \\[B\\]"


def test_make_installs_the_extra_docs() -> None:
    """The Makefile cannot read setup.py, so the requirements stand in both."""
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    (extra,) = re.findall(r"^DOCS = \[(.+?)\]$", text, re.M | re.S)
    wanted = re.findall(r'"([^"]+)"', extra)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(
        r"^\t\.venv-docs/bin/python -m pip install (.+)$", makefile, re.M
    )
    assert re.findall(r'"([^"]+)"', line) == wanted
    assert len(wanted) == 4


@pytest.mark.long
@pytest.mark.skipif(not MKDOCS.is_file(), reason="`make docs` has not installed mkdocs")
def test_site_builds_without_a_warning_and_loads_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(MKDOCS), "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    page = html.unescape((tmp_path / "api/alignment.html").read_text(encoding="utf-8"))
    assert "The GRPO training loop." in page
    assert "flat_reward_patience  the run stops" in page
    assert (tmp_path / "results/index.html").is_file()
    for path in tmp_path.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(
            r"""<(?:script|img|link)[^>]+(?:src|href)="(https?:)""", text
        )
        assert loaded == [], path
