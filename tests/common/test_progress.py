"""Where a step is, and that it feeds the watchdog."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from common import progress
from engine.guard import STUCK
from tests.launch.processes import ROOT


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr("common.progress.time.monotonic", lambda: now[0])
    monkeypatch.setattr("common.progress._step", progress._Step())
    return now


def test_first_step_counts_what_is_done(clock: list[float]) -> None:
    assert progress.describe() == ""
    progress.begin_step(0, 6)
    assert progress.describe() == "step 1/6, 0:00"
    progress.enter("rollout")
    progress.tick()
    progress.tick()
    clock[0] += 65
    assert progress.describe() == "step 1/6, rollout 2, 1:05"
    assert progress.last_moved() == 1000.0


def test_plan_is_the_measure_of_the_first_step(clock: list[float]) -> None:
    progress.expect(7200)
    progress.begin_step(0, 6)
    assert progress.describe() == "step 1/6, 0:00 of about 2:00:00"


def test_later_step_is_compared_with_the_step_before(clock: list[float]) -> None:
    progress.begin_step(0, 6)
    for phase, ticks in (("rollout", 3), ("update", 1), ("rollout", 1)):
        progress.enter(phase)
        for _ in range(ticks):
            progress.tick()
    clock[0] += 600
    progress.begin_step(1, 6)
    progress.enter("rollout")
    progress.tick()
    clock[0] += 90
    assert progress.describe() == "step 2/6, rollout 1 of 4, 1:30 of about 10:00"
    for _ in range(4):
        progress.tick()
    clock[0] += 600
    assert progress.describe() == "step 2/6, rollout 5, 11:30"


@pytest.mark.slow
@pytest.mark.parametrize(("ticks", "code"), [("progress.tick()", 0), ("pass", STUCK)])
def test_watchdog_lets_a_long_step_go_on_and_ends_a_stuck_one(
    ticks: str, code: int, tmp_path: Path
) -> None:
    """A step of 3 s under a limit of 1 s."""
    program = (
        "import pathlib, sys, time\n"
        "from common import progress\n"
        "from engine.guard import Guard\n"
        "with Guard(pathlib.Path(sys.argv[1]), watchdog_s=1) as guard:\n"
        "    guard.step_done()\n"
        "    for _ in range(15):\n"
        "        time.sleep(0.2)\n"
        f"        {ticks}\n"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, check=False, capture_output=True)
    assert done.returncode == code
