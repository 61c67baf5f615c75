"""Check which videos can be decoded, in a separate process.

A file that kills or hangs the decoder costs its row of the table, not the run.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from common.line_process import LineProcess, LineProcessError
from rm.data import Pair
from rm.video import VideoError

WORKER = Path(__file__).with_name("decode_worker.py")


class VideoChecker:
    """A decoder process, started again after a file has killed it; a context manager.

    deadline_s  The time limit for a file.
    frames      How many frames of a file are decoded, evenly spaced from first to last.
    """

    def __init__(self, *, deadline_s: float = 60.0, frames: int = 64) -> None:
        self.deadline_s = deadline_s
        self.frames = frames
        self._folder = tempfile.TemporaryDirectory()
        self._process: LineProcess | None = None

    def __enter__(self) -> VideoChecker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.end()
        self._folder.cleanup()

    def require(self, *files: Path) -> None:
        """Raise VideoError, naming the first file that cannot be decoded."""
        for file in files:
            problem = self.problem(file)
            if problem:
                raise VideoError(f"{file}: {problem}")

    def problem(self, path: Path) -> str:
        """Describe the problem of a file; "" if it can be decoded."""
        # Path.is_file raises for a name that is too long.
        if not os.path.isfile(path):
            return "no such file"
        if path.stat().st_size == 0:
            return "0 bytes"
        if self._process is None:
            log = Path(self._folder.name) / "stderr.txt"
            command = [sys.executable, str(WORKER)]
            self._process = LineProcess(
                command, stderr=log, env=os.environ, grace_s=1.0
            )
        request = {"path": str(path), "frames": self.frames}
        try:
            answer = self._process.ask(request, timeout_s=self.deadline_s)
        except LineProcessError as error:
            # The process is gone; the next file starts another.
            self._process = None
            reason = str(error).splitlines()[0].split(" ", 1)[-1]
            return f"the decoder {reason:.120}"
        return str(answer["problem"])


def bad_videos(
    files: Iterable[Path], *, workers: int = 4, deadline_s: float = 60.0
) -> dict[Path, str]:
    """Find the files that cannot be decoded; their problems by file."""
    unique = sorted(set(files))
    size = max(1, min(workers, os.cpu_count() or 1, len(unique)))

    def check(part: Sequence[Path]) -> dict[Path, str]:
        with VideoChecker(deadline_s=deadline_s) as checker:
            return {file: checker.problem(file) for file in part}

    # Every thread waits for a decoder process of its own.
    bad = {}
    with ThreadPoolExecutor(size) as pool:
        parts = [unique[i::size] for i in range(size)]
        for problems in pool.map(check, parts):
            for file, problem in problems.items():
                if problem:
                    bad[file] = problem
    return bad


def stamp(files: Iterable[Path]) -> str:
    """A digest that changes with the names, sizes and times of the files."""
    digest = hashlib.sha256()
    for file in files:
        state = None
        if file.is_file():
            status = file.stat()
            state = (status.st_size, status.st_mtime_ns)
        digest.update(repr((str(file), state)).encode())
    return digest.hexdigest()


def split_pairs(
    pairs: Sequence[Pair], bad: dict[Path, str]
) -> tuple[list[Pair], list[dict[str, object]]]:
    """Split pairs into those with two good videos, and a record of each other pair."""
    good = []
    records = []
    for pair in pairs:
        files = (pair.video_A, pair.video_B)
        problems = {str(file): bad[file] for file in files if file in bad}
        if problems:
            records.append(
                {"line": pair.line, "prompt": pair.prompt, "problems": problems}
            )
        else:
            good.append(pair)
    return good, records
