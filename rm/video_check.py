"""Which videos can be decoded, found out beside this process: what kills a decoder costs its row, not the run."""

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
    """One decoder in a process of its own, started again when a file has killed it. It ends with its context.

    deadline_s  for one file
    frames      of a file that are decoded, evenly spaced, first and last included
    """

    def __init__(self, *, deadline_s: float = 60.0, frames: int = 64) -> None:
        self.deadline_s, self.frames = deadline_s, frames
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
        """Before this process decodes them. Raises `VideoError`, naming the first that is not sound."""
        for file in files:
            if problem := self.problem(file):
                raise VideoError(f"{file}: {problem}")

    def problem(self, path: Path) -> str:
        """What is wrong with it, or nothing."""
        if not path.is_file():
            return "no such file"
        if path.stat().st_size == 0:
            return "0 bytes"
        if self._process is None:
            log = Path(self._folder.name) / "stderr.txt"
            self._process = LineProcess(
                [sys.executable, str(WORKER)], stderr=log, env=os.environ, grace_s=1.0
            )
        try:
            asked = {"path": str(path), "frames": self.frames}
            return str(self._process.ask(asked, timeout_s=self.deadline_s)["problem"])
        except LineProcessError as error:
            self._process = None
            return f"the decoder {str(error).splitlines()[0].split(' ', 1)[-1]:.120}"


def bad_videos(
    files: Iterable[Path], *, workers: int = 4, deadline_s: float = 60.0
) -> dict[Path, str]:
    """Of these files the ones that cannot be decoded, and why."""
    todo = sorted(set(files))
    size = max(1, min(workers, os.cpu_count() or 1, len(todo)))

    def some(own: Sequence[Path]) -> dict[Path, str]:
        with VideoChecker(deadline_s=deadline_s) as checker:
            return {file: problem for file in own if (problem := checker.problem(file))}

    with ThreadPoolExecutor(size) as pool:
        parts = pool.map(some, [todo[i::size] for i in range(size)])
        return {file: why for part in parts for file, why in part.items()}


def stamp(files: Iterable[Path]) -> str:
    """Changes with the names, sizes and times of these files."""
    digest = hashlib.sha256()
    for file in files:
        found = file.stat() if file.is_file() else None
        digest.update(
            repr((str(file), found and (found.st_size, found.st_mtime_ns))).encode()
        )
    return digest.hexdigest()


def split_pairs(
    pairs: Sequence[Pair], bad: dict[Path, str]
) -> tuple[list[Pair], list[dict[str, object]]]:
    """(pairs whose videos are sound, one record for every pair that has a bad one)."""
    sound, records = [], []
    for pair in pairs:
        wrong = {
            str(file): bad[file] for file in (pair.video_A, pair.video_B) if file in bad
        }
        if wrong:
            records.append(
                {"line": pair.line, "prompt": pair.prompt, "problems": wrong}
            )
        else:
            sound.append(pair)
    return sound, records
