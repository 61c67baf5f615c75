"""A program beside ours that answers each line of JSON with one line of JSON, over its standard pipes.

Nothing else passes between the two: no pickle, which runs code when read, and no port that others could reach. What
the program says on stderr goes into a file, whose end every error carries. It never outlives us: it is ended by `end`,
when the object is collected and when the interpreter exits, and its stdin closes with ours if we are killed.
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

MAX_LINE = 65_536  # bytes. A pipe holds as many, so sending a line to a program that waits for it never blocks
_TAIL = 4_000  # characters of stderr in an error
_TICK_S = 0.2
_OURS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")  # of this environment
_LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "CROSS_",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
)  # of our ranks


def foreign_environment(gpu: int | None) -> dict[str, str]:
    """Variables for a program of another Python environment: ours, less what is about our Python and our ranks.

    gpu  the one of those visible to us that is all the program sees; None leaves that as it is
    """
    inherited = {
        k: v
        for k, v in os.environ.items()
        if k not in _OURS and not k.startswith(_LAUNCHERS)
    }
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        inherited["CUDA_VISIBLE_DEVICES"] = (
            visible.split(",")[gpu] if visible else str(gpu)
        )
    return inherited


class LineProcessError(RuntimeError):
    """The program died, fell silent or said something else; the message ends with what it wrote to stderr."""


class LineProcess:
    """One running program.

    stderr   the file that its stderr goes to
    grace_s  how long it may take to end by itself, once its stdin is closed
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        stderr: Path,
        env: Mapping[str, str],
        grace_s: float = 10.0,
    ) -> None:
        self.name, self.stderr, self.grace_s = Path(command[-1]).name, stderr, grace_s
        with stderr.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=dict(env),
                bufsize=0,
                start_new_session=True,  # its own children are in its group, and go with it
            )
        self._buffer = b""
        self._finalizer = weakref.finalize(self, _end, self.process, grace_s)

    def ask(self, message: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
        """Send one object, return the one that comes back. LineProcessError, and the program is gone, if none does."""
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(
                f"a line to {self.name} has {len(line)} bytes, at most {MAX_LINE} fit"
            )
        if not self._finalizer.alive:
            raise LineProcessError(f"{self.name} has been ended")
        with contextlib.suppress(
            BrokenPipeError
        ):  # it is dead: `_line` says so, and how it died
            self.process.stdin.write(line)
        line = self._line(time.monotonic() + timeout_s, timeout_s)
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise self._failed(f"answered {line[:200]!r}, which is no JSON object")
        return reply

    def end(self) -> None:
        """Close its stdin, wait, and kill it with all its children if it does not end. Twice is once."""
        self._finalizer()

    def _line(self, deadline: float, timeout_s: float) -> bytes:
        while b"\n" not in self._buffer:
            # looked at before the pipe: what it wrote last is there by then. The end of the pipe alone would not tell,
            # its children may hold it open
            dead = _has_exited(self.process)
            if select.select([self.process.stdout], [], [], 0.0 if dead else _TICK_S)[
                0
            ]:
                part = os.read(self.process.stdout.fileno(), MAX_LINE)
                self._buffer += part
                dead = not part
            if dead:
                raise self._failed(None)
            if len(self._buffer) > MAX_LINE:
                raise self._failed(
                    f"answered with more than {MAX_LINE} bytes in a line"
                )
            if time.monotonic() > deadline:
                raise self._failed(f"did not answer within {timeout_s:g} s")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _failed(self, what: str | None) -> LineProcessError:
        """Kill what is left of it; the error to raise. None: it died."""
        if what is None:
            _wait_until_exited(
                self.process, self.grace_s
            )  # a pipe closes before its process is gone
        self._finalizer.detach()
        _kill(self.process)
        what = what or f"died with exit code {self.process.returncode}"
        said = (
            self.stderr.read_text(encoding="utf-8", errors="replace")
            if self.stderr.exists()
            else ""
        )
        return LineProcessError(
            f"{self.name} {what}; the end of its stderr:\n{said[-_TAIL:].strip() or '(nothing)'}"
        )


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    _wait_until_exited(process, grace_s)
    _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group, then take the exit code: until it is taken, the number of the group cannot be anyone else's."""
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
    """Without taking its exit code."""
    if process.returncode is not None:
        return True
    return (
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        is not None
    )
