"""The scripts of launch/nodes on one machine, and the checks of a run on several nodes."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common import distributed as network
from engine import guard
from engine.guard import STUCK, Guard
from launch.evaluation.results_table import ResultsTable
from tests.launch.processes import ROOT, deepspeed, run

FOLDER = ROOT / "launch" / "nodes"
SCRIPTS = sorted(path for path in FOLDER.iterdir() if path.name != "hostfile")
NODE = str(FOLDER / "node.sh")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_node_scripts_parse_and_name_no_site(script: Path) -> None:
    run("bash", "-n", str(script))
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert re.search(r"^set -euo pipefail$", text, re.M)
    directives = re.findall(r"^#SBATCH --([\w-]+)", text, re.M)
    assert not set(directives) & {
        "partition",
        "account",
        "qos",
        "constraint",
        "reservation",
        "nodelist",
        "time",
    }
    assert not re.search(r"/(home|scratch|users|work|mnt)/|module load", text)
    assert script.suffix == ".sbatch" or os.access(script, os.X_OK)


@pytest.mark.slow
def test_deepspeed_reads_the_hostfile() -> None:
    program = "import sys; from deepspeed.launcher.runner import fetch_hostfile\n"
    program += "print(dict(fetch_hostfile(sys.argv[1])))"
    said = run(sys.executable, "-c", program, str(FOLDER / "hostfile")).stdout
    assert said.strip().endswith("{'10.0.0.1': 8, '10.0.0.2': 8}")


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A deepspeed that writes its words and starts one rank, which writes its signals."""
    rank = "import signal, sys, time, pathlib; got = pathlib.Path(sys.argv[1])\n"
    rank += "signal.signal(signal.SIGUSR1, lambda n, f: got.write_text('asked') and sys.exit(38))\n"
    rank += "got.write_text('there'); time.sleep(30)\n"
    (tmp_path / "rank.py").write_text(rank)
    (tmp_path / "deepspeed").write_text(
        f'#!/usr/bin/env bash\necho "$@" >{tmp_path}/words\n'
        f"{sys.executable} {tmp_path}/rank.py {tmp_path}/got & wait $!\n"
    )
    (tmp_path / "deepspeed").chmod(0o755)
    (tmp_path / "hosts").write_text("# nodes\n\n  10.1.2.3 slots=4\n10.1.2.4 slots=4\n")
    return tmp_path


