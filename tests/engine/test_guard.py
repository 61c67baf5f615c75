"""Run lock, graceful stop and watchdog of a training run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from common.log import RunLog, read_metrics
from engine.config import TrainingRun
from engine.guard import STUCK, Guard
from engine.trainer import StepClock
from tests.launch.processes import BIN, ROOT, run

SCRIPT = str(ROOT / "launch" / "grpo.py")


def test_guard_of_a_locked_folder_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with Guard(tmp_path / "run", watchdog_s=0):
        with (
            pytest.raises(SystemExit, match="2"),
            Guard(tmp_path / "run", watchdog_s=0),
        ):
            pytest.fail("the guard let a second run in")
        assert f'"process": {os.getpid()}' in capsys.readouterr().err
        with Guard(tmp_path / "other", watchdog_s=0):
            pass
    with Guard(tmp_path / "run", watchdog_s=0):
        pass


def test_guard_of_a_folder_of_another_kind_exits_2(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with Guard(tmp_path, kind="ColdStartRun", watchdog_s=0):
        pass  # which never began
    with Guard(tmp_path, kind="GrpoRun", watchdog_s=0):
        (tmp_path / "config.yaml").touch()
    with (
        pytest.raises(SystemExit, match="2"),
        Guard(tmp_path, kind="DpoRun", watchdog_s=0),
    ):
        pytest.fail("the guard let a second run in")
    assert "GrpoRun" in capsys.readouterr().err
    with Guard(tmp_path, kind="GrpoRun", watchdog_s=0):
        pass
    (tmp_path / "lock.json").write_text("half a li")
    with Guard(tmp_path, kind="DpoRun", watchdog_s=0):
        pass


def test_guard_of_an_impossible_folder_exits_2(capsys: pytest.CaptureFixture) -> None:
    with (
        pytest.raises(SystemExit, match="2"),
        Guard(Path("/proc/nowhere"), watchdog_s=0),
    ):
        pytest.fail("the guard let a second run in")
    assert "run_dir=/proc/nowhere:" in capsys.readouterr().err


def test_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    program = "import os, pathlib, sys; from engine.guard import Guard\n"
    program += (
        "with Guard(pathlib.Path(sys.argv[1]), watchdog_s=0): os.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, check=False
    )
    assert (tmp_path / "lock.json").exists()
    with Guard(tmp_path, watchdog_s=0):
        pass


def test_signal_is_noted_and_is_the_exit_code(tmp_path: Path) -> None:
    with Guard(tmp_path, watchdog_s=0) as guard:
        assert not guard.step_done()
        os.kill(os.getpid(), signal.SIGTERM)
        assert guard.step_done()
        # Sent together with the first, by a script and its shell for example.
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit, match="143"):
            guard.leave(RunLog(tmp_path), 3)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


GUARDED = """
import os, pathlib, sys, time
from engine.guard import Guard
with Guard(pathlib.Path(sys.argv[1]), watchdog_s=0) as guard:
    {begin}
    for number in sys.argv[2:]:
        os.kill(os.getpid(), int(number))
        time.sleep(0.7)
    sys.exit(guard.step_done(5) + 10)
