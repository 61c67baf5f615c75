"""A partner process that ends or answers wrongly is an error, and leaves no process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.line_process import MAX_LINE, LineProcess, LineProcessError

ECHO = """
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    sys.stderr.write(message.get("complain", ""))
    sys.stderr.flush()
    if "exit" in message:
        sys.exit(message["exit"])
    print(message["raw"] if "raw" in message else json.dumps(message), flush=True)
"""


@pytest.fixture
def start(tmp_path: Path):
    started = []

    def start(source: str = ECHO, **options) -> LineProcess:
        (tmp_path / "echo.py").write_text(source, encoding="utf-8")
        command = [sys.executable, "-I", str(tmp_path / "echo.py")]
        started.append(
            LineProcess(
                command, stderr=tmp_path / "stderr.txt", env=os.environ, **options
            )
        )
        return started[-1]

    yield start
    for partner in started:
        partner.end()
        assert partner.process.returncode is not None


def test_line_process_answers_requests(start):
    partner = start()
    long = "é" * (MAX_LINE // 7)
    for message in ({"a": [1, 2.5, None]}, {"text": "two\nlines"}, {"long": long}):
        assert partner.ask(message, timeout_s=60) == message
    with pytest.raises(ValueError, match="65536"):
        partner.ask({"long": "x" * MAX_LINE}, timeout_s=60)
    assert partner.ask({"still": "there"}, timeout_s=60) == {"still": "there"}
    partner.end()
    assert partner.process.returncode == 0
    with pytest.raises(LineProcessError, match=r"echo\.py"):
        partner.ask({}, timeout_s=60)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            {"exit": 7, "complain": "out of luck"},
            r"echo\.py died with exit code 7; the end of its stderr:\nout of luck",
        ),
        (
            {"raw": "not json"},
            r"answered b'not json', which is no JSON object; the end of its stderr:\n\(nothing\)",
        ),
        ({"raw": "[1]"}, r"answered b'\[1\]'"),
        ({"raw": "x" * 60_000 + "\\n", "complain": "?"}, r"which is no JSON object"),
    ],
)
def test_malformed_answer_raises_and_ends_process(start, message, error):
    partner = start()
    with pytest.raises(LineProcessError, match=error):
        partner.ask(message, timeout_s=60)
    assert partner.process.returncode is not None


def test_line_without_end_raises(start):
    partner = start(
        "import sys\nsys.stdin.readline()\nwhile True:\n    sys.stdout.write('x' * 1000)\n"
    )
    with pytest.raises(LineProcessError, match="65536"):
        partner.ask({}, timeout_s=60)


def test_silent_process_raises_after_timeout(start):
    partner = start("import time\ntime.sleep(600)\n")
    begin = time.monotonic()
    with pytest.raises(LineProcessError, match=r"0\.5"):
        partner.ask({}, timeout_s=0.5)
    assert time.monotonic() - begin < 30
    assert partner.process.returncode == -signal.SIGKILL


def test_process_dead_before_request_raises(start):
    partner = start("raise SystemExit(5)")
    os.waitid(os.P_PID, partner.process.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(LineProcessError, match="5"):
        partner.ask({}, timeout_s=60)


def test_process_that_does_not_end_is_killed(start):
    partner = start("import time\nwhile True:\n    time.sleep(600)\n", grace_s=0.2)
    partner.end()
    assert partner.process.returncode == -signal.SIGKILL


def test_child_process_ends_when_parent_is_killed(tmp_path):
    (tmp_path / "echo.py").write_text(ECHO, encoding="utf-8")
    ours = f"""
import os, signal, sys
from pathlib import Path
from common.line_process import LineProcess
partner = LineProcess(
    [sys.executable, "-I", {str(tmp_path / "echo.py")!r}],
    stderr=Path(os.devnull),
    env=os.environ,
)
print(partner.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", ours],
        cwd=root,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while alive(int(done.stdout)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
