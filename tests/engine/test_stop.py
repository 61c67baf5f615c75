"""A run under the deepspeed launcher loses no finished step, however it is stopped."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from common.log import read_metrics
from tests.launch import processes as program
from tests.launch.processes import BIN, ROOT, free_port

SCRIPT = str(ROOT / "launch" / "grpo.py")
REWARD = """
import time


class Sleeping:
    def score(self, video_BTYXC, prompts, *, fps):
        time.sleep({seconds})
        return [float(video.float().mean()) for video in video_BTYXC]
"""


class StartedRun:
    """launch/grpo.py on a reward that sleeps, under deepspeed or alone."""

    def __init__(self, folder: Path, config: Path, *, ranks: int, seconds: float):
        reward = folder / "sleeping.py"
        reward.write_text(REWARD.format(seconds=seconds))
        self.folder = folder / "run"
        self.log = folder / "log.txt"
        self.seconds = seconds
        launcher = [sys.executable]
        if ranks:
            launcher = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks)]
            launcher += ["--master_port", str(free_port())]
        words = [
            SCRIPT,
            "--config",
            str(config),
            f"run_dir={self.folder}",
            "rewards.brightness=null",
            f"rewards.slow.target={reward}:Sleeping",
            "steps=400",
            "save_every=900",
            "self_checks=false",
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*launcher, *words],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=heed_signals,
            )

    def family(self) -> list[psutil.Process]:
        """All processes of the run, also those that have left the launcher."""
        word = f"run_dir={self.folder}"
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if word in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def launcher(self) -> psutil.Process:
        """deepspeed.launcher.launch, which `self.process` has started."""
        return psutil.Process(self.process.pid).children()[0]

    def rows(self) -> int:
        path = self.folder / "metrics.jsonl"
        return len(read_metrics(path)) if path.exists() else 0

    def wait_for_rows(self, count: int) -> None:
        def enough() -> bool:
            assert self.process.poll() is None, self.text()[-3000:]
            return self.rows() >= count

        self.wait_until(enough, 120 + count * self.seconds)

    def wait_until_gone(self, timeout: float) -> None:
        self.wait_until(lambda: not self.family(), timeout)
        self.process.wait(timeout=5)

    def wait_until(self, condition, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            assert time.monotonic() < deadline, self.text()[-3000:]
            time.sleep(0.1)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def checkpoints(self) -> list[str]:
        folder = self.folder / "checkpoints"
        return sorted(path.name for path in folder.glob("*")) if folder.exists() else []

    def kill(self) -> None:
        for process in self.family():
            process.kill()
        self.process.wait(timeout=20)


def heed_signals() -> None:
    """Reset the signals that a test in the background ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def started(tiny: Path, tmp_path: Path) -> Iterator[object]:
    runs = []

    def start(*, ranks: int, seconds: float) -> StartedRun:
        runs.append(StartedRun(tmp_path, tiny, ranks=ranks, seconds=seconds))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()


def send(run: StartedRun, how: str) -> None:
    kind, _, target = how.partition(" to ")
    number = signal.Signals[kind]
    if target == "the group":
        os.killpg(run.process.pid, number)
    elif target == "deepspeed":
        os.kill(run.process.pid, number)
    else:
        run.launcher().send_signal(number)


def check_nothing_is_lost(run: StartedRun, how: str) -> None:
    # In the middle of a step.
    time.sleep(run.seconds / 3)
    before = run.rows()
    send(run, how)
    run.wait_until_gone(run.seconds + 60)
    rows = run.rows()
    assert before <= rows <= before + 1
    assert run.checkpoints() == [f"step-{rows:06d}"]
    # A single promise, and its fulfilment.
    assert len(re.findall(r"is finished and saved", run.text())) == 1
    assert f"stopped after {rows} steps, which are saved" in run.text()
    # deepspeed ends with 0 when its own deepspeed.launcher.launch was killed.
    assert run.process.returncode or how == "SIGKILL to the launcher"
    assert not (run.folder / "final").exists()


HOWS = [
    "SIGINT to the group",
    "SIGTERM to deepspeed",
    "SIGHUP to the group",
    "SIGKILL to deepspeed",
    "SIGINT to deepspeed",
    "SIGTERM to the group",
    "SIGTERM to the launcher",
    "SIGKILL to the launcher",
]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, marks=pytest.mark.slow if i < 1 else pytest.mark.long)
        for i, how in enumerate(HOWS)
    ],
)
def test_stopped_launcher_loses_no_finished_step(how: str, started) -> None:
    ranks = 1 + HOWS.index(how) % 2
    run = started(ranks=ranks, seconds=3.0)
    run.wait_for_rows(1)
    check_nothing_is_lost(run, how)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "how", ["SIGINT to the group", "SIGTERM to deepspeed", "SIGHUP to the group"]
)
def test_step_longer_than_the_launcher_waits_is_finished(
    how: str, ranks: int, started
) -> None:
    """DeepSpeed's launcher kills its children 30 seconds after the signal."""
    run = started(ranks=ranks, seconds=60.0)
    run.wait_for_rows(1)
    check_nothing_is_lost(run, how)


