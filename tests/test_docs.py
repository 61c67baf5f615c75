"""Pages name tests, files, links and commands that exist."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import launch.command
from common.config import parse_command_line
from experiments import plan_table
from experiments.runner import with_section
from launch.reporting import config_reference
from tests.documented import COMMANDS, MARKS, PAGES, ROOT, Command

WITH_CONFIG = [command for command in COMMANDS if "--config" in command.program]
OTHERS = [
    command
    for command in COMMANDS
    if command.program[1:] and "--config" not in command.program
]


def defined() -> set[str]:
    return {
        name
        for path in (ROOT / "tests").rglob("*.py")
        for name in re.findall(r"def (test_\w+)", path.read_text())
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_existing_tests(page: Path) -> None:
    named = set(
        re.findall(r"`(?:[\w/]+\.py::)?(test_\w+)`", page.read_text(encoding="utf-8"))
    )
    assert named - defined() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_names_existing_files(page: Path) -> None:
    rooms = "common|rm|generator|engine|alignment|launch|toy|experiments|examples"
    rooms += "|configs|tests"
    pattern = rf"(?<![\w/])((?:{rooms})/[\w/]+\.(?:py|ipynb|yaml))\b"
    named = set(re.findall(pattern, page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_links_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [
        link
        for link in links
        if "://" not in link and not (page.parent / link).exists()
    ] == []


def module_of(script: str) -> str:
    return ".".join(Path(script).with_suffix("").parts)


def name(command: Command) -> str:
    return f"{command.place} {command.program[0]}"


@pytest.mark.parametrize("command", WITH_CONFIG, ids=name)
def test_page_command_with_config_parses(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Programs, options, files and keys; tests/test_documented_commands.py goes on from there."""
    (tmp_path / "my_reward.py").write_text("")  # the page shows it
    words = [
        word.replace("=my_reward.py", f"={tmp_path / 'my_reward.py'}")
        for word in command.program
    ]
    seen = []

    def stop_there(*args: Any, **options: Any) -> None:
        seen.append(parse_command_line(*args, **options))
        raise ParsedError

    program = importlib.import_module(module_of(words[0]))
    monkeypatch.setattr(launch.command, "parse_command_line", stop_there)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ParsedError):
        program.main()
    assert len(seen) == 1


@pytest.mark.parametrize("command", OTHERS, ids=name)
def test_page_command_without_config_parses(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that take no config, up to where their arguments are known."""
    words = command.program
    real = argparse.ArgumentParser.parse_args

    def stop_there(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        real(parser, *args, **options)
        raise ParsedError

    program = importlib.import_module(module_of(words[0]))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_there)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ParsedError):
        program.main()


class ParsedError(Exception):
    """The command line was read."""


def test_pages_have_commands() -> None:
    assert len(WITH_CONFIG) > 20
    assert {command.program[0] for command in OTHERS} >= {
        "launch/export.py",
        "launch/convert_descore.py",
    }
    pages = {command.place.split(":")[0] for command in WITH_CONFIG}
    assert pages >= {"README.md", "reproduce-wan21.md", "vbench.md"}


def test_pages_use_known_marks_and_make_targets() -> None:
    assert {mark for command in COMMANDS for mark in command.marks} <= MARKS
    targets = set(
        re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    )
    pages = "".join(
        page.read_text(encoding="utf-8") for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
    )
    named = set(re.findall(r"(?:`|^)make ([\w-]+)", pages, re.M))
    assert named >= {"demo", "test", "fullsize", "check"}
    assert named - targets == set()


def test_readme_plan_table_equals_results() -> None:
    page = (ROOT / "docs/results/plans.md").read_text(encoding="utf-8")
    table = [line for line in page.splitlines() if "|" in line]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = plan_table.without_variants(table)
    assert with_section(text, "plans", lines) == text
    assert "Longcat-GRPO" in text


def test_reliability_rows_each_name_a_test() -> None:
    rows = re.findall(
        r"^\| (\d+) \|(.*)\|$",
        (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert [int(number) for number, _ in rows] == list(range(1, len(rows) + 1))
    assert len(rows) >= 36
    assert all("`test_" in text for _, text in rows)


def test_config_reference_equals_schemas() -> None:
    assert (ROOT / "docs" / "configs.md").read_text(
        encoding="utf-8"
    ) == config_reference.page()


def test_config_reference_shows_types_limits_and_defaults() -> None:
    text = config_reference.page()
    # `group_size` of GRPO is at least 2, and Flow-DPO has its own learning rate.
    assert re.search(r"`group_size` \| int.*2.* \| `4`", text)
    assert "`lr=5e-06`" in text
    assert "[GeneratorConfig](#generatorconfig)" in text
    assert "`alignment/config.py`" in text


def test_config_reference_starts_with_ten_keys() -> None:
    """Their types and defaults are those of the schemas: 4 videos in a group, 64 prompts a step."""
    head, _, _ = config_reference.page().partition("## The commands")
    rows = re.findall(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \|", head, re.M)
    assert len(rows) == 10
    given = {key: (kind, default) for key, kind, default in rows}
    assert given["grpo.group_size"] == ("int, at least 2", "`4`")
    assert given["prompts_per_step"] == ("int, above 0", "`64`")
    assert given["rewards.NAME.weight"][1] == "`1.0`"
    assert given["generator.path"][1] == "required"
