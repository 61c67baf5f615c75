"""Runs whose reward fails: the training so far is saved, and all ranks stop together."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from common.log import read_metrics
from tests.launch.processes import ROOT, deepspeed, run

SCRIPT = str(ROOT / "launch" / "grpo.py")
OWN = """
import os
from pathlib import Path

calls = 0
fails_at = int(os.environ.get("FAILS_AT", "3"))

def score(video, prompts):
    global calls
    calls += 1
    if calls == fails_at and os.environ.get("RANK", "0") == os.environ.get("FAILS_ON"):
        raise KeyError("its own mistake")
    return video.float().mean((1, 2, 3, 4)) / 255
"""


@pytest.fixture
def words(tiny: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "mine.py").write_text(OWN)
    plain = ["steps=4", "save_every=9", "video_every=0", "rewards.brightness.weight=0"]
    return [
        "--config",
        str(tiny),
        *plain,
        f"rewards.mine.target={tmp_path / 'mine.py'}:score",
    ]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_reward_that_raises_stops_all_ranks_with_a_checkpoint(
    ranks: int, words: list[str], tmp_path: Path
) -> None:
    """At the third step, on the last rank alone; then it goes on as if nothing had been."""

    def train(name: str, **how: object) -> tuple[str, str]:
        given = [SCRIPT, *words, "self_checks=false", f"run_dir={tmp_path / name}"]
        done = (
            run(sys.executable, *given, **how)
            if ranks == 1
            else deepspeed(ranks, *given, **how)
        )
        return done.stdout, done.stderr

    out, err = train("run", expect=1, FAILS_ON=str(ranks - 1))
    place = "on rank 1: " if ranks == 2 else ""
    assert f"{place}rewards.mine: KeyError" in out
    assert "raise KeyError" in err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [
        "step-000002"
    ]
    out, _ = train("run")
    assert "after 2 steps" in out
    train("straight")
    wanted, found = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "run")
    )
    for name in ("reward/mine", "train/loss", "train/grad_norm"):
        assert [row[name] for row in found] == [row[name] for row in wanted]


@pytest.mark.slow
def test_failed_self_check_exits_without_traceback_and_names_the_reward(
    words: list[str], tmp_path: Path
) -> None:
    """A reward that raises ValueError for frames of 16 pixels."""
    (tmp_path / "picky.py").write_text(
        "def score(video, prompts):\n"
        "    raise ValueError(f'needs 48 pixels, got {video.shape[2]}')\n"
    )
    target = f"rewards.sharp.target={tmp_path / 'picky.py'}:score"
    given = [*words, target, f"run_dir={tmp_path / 'run'}"]
    done = run(sys.executable, SCRIPT, *given, expect=2)
    assert "rewards.sharp" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_self_check_that_fails_on_a_single_rank_is_reported(
    words: list[str], tmp_path: Path
) -> None:
    """Rank 1 meets the error at its third call, and rank 0 reports it."""
    done = deepspeed(
        2, SCRIPT, *words, f"run_dir={tmp_path / 'run'}", expect=2, FAILS_ON="1"
    )
    assert "rank 1" in done.stderr
    assert "rewards.mine: KeyError" in done.stderr
    assert "raise KeyError" in done.stderr


@pytest.mark.long
def test_reward_that_raises_in_the_last_evaluation_loses_no_step(
    words: list[str], tmp_path: Path
) -> None:
    """Two held-out prompts are scored before the first step and after the last."""
    given = [
        SCRIPT,
        *words,
        "self_checks=false",
        "steps=1",
        f"run_dir={tmp_path / 'run'}",
    ]
    given += [
        f"evaluation.prompts={tmp_path / 'prompts.txt'}",
        "evaluation.every=1",
        "evaluation.limit=2",
    ]
    (tmp_path / "prompts.txt").write_text("rain\nsnow\n")
    calls = 1
    while "after 1 steps, which are saved: rewards.mine" not in (
        out := run(
            sys.executable,
            *given,
            "--resume",
            "none",
            expect=1,
            FAILS_ON="0",
            FAILS_AT=str(calls),
        ).stdout
    ):
        assert "first step" in out
        calls += 1
    assert not (tmp_path / "run" / "final").exists()
    assert "after 1 steps" in run(sys.executable, *given).stdout
    assert (tmp_path / "run" / "final").is_dir()