@pytest.mark.long
def test_killed_relays_lose_no_finished_step(started) -> None:
    """As the launcher does in the end: the ranks have left its tree of processes."""
    run = started(ranks=2, seconds=3.0)
    run.wait_for_rows(1)
    before = run.rows()
    for child in run.launcher().children(recursive=True):
        child.kill()
    run.wait_until_gone(60)
    assert run.rows() >= before
    assert run.checkpoints() == [f"step-{run.rows():06d}"]


@pytest.mark.long
def test_second_signal_ends_the_ranks_and_names_the_loss(started) -> None:
    run = started(ranks=2, seconds=20.0)
    run.wait_for_rows(1)
    send(run, "SIGINT to the group")
    run.wait_until(lambda: "immediately" in run.text(), 3)
    rank_0 = int(re.search(r"kill (\d+) ends it", run.text())[1])
    time.sleep(0.6)
    os.kill(rank_0, signal.SIGTERM)
    # The launcher and the other relay look about once a second.
    run.wait_until_gone(15)
    assert run.checkpoints() == []
    assert "the last 1 are lost" in run.text()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, marks=pytest.mark.long),
    ],
)
def test_signal_to_a_single_process_is_its_exit_code(
    number: signal.Signals, started
) -> None:
    run = started(ranks=0, seconds=2.0)
    run.wait_for_rows(1)
    run.process.send_signal(number)
    run.wait_until_gone(60)
    assert run.process.returncode == 128 + number
    assert run.checkpoints() == [f"step-{run.rows():06d}"]


@pytest.mark.long
def test_second_signal_ends_a_single_process(started) -> None:
    run = started(ranks=0, seconds=20.0)
    run.wait_for_rows(1)
    run.process.send_signal(signal.SIGINT)
    run.wait_until(lambda: "second signal" in run.text(), 3)
    time.sleep(0.6)
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(timeout=3) == 128 + signal.SIGINT
    assert "1 are lost" in run.text()


@pytest.mark.long
def test_failed_rank_ends_the_others(started) -> None:
    run = started(ranks=2, seconds=1.0)
    run.wait_for_rows(1)
    ranks = [p for p in run.family() if os.getsid(p.pid) != run.process.pid]
    leaves = [p for p in ranks if not p.children()]
    assert len(leaves) == 2
    leaves[0].kill()
    run.wait_until_gone(60)
    assert run.process.returncode != 0


@pytest.mark.long
def test_resume_none_killed_before_its_first_save_starts_anew(
    tiny: Path, tmp_path: Path
) -> None:
    words = [sys.executable, SCRIPT, "--config", str(tiny), "self_checks=false"]
    words += [f"run_dir={tmp_path / 'run'}", "video_every=0", "steps=3"]
    program.run(*words)
    # The new history is killed in its second step, and has saved nothing.
    new = [*words, "seed=7", "save_every=1000"]
    program.run(*new, "--resume", "none", expect=-signal.SIGKILL, FAULT="step:2")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name[:10] for path in checkpoints.iterdir()} == {"aside-step"}
    done = program.run(*new)
    assert "going on after" not in done.stdout
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [path.name for path in checkpoints.iterdir()] == ["step-000003"]


FULL_DISK = """
import os
import resource


class Filling:
    calls = 0

    def score(self, video_BTYXC, prompts, *, fps):
        Filling.calls += 1
        # The third line of metrics.jsonl is cut, as on a disk that is full.
        if Filling.calls == 3:
            size = os.path.getsize({metrics!r})
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 9, size + 9))
        return [float(video.float().mean()) for video in video_BTYXC]
"""


@pytest.mark.slow
def test_disk_that_fills_up_between_saves_ends_the_run(
    tiny: Path, tmp_path: Path
) -> None:
    metrics = tmp_path / "run" / "metrics.jsonl"
    reward = tmp_path / "filling.py"
    reward.write_text(FULL_DISK.format(metrics=str(metrics)))
    words = [sys.executable, SCRIPT, "--config", str(tiny), "self_checks=false"]
    words += [f"run_dir={tmp_path / 'run'}", "video_every=0", "steps=5"]
    words += ["rewards.brightness=null", f"rewards.filling.target={reward}:Filling"]
    done = program.run(*words, "save_every=2", expect=1)
    assert "Traceback" not in done.stderr
    assert "bytes are free" in done.stderr
    assert "2 of 2 finished steps" in done.stderr
    assert metrics.read_text().endswith("}\n")
    assert len(read_metrics(metrics)) == 2
    checkpoints = tmp_path / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]


def test_output_goes_on_in_a_file_after_its_terminal_is_closed(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\n"
        "from common.lasting_output import lasting_output\n"
        "with lasting_output(pathlib.Path(sys.argv[1])):\n"
        "    print('begun', flush=True)\n"
        "    sys.stdin.readline()\n"
        "    print('gone on', flush=True)\n"
    )
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "output.log")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    while b"begun\r\n" not in shown:
        shown += os.read(master, 100)
    os.close(master)
    process.communicate(b"\n", timeout=20)
    assert process.returncode == 0
    assert (tmp_path / "output.log").read_text() == "gone on\n"
