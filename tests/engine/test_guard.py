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
from engine.guard import STUCK, Guard
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


def test_second_signal_kills_the_process(tmp_path: Path) -> None:
    with Guard(tmp_path, watchdog_s=0) as guard:
        assert not guard.step_done()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert guard.step_done()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        with pytest.raises(SystemExit, match="143"):
            guard.leave(RunLog(tmp_path), 3)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_signal_before_begin_kills_the_process(
    tmp_path: Path,
) -> None:
    """After `begin` a signal is noted, and a second `begin` changes nothing."""
    program = "import os, pathlib, sys; from engine.guard import Guard\n"
    program += "with Guard(pathlib.Path(sys.argv[1]), watchdog_s=0):\n"
    program += "    os.kill(os.getpid(), int(sys.argv[2]))"
    for number in (signal.SIGTERM, signal.SIGINT):
        words = [sys.executable, "-c", program, str(tmp_path), str(int(number))]
        done = subprocess.run(
            words, cwd=ROOT, check=False, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (-number, "")
    with Guard(tmp_path, watchdog_s=0) as guard:
        guard.begin()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        guard.begin()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert guard.step_done()


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


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return sorted(
        (p for p in found if SCRIPT in p.cmdline()),
        key=lambda p: int(p.environ()["RANK"]),
    )


@pytest.mark.slow
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
    target = process.pid if victim != "rank 1" else ranks_of(process)[1].pid
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
    children = ranks_of(process)
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