"""


def exit_of(folder: Path, begin: str, *numbers: int) -> tuple[int, str]:
    words = [sys.executable, "-c", GUARDED.format(begin=begin), str(folder)]
    done = subprocess.run(
        [*words, *(str(int(number)) for number in numbers)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_before_begin_kills_the_process(
    number: signal.Signals, tmp_path: Path
) -> None:
    assert exit_of(tmp_path, "pass", number) == (-number, "")


@pytest.mark.slow
def test_second_signal_ends_the_process_and_says_what_is_saved(tmp_path: Path) -> None:
    begin = "guard.begin(3); guard.step_done(5)"
    code, printed = exit_of(tmp_path, begin, signal.SIGHUP, signal.SIGINT)
    assert code == 128 + signal.SIGINT
    assert "3 steps are saved, the last 2 are lost" in printed
    begin += "; guard.saved(5)"
    code, printed = exit_of(tmp_path, begin, signal.SIGTERM, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert "all 5 finished steps are saved" in printed


@pytest.mark.slow
def test_repeated_sighup_is_a_single_request(tmp_path: Path) -> None:
    """A closing terminal sends it, and so does its shell."""
    code, printed = exit_of(tmp_path, "guard.begin()", signal.SIGHUP, signal.SIGHUP)
    assert code == 11
    assert printed.count("SIGHUP") == 1


def test_ignored_sighup_stays_ignored(tmp_path: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Guard(tmp_path, watchdog_s=0) as guard:
            guard.begin()
            os.kill(os.getpid(), signal.SIGHUP)
            assert not guard.step_done()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
def test_sigterm_ends_the_wait_for_a_reward_server(tiny: Path, tmp_path: Path) -> None:
    words = [
        "--config",
        str(tiny),
        f"run_dir={tmp_path / 'run'}",
        "rewards.far.url=http://127.0.0.1:9",
    ]
    process = started(1, *words)
    for line in process.stdout:
        if "http://127.0.0.1:9" in line and "60" in line:
            break
    os.kill(process.pid, signal.SIGTERM)
    rest, _ = process.communicate(timeout=5)
    assert process.returncode == -signal.SIGTERM
    assert "SIGTERM" not in rest


def started(ranks: int, *words: str) -> subprocess.Popen[str]:
    """launch/grpo.py under torchrun, or alone."""
    launcher = (
        [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
        if ranks > 1
        else [sys.executable]
    )
    return subprocess.Popen(
        [*launcher, SCRIPT, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(path: Path, lines: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or len(read_metrics(path)) < lines:
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def ranks_of(folder: Path) -> list[psutil.Process]:
    """The ranks themselves, which have left the launcher: neither their relays nor keepers."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        in_run = SCRIPT in words and f"run_dir={folder}" in words
        if in_run and process.environ().get("RANK") and not process.children():
            # The parent of a relay is the launcher, with other words.
            keeper = process.parent()
            if keeper is not None and keeper.cmdline() == words:
                found.append(process)
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "victim"), [(1, "itself"), (2, "rank 1"), (2, "launcher")]
)
def test_sigterm_saves_and_the_run_resumes(
    ranks: int, victim: str, tiny: Path, tmp_path: Path
) -> None:
    """save_every is out of reach, so only the signal can have saved."""
    words = [
        "--config",
        str(tiny),
        f"run_dir={tmp_path / 'run'}",
        "save_every=900",
        "self_checks=false",
    ]
    process = started(ranks, *words, "steps=400")
    wait_for(tmp_path / "run" / "metrics.jsonl", 2)
    target = process.pid if victim != "rank 1" else ranks_of(tmp_path / "run")[1].pid
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(target, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    if ranks == 1:
        assert process.returncode == 128 + signal.SIGTERM
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "SIGTERM:" in out
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [
        f"step-{len(rows):06d}"
    ]
    assert not any(
        child.is_running() and child.status() != psutil.STATUS_ZOMBIE
        for child in children
    )
    assert ranks == 1 or ranks_of(tmp_path / "run") == []
    if victim == "itself":
        done = run(sys.executable, SCRIPT, *words, f"steps={len(rows) + 1}")
        assert f"after {len(rows)} " in done.stdout


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_hanging_or_killed_rank_ends_all_ranks(
    how: signal.Signals, tiny: Path, tmp_path: Path
) -> None:
    words = [
        "--config",
        str(tiny),
        f"run_dir={tmp_path / 'run'}",
        "self_checks=false",
        "watchdog_s=6",
        "steps=400",
    ]
    process = started(2, *words)
    wait_for(tmp_path / "run" / "metrics.jsonl", 2)
    children = ranks_of(tmp_path / "run")
    os.kill(children[1].pid, how)
    out, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    if how == signal.SIGSTOP:
        assert "rank 0:" in out
        assert re.search(rf"exitcode\s*: {STUCK}\b", out)
        assert (
            "distributed_c10d.py"
            in (tmp_path / "run" / "stacks-rank-0.txt").read_text()
        )
    _, alive = psutil.wait_procs(children, timeout=40)
    assert not alive


@pytest.mark.parametrize(
    ("left", "step_s", "stops"),
    [(3600, 10, False), (16, 10, False), (14, 10, True), (-5, 0, True)],
)
def test_run_stops_when_fewer_than_one_and_a_half_steps_are_left(
    left: float,
    step_s: float,
    stops: bool,  # noqa: FBT001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(1000 + left)))
    monkeypatch.setattr("engine.guard.time.time", lambda: 1000.0)
    with Guard(tmp_path, watchdog_s=0) as guard:
        assert guard.step_done(3, step_s) == stops
        if stops:
            with pytest.raises(SystemExit, match="138"):
                guard.leave(RunLog(tmp_path), 3)


@pytest.mark.parametrize("end", ["", "Unknown", "0"])
def test_job_without_an_end_is_never_stopped(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", end)
    with Guard(tmp_path, watchdog_s=0) as guard:
        assert not guard.step_done(3, 1e9)


def test_clock_saves_by_minutes_and_measures_the_longest_of_the_last_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("engine.trainer.time.monotonic", lambda: now[0])
    clock = StepClock(TrainingRun(run_dir="run", save_minutes=2))
    seconds = []
    due = []
    for step_s in (50, 10, 70, 10, 10, 10, 10, 10):
        now[0] += step_s
        seconds.append(clock.step_done())
        due.append(clock.save_is_due())
        if due[-1]:
            clock.saved()
    assert seconds == [50, 50, 70, 70, 70, 70, 70, 10]
    # 130 s are the first that are more than 2 minutes.
    assert due == [False, False, True, False, False, False, False, False]
    never = StepClock(TrainingRun(run_dir="run", save_minutes=0))
    now[0] += 1e6
    assert not never.save_is_due()
