"""A command without arguments names its recipes; its help ends with examples."""

from __future__ import annotations

import importlib
import re

import pytest

from common.config import load, recipes_of
from launch.schemas.pairs import DpoRun
from launch.schemas.training import GrpoRun
from tests.launch.processes import ROOT

# Every command with a config, and the recipe for Wan that must be among those it names.
WITH_CONFIG = {
    "check_rewards": "score",
    "cold_start": "cold_start",
    "dpo": "dpo",
    "dual_rl": "dual_rl",
    "evaluate generator": "evaluate",
    "evaluate rm": "evaluate_rm",
    "evaluate vbench": "evaluate_vbench",
    "grpo": "grpo",
    "pairs": "pairs",
    "sample": "sample",
    "sample vbench": "vbench",
    "score": "score",
    "serve": "serve",
}
OTHERS = ["calibrate", "convert_descore", "convert_reward", "export", "report"]


def exit_code(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> int | str | None:
    """Run a command in this process until it exits."""
    program, *kind = name.split()
    monkeypatch.setattr("sys.argv", [f"launch/{program}.py", *kind, *words])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"launch.{program}").main()
    return ended.value.code


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_command_without_arguments_names_its_recipes_and_how_to_start(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A launcher adds a word that is not the user's.
    assert exit_code(name, ["--local_rank=0"], monkeypatch) == 2
    line, *others = capsys.readouterr().err.splitlines()
    recipes = re.findall(r"configs/\S+?\.yaml", line)
    assert f"configs/wan/{WITH_CONFIG[name]}.yaml" in recipes
    assert all((ROOT / recipe).is_file() for recipe in recipes)
    # an example of the command, and its plan
    assert others[0] == "start it:"
    assert f"launch/{name.split()[0]}.py " in others[1]
    assert others[-2].startswith("see what it needs first")
    script = f"launch/{name.split()[0]}.py"
    assert others[-1].startswith(f"    python {script} ")
    assert others[-1].endswith(".yaml --dry-run 8xh100")


def test_plan_of_a_command_of_two_words_has_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code("evaluate generator", [], monkeypatch)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("    python launch/evaluate.py generator --config configs/")


@pytest.mark.parametrize("name", [*WITH_CONFIG, *OTHERS])
def test_help_ends_with_an_example_of_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(name, ["--help"], monkeypatch) == 0
    _, examples = capsys.readouterr().out.split("\nexamples:\n")
    assert f"launch/{name.split()[0]}.py " in examples
    assert all(line.startswith("    ") for line in examples.splitlines())


def test_overrides_without_a_recipe_keep_their_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("grpo", ["stpes=3"], monkeypatch) == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert "configs/wan/grpo.yaml" in first
    assert any("stpes" in line for line in others)


def test_recipes_of_leaves_out_parts_and_other_commands() -> None:
    recipes = recipes_of(GrpoRun)
    assert "configs/shapes/grpo_oracle.yaml" in recipes
    assert not [name for name in recipes if "sisters" in name or "dpo" in name]
    for name in recipes_of(DpoRun):
        assert isinstance(load(DpoRun, ROOT / name), DpoRun)
