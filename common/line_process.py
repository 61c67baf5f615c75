"""LineProcess: a program that answers each line of JSON with a line of JSON, over its pipes.

Nothing else passes between the two: no pickle, which runs code when read, and no port that others
could reach. The program's stderr goes to a file, and every error carries the end of it. The
program never outlives this process: it is ended by `end`, when the object is collected and when
the interpreter exits, and its stdin closes if this process is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# bytes in a line: a pipe holds as many, so sending a line to a waiting program never blocks
MAX_LINE = 65_536
# characters of stderr in an error
_TAIL = 4_000
_TICK_S = 0.2
# variables of this Python environment, and of this run's ranks
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "CROSS_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
)


def foreign_environment(gpu: int | None) -> dict[str, str]:
    """Environment variables for a program of another Python environment.

    They lack what describes our Python and our ranks. ``gpu`` is the index, among the GPUs visible
    to us, of the only GPU that the program sees; None leaves that unchanged.
    """
    # Ours would lead the program to our packages and ports.
    variables = {}
    for name, value in os.environ.items():
        if name not in _OURS and not name.startswith(_LAUNCHERS):
            variables[name] = value
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        device = visible.split(",")[gpu] if visible else str(gpu)
        variables["CUDA_VISIBLE_DEVICES"] = device
    return variables


class LineProcessError(RuntimeError):
    """The program died, timed out or gave a wrong answer; the message has the end of its stderr."""


class LineProcess:
    """A running program.

    stderr   file for its stderr
    grace_s  how long it may take to end after its stdin is closed
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stderr: Path,
        env: Mapping[str, str],
        grace_s: float = 10.0,
    ) -> None:
        # A file cannot fill up and block the program, as a pipe would.
        self.name = Path(command[-1]).name
        self.stderr = stderr
        self.grace_s = grace_s
        with stderr.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(env),
                bufsize=0,
                # its children are in its group, and end with it
                start_new_session=True,
            )
        self._buffer = b""
        self._finalizer = weakref.finalize(self, _end, self.process, grace_s)

    def ask(self, message: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send an object and return the answer.

        Raises LineProcessError, after ending the program, if no answer comes.
        """
        # 1. Send.
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(
                f"a line to {self.name} has {len(line)} bytes, at most {MAX_LINE} fit"
            )
        if not self._finalizer.alive:
            raise LineProcessError(f"{self.name} has been ended")
        # a dead program is reported by `_read_line`, with its exit code
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(line)

        # 2. Receive.
        line = self._read_line(timeout_s)
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._failed(f"answered {line[:200]!r}, which is no JSON object")
        return reply

    def end(self) -> None:
        """Close its stdin, wait, and kill it with its children if it does not end. Idempotent."""
        self._finalizer()

    def _read_line(self, timeout_s: float) -> bytes:
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            # checked before the pipe, which then holds its last output; the end of the pipe alone
            # would not tell, since its children may hold it open
            dead = _has_exited(self.process)
            wait_s = 0.0 if dead else _TICK_S
            # Short waits, so that a dead program is noticed.
            readable, _, _ = select.select([self.process.stdout], [], [], wait_s)
            if readable:
                part = os.read(self.process.stdout.fileno(), MAX_LINE)
                self._buffer += part
                dead = not part
            if dead:
                # a pipe closes before its process is gone
                _wait_until_exited(self.process, self.grace_s)
                raise self._failed(None)
            if len(self._buffer) > MAX_LINE:
                raise self._failed(
                    f"answered with more than {MAX_LINE} bytes in a line"
                )
            if time.monotonic() > deadline:
                raise self._failed(f"did not answer within {timeout_s:g} s")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failed(self, problem: str | None) -> LineProcessError:
        """Kill what is left of the program and return the error; None means that it died."""
        # Nothing is left to end later.
        self._finalizer.detach()
        _kill(self.process)
        # The message carries the end of the log.
        if problem is None:
            problem = f"died with exit code {self.process.returncode}"
        log = ""
        if self.stderr.exists():
            log = self.stderr.read_text(encoding="utf-8", errors="replace")
        tail = log[-_TAIL:].strip() or "(nothing)"
        return LineProcessError(
            f"{self.name} {problem}; the end of its stderr:\n{tail}"
        )


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    _wait_until_exited(process, grace_s)
    _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group, then collect the exit code."""
    # in this order: until the code is collected, no other group can have the number
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _wait_until_exited(process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not _has_exited(process) and time.monotonic() < deadline:
        time.sleep(0.02)


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """True if the process has ended; does not collect its exit code."""
    if process.returncode is not None:
        return True
    flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, process.pid, flags) is not None
