"""Pages that name a test, a file or a command name one that is there."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from common.config import parse_command_line
from experiments import plan_table
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
def test_the_tests_it_names_exist(page: Path) -> None:
    named = set(
        re.findall(r"`(?:[\w/]+\.py::)?(test_\w+)`", page.read_text(encoding="utf-8"))
    )
    assert named - defined() == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_programs_and_configs_it_names_exist(page: Path) -> None:
    pattern = r"(?<![\w/])((?:launch|bench|configs)/[\w/]+\.(?:py|yaml))\b"
    named = set(re.findall(pattern, page.read_text(encoding="utf-8")))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [
        link
        for link in links
        if "://" not in link and not (page.parent / link).exists()
    ] == []


def name(command: Command) -> str:
    return f"{command.place} {command.program[0]}"


@pytest.mark.parametrize("command", WITH_CONFIG, ids=name)
def test_its_commands_are_what_the_programs_read(
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
        raise Understood

    program = importlib.import_module("launch." + Path(words[0]).stem)
    monkeypatch.setattr(program, "read_command", stop_there)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Understood):
        program.main()
    assert len(seen) == 1


@pytest.mark.parametrize("command", OTHERS, ids=name)
def test_the_options_of_its_other_commands_exist(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that take no config, up to where their arguments are known."""
    words = command.program
    real = argparse.ArgumentParser.parse_args

    def stop_there(parser: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        real(parser, *args, **options)
        raise Understood

    program = importlib.import_module("launch." + Path(words[0]).stem)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_there)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Understood):
        program.main()


class Understood(Exception):  # noqa: N818 - no error
    """The command line was read."""


def test_the_pages_have_commands() -> None:
    assert len(WITH_CONFIG) > 20
    assert {command.program[0] for command in OTHERS} >= {
        "launch/export.py",
        "launch/convert_descore.py",
    }
    pages = {command.place.split(":")[0] for command in WITH_CONFIG}
    assert pages >= {"README.md", "reproduce-wan21.md", "vbench.md"}


def test_every_mark_is_one_that_means_something_and_make_knows_its_targets() -> None:
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


def test_readmes_plans_are_those_of_the_results() -> None:
    rows = [
        line
        for line in (ROOT / "docs/results/plans.md")
        .read_text(encoding="utf-8")
        .splitlines()
        if "|" in line
    ]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert plan_table.with_table(text, rows[2:]) == text
    assert "| Longcat-GRPO |" in text
    assert "| the same" not in text


def test_every_fault_has_a_row_and_every_row_a_test() -> None:
    rows = re.findall(
        r"^\| (\d+) \|(.*)\|$",
        (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"),
        re.M,
    )
    assert [int(number) for number, _ in rows] == list(range(1, 29))
    assert all("`test_" in text for _, text in rows)


def test_the_reference_of_configs_is_that_of_the_schemas() -> None:
    assert (ROOT / "docs" / "configs.md").read_text(
        encoding="utf-8"
    ) == config_reference.page()


def test_the_reference_knows_defaults_types_and_sections() -> None:
    text = config_reference.page()
    assert "| `group_size` | int | `4` |" in text
    assert (
        '| `scale` | `"none"`, `"group"`, `"max_group"`, `"batch"` | `"max_group"` |'
        in text
    )
    assert "| `generator` | [GeneratorConfig](#generatorconfig) | required |" in text
    assert (
        "| `optimizer` | [OptimizerConfig](#optimizerconfig) | its own, `lr=5e-06` |"
        in text
    )  # Flow-DPO's
    assert (
        "| `rewards` | mapping of names to [RewardConfig](#rewardconfig) | required |"
        in text
    )
