"""A user's mistake before a run is a line and exit code 2, and changes no file."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.cli import command_parser, user_errors
from launch.command import read_command
from launch.schemas.training import GrpoRun
from tests.launch.processes import ROOT, run

GRPO = (
    "python",
    "launch/grpo.py",
    "--config",
    "configs/shapes/grpo_oracle.yaml",
    "prompts_per_step=2",
    "steps=1",
)


def lines(text: str) -> list[str]:
    """What a program itself says: not the launcher's libraries."""
    return [
        line
        for line in text.splitlines()
        if line.startswith(("grpo.py", "sample.py", "evaluate.py", "serve.py"))
    ]


def test_parser_shows_the_first_line_and_the_first_indented_lines() -> None:
    doc = "Do it.\n\n    python do.py \\\n        a\n    python do.py b\n\nMore.\n\n    no\n"
    text = command_parser(doc).format_help()
    assert "\nDo it.\n" in text
    assert text.endswith(
        "examples:\n    python do.py \\\n        a\n    python do.py b\n"
    )
    assert "examples" not in command_parser("Do it.").format_help()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generator.height=33"], "height must be a multiple of 8, got 33, try 32"),
        pytest.param(
            ["deepspeed.gradient_accumulation_steps=7"],
            "deepspeed.gradient_accumulation_steps follows from the batch",
            marks=pytest.mark.long,
        ),
        (["--resume", "nope"], "--resume nope: there is no such folder"),
        (
            [
                "rewards.oracle.target=null",
                "rewards.oracle.kind=descore",
                "rewards.oracle.checkpoint=assets/shapes/wan",
            ],
            "is not a DeScore checkpoint",
        ),
    ],
)
def test_invalid_start_exits_2(tmp_path: Path, words: list[str], said: str) -> None:
    done = run(*GRPO, f"run_dir={tmp_path / 'run'}", *words, expect=2)
    assert len(lines(done.stderr)) == 1
    assert said in lines(done.stderr)[0]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.long
def test_misfitting_resume_keeps_the_config(tmp_path: Path) -> None:
    folder = f"run_dir={tmp_path / 'run'}"
    run(*GRPO, folder, "self_checks=false", "evaluation=null")
    before = (tmp_path / "run" / "config.yaml").read_text()
    done = run(*GRPO, folder, "steps=2", "generator.lora.rank=4", expect=2)
    assert "lora_A" in lines(done.stderr)[0]
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    words = [
        "--config",
        "configs/shapes/sample.yaml",
        "limit=1",
        f"out={tmp_path / 'out'}",
        f"adapter={tmp_path}",
    ]
    said = lines(run("python", "launch/sample.py", *words, expect=2).stderr)[0]
    assert "pytorch_lora_weights.safetensors" in said


@pytest.mark.parametrize(
    ("path", "said"),
    [("", "run_dir must name a folder, got ''"), ("README.md", "is a file")],
)
def test_run_dir_that_is_a_file_exits_2(
    path: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="2"):
        read_command(GrpoRun, [*GRPO[2:], f"run_dir={path}"], description="x")
    assert said in capsys.readouterr().err


def test_only_user_errors_are_reported_without_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["launch/grpo.py"])
    with pytest.raises(SystemExit, match="2"), user_errors():
        raise ValueError("no such reward")
    with pytest.raises(SystemExit, match="2"), user_errors():
        raise FileNotFoundError(2, "No such file or directory", "judge")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit, match="2"), user_errors():
        raise FileNotFoundError("judge is not a checkpoint")
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "grpo.py: no such reward",
        "grpo.py: judge: No such file or directory",
        "grpo.py (rank 3): judge is not a checkpoint",
    ]
    with pytest.raises(RuntimeError), user_errors():
        raise RuntimeError("shapes differ")
    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError, match="reward"), user_errors():
        raise ValueError("no such reward")
