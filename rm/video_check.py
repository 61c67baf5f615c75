"""Check which videos can be decoded, in a separate process.

A file that kills or hangs the decoder costs its row of the table, not the run.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from common.film import VideoError
from rm.data import Pair
from rm.decode_worker import serve

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess


class VideoChecker:
    """A decoder process, started again after a file has killed it; a context manager.

    deadline_s  The time limit for a file.
    frames      How many frames of a file are decoded, evenly spaced from first to last.
    """

    def __init__(self, *, deadline_s: float = 60.0, frames: int = 64) -> None:
        self.deadline_s = deadline_s
        self.frames = frames
        self._process: BaseProcess | None = None

    def __enter__(self) -> VideoChecker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

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

        # The process ends with a file that it does not survive; the next file starts another.
        try:
            if self._process is None:
                self._start()
            self._pipe.send((str(path), self.frames))
            if self._pipe.poll(self.deadline_s):
                return self._pipe.recv_bytes().decode()
            reason = f"did not answer within {self.deadline_s:g} s"
        except (EOFError, OSError):
            self._process.join()
            reason = f"died with exit code {self._process.exitcode}"
        self._end()
        return f"the decoder {reason}"

    def _start(self) -> None:
        # A fresh interpreter: a copy of this process might hold locks and a GPU.
        fresh = multiprocessing.get_context("spawn")
        self._pipe, other = fresh.Pipe()
        self._process = fresh.Process(target=serve, args=(other,), daemon=True)
        self._process.start()
        # Only the process holds its end, so that it is seen to die; and it ends when ours closes.
        other.close()
        self._pipe.recv_bytes()

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


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
