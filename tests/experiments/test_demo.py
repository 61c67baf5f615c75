"""`make demo` from end to end: its own steps through its own entry points, each with less to do."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from experiments import demo

LESS = {
    "toy/make_pairs.py": ["--pairs", "train=32", "heldout=16"],
    "launch/cold_start.py": ["cold_start.epochs=1", "heldout_pairs=8"],
    "launch/grpo.py": ["steps=1", "prompts_per_step=2"],
    "launch/pairs.py": ["limit=6", "pairs.min_margin=0"],
    "launch/dpo.py": ["dpo.epochs=1", "dpo.pairs_per_step=2", "dpo.micro_batch=1"],
}


def less(script: str, words: list[str]) -> list[str]:
    """The last of two values of a key counts."""
    if script == "launch/evaluate.py":
        return [*words, "limit=8"]
    if script == "launch/check_rewards.py":
        return [*words, "--limit", "8"]
    return [*words, *LESS[script]]


@pytest.mark.long
def test_demo_runs_all_steps_and_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = demo.plan

    def shorter(run: Path, seed: int) -> list[demo.CommandStep]:
        return [
            dataclasses.replace(step, arguments=less(step.script, step.arguments))
            for step in whole(run, seed)
        ]

    monkeypatch.setattr(demo, "plan", shorter)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--run-dir", str(tmp_path)])
    demo.main()
    summary = json.loads((tmp_path / "summary.json").read_text())
    for name in (
        "heldout_accuracy",
        "base_stated_score",
        "gain_over_base",
        "best_possible",
    ):
        assert summary["rm"][name]["n"] > 0
    assert summary["checks"]["noise"]["fell"] >= 0
    for reward in ("utility", "oracle", "descore"):
        assert {name: one["n"] for name, one in summary[reward].items()} == {
            "base": 8,
            "tuned": 8,
            "dpo": 8,
        }
    assert (
        len({one["mean"] for one in summary["utility"].values()}) == 3
    )  # both runs moved the generator
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("data:video/mp4") > 3
    assert "DeScore, stage 1: cold start" in capfd.readouterr().out

    demo.main()
    again = capfd.readouterr().out
    assert again.count("done before") == len(whole(tmp_path, 0))
    assert "$ " not in again


def test_seconds_left_follow_the_pace_of_the_steps_that_are_done() -> None:
    """Twice as slow so far: the rest, usually 30 s and 20 s, takes 100 s."""
    usual = {"1 a": 10.0, "2 b": 40.0, "3 c": 30.0, "4 d": 20.0, "all": 100.0}
    names = ["1 a", "2 b", "3 c", "4 d"]
    done = {"1 a": 30.0, "2 b": 70.0}
    assert demo.seconds_left(done, usual, names) == pytest.approx(100.0)


def test_seconds_left_are_unknown_for_steps_that_were_never_measured() -> None:
    assert demo.seconds_left({"1 a": 1.0}, {"1 a": 1.0}, ["1 a", "2 new"]) is None
    assert demo.seconds_left({}, {"1 a": 1.0}, ["1 a"]) is None