def heed_signals() -> None:
    """Reset SIGINT and SIGHUP, as in a user's terminal.

    Tests in the background of a shell ignore the first, under nohup the second, and bash cannot
    trap a signal that was ignored when it began.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def start_node(fake: Path) -> subprocess.Popen[str]:
    words = [NODE, str(fake / "hosts"), "1", "launch/grpo.py", "a.b=c d"]
    path = f"{fake}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MASTER_PORT": "4242"}
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, text=True, preexec_fn=heed_signals
    )


def started(fake: Path) -> subprocess.Popen[str]:
    process = start_node(fake)
    got = fake / "got"
    wait_until(lambda: got.exists() and got.read_text() == "there")
    return process


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]
)
def test_node_forwards_a_signal_to_its_ranks(
    number: signal.Signals, fake: Path
) -> None:
    process = started(fake)
    process.send_signal(number)
    assert process.wait(timeout=20) == 38  # the launcher's, which is the rank's
    assert (fake / "got").read_text() == "asked"
    words = (fake / "words").read_text().split()
    assert words[:2] == ["--hostfile", f"{fake}/hosts"]
    assert words[2] == "--no_ssh"
    assert words[3:9:2] == ["--node_rank", "--master_addr", "--master_port"]
    assert words[4:10:2] == ["1", "10.1.2.3", "4242"]
    assert words[9:] == ["launch/grpo.py", "a.b=c", "d"]


def test_node_takes_signals_over_before_its_job_starts() -> None:
    """On a busy machine a rank answers before bash has come to its next line."""
    text = Path(NODE).read_text()
    assert text.index("trap 'ask again' TERM INT HUP") < text.index("exec deepspeed")


def test_second_signal_kills_the_node(fake: Path) -> None:
    (fake / "rank.py").write_text(
        (fake / "rank.py").read_text().replace("and sys.exit(38)", "and None")
    )
    process = started(fake)
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: (fake / "got").read_text() == "asked")
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 128 + signal.SIGTERM


def test_killed_launcher_exits_1(fake: Path) -> None:
    """deepspeed ends with 0 when its own launcher was killed, and the ranks go on without it."""
    text = (
        (fake / "deepspeed")
        .read_text()
        .replace("/got & wait $!", "/got --local_rank=0 & sleep 1")
    )
    (fake / "deepspeed").write_text(text)
    assert started(fake).wait(timeout=20) == 1
    time.sleep(0.2)
    assert (fake / "got").read_text() == "asked"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such/file", "0", "launch/grpo.py"], "no/such/file"),
        (
            [str(FOLDER / "hostfile"), "one", "launch/grpo.py"],
            "'one'",
        ),
        (
            [str(FOLDER / "hostfile"), "2", "launch/grpo.py"],
            "NUMBER 2",
        ),
        (
            [str(FOLDER / "hostfile"), "0", "grpo.py"],
            " grpo.py ",
        ),
        ([str(FOLDER / "hostfile"), "0"], "usage:"),
    ],
)
def test_wrong_node_arguments_exit_2(words: list[str], message: str) -> None:
    """deepspeed itself takes a missing hostfile for a run on this machine alone."""
    assert message in run(NODE, *words, expect=2).stderr


def test_reward_server_script_needs_a_long_token() -> None:
    script = str(FOLDER / "reward_server.sh")
    words = [script, "rewards.brightness.weight=1"]
    assert "REWARD_SERVER_TOKEN" in run(*words, expect=1, REWARD_SERVER_TOKEN="").stderr
    assert (
        " 16 "
        in run(*words, expect=2, timeout=30.0, REWARD_SERVER_TOKEN="short").stderr
    )


# ------------------------------------------------------------------ checks of a run


def test_choose_interface_keeps_a_given_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert network.interface_towards("127.0.0.1") is None
    assert network.interface_towards("no.such.host.invalid") is None
    assert network.interface_towards("") is None
    monkeypatch.setattr(network, "interface_towards", lambda host: f"to {host}")
    monkeypatch.setenv("MASTER_ADDR", "10.1.2.3")
    monkeypatch.setenv(network.INTERFACE_VARIABLE, "mine")
    network.choose_interface()
    assert os.environ[network.INTERFACE_VARIABLE] == "mine"
    monkeypatch.delenv(network.INTERFACE_VARIABLE)
    network.choose_interface()
    assert os.environ[network.INTERFACE_VARIABLE] == "to 10.1.2.3"


def test_folder_of_one_rank_has_no_problem(tmp_path: Path) -> None:
    assert guard.folder_problem(tmp_path / "new") == ""
    assert not (tmp_path / "new").exists()


def test_sigusr1_stops_the_run_and_never_kills(tmp_path: Path) -> None:
    """A scheduler may send it to a rank, and to a script that passes it on to the rank."""
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with Guard(tmp_path, watchdog_s=0) as guard:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
                time.sleep(0.01)
            assert guard.step_done()
            assert guard.received == signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_file_system_without_locks_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As Lustre answers that is mounted without `flock`, and NFS without a lock daemon."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with Guard(tmp_path, watchdog_s=0):
        printed = capsys.readouterr().out
        assert str(tmp_path) in printed
        assert "locks" in printed


@pytest.mark.slow
def test_watchdog_exits_when_the_folder_hangs(tmp_path: Path) -> None:
    """Opening a pipe without a reader waits for ever, as a file server that is gone does."""
    os.mkfifo(tmp_path / "stacks-rank-0.txt")
    program = "import pathlib, sys, time; from engine.guard import Guard\n"
    program += "with Guard(pathlib.Path(sys.argv[1]), watchdog_s=0.2): time.sleep(60)"
    done = run(sys.executable, "-c", program, str(tmp_path), expect=STUCK, timeout=40)
    assert "rank 0:" in done.stderr
    assert "thread" in done.stderr


def test_rows_of_a_rank_are_read_without_a_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network file system that lists a folder as it was half a minute ago."""
    table = ResultsTable(tmp_path / "results.jsonl", identity={})
    monkeypatch.setattr(ResultsTable, "_parts", lambda self: [])
    table.add([{"index": 0, "value": 1}])
    assert table.finish([(0,)]) == [{"index": 0, "value": 1}]


def test_other_ranks_do_not_read_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 merges its parts and removes them meanwhile; what is done, it says to all."""
    monkeypatch.setattr(
        "launch.evaluation.results_table.distributed.is_main", lambda: False
    )
    monkeypatch.setattr(
        "launch.evaluation.results_table.distributed.from_main",
        lambda own: ("", [(0,)]),
    )
    monkeypatch.setattr(
        "launch.evaluation.results_table.guard.folder_problem", lambda folder: ""
    )
    monkeypatch.setattr(ResultsTable, "_read", lambda table: pytest.fail("read"))
    assert ResultsTable(tmp_path / "results.jsonl", identity={}).done == {(0,)}


@pytest.mark.long
def test_results_table_in_separate_folders_exits_2(tmp_path: Path) -> None:
    """Rank 1 gets another folder, as a path on the disk of its node would be."""
    program = tmp_path / "table.py"
    program.write_text(
        "import os, pathlib, sys\n"
        "from launch.evaluation.results_table import ResultsTable, all_ranks\n"
        "from common.cli import exit_with_error\n"
        "name = ('one', sys.argv[-1])[int(os.environ['RANK'])]\n"
        f"place = pathlib.Path({str(tmp_path)!r}) / name / 'results.jsonl'\n"
        "with all_ranks():\n"
        "    try:\n"
        "        ResultsTable(place, identity={})\n"
        "    except ValueError as error:\n"
        "        exit_with_error(str(error))\n"
    )
    said = deepspeed(2, str(program), "two", expect=2).stderr
    assert f"{tmp_path / 'one'} " in said
    assert "rank 1" in said
    deepspeed(2, str(program), "one")
