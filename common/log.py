"""The log of a run: metrics.jsonl, a console line per step, a progress bar, trackers.

Only rank 0 writes. Imports no torch, so that command-line tools start fast.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from common.files import append_line, read_jsonl, replace_text
from common.progress import clock
from common.tracking import TensorboardTracker, Trackers, WandbTracker

if TYPE_CHECKING:
    from common.config import WandbConfig

T = TypeVar("T")
# seconds between the lines of a log file that tell where a long step is
DESCRIBE_S = float(os.environ.get("PROGRESS_S", "60"))
# seconds between the lines that stand for a progress bar in a log file
LINES_S = 10.0
# columns of a console line
WIDTH = 118
# metrics of held-out data, measured now and then, get a console line of their own
MEASURED = ("eval/", "heldout/")


def say(message: str) -> None:
    """Print a line on stdout from rank 0, above any progress bar."""
    if _is_main():
        tqdm.write(message, file=sys.stdout)
        # behind a launcher's pipe an unflushed line looks like a hang
        sys.stdout.flush()


def progress(
    iterable: Iterable[T],
    total: int | None,
    label: str,
    *,
    describe: Callable[[], str] | None = None,
) -> Iterator[T]:
    """Iterate with a progress bar on stderr; in a log file, a plain line every ten seconds.

    describe  tells where a long item is: behind the bar, or in a log file a line every minute
    """
    if not _is_main():
        yield from iterable
        return
    is_terminal = sys.stderr.isatty()
    # A bar is redrawn with control characters, which make a file unreadable.
    if is_terminal:
        bar = tqdm(
            iterable,
            total=total,
            desc=label,
            dynamic_ncols=True,
        )
        items: Iterable[T] = bar
    else:
        items = _in_lines(iterable, total, label)
    if describe is None:
        yield from items
        return

    # The description comes from a thread, because an item may take hours.
    def show() -> None:
        if is_terminal:
            bar.set_postfix_str(describe())
        else:
            say(f"{label}: {describe()}")

    with _repeated(show, 1.0 if is_terminal else DESCRIBE_S):
        yield from items


def _in_lines(iterable: Iterable[T], total: int | None, label: str) -> Iterator[T]:
    """Tell every `LINES_S` seconds, and at the end, how many items are done."""
    began = time.monotonic()
    told = began
    for done, item in enumerate(iterable, start=1):
        yield item
        now = time.monotonic()
        if now - told < LINES_S and done != total:
            continue
        told = now
        line = f"{label}: {done}"
        # The rest takes as long an item as what is done.
        if total is not None:
            line += f" of {total}"
        line += f", {clock(now - began)}"
        if total is not None and done < total:
            line += f", about {clock((now - began) / done * (total - done))} left"
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


@contextmanager
def _repeated(show: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call ``show`` again and again from a thread while the block runs."""
    stopped = threading.Event()

    def repeat() -> None:
        while not stopped.wait(seconds):
            show()

    threading.Thread(target=repeat, daemon=True, name="progress").start()
    try:
        yield
    finally:
        stopped.set()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Read a metrics.jsonl; null becomes NaN, and a torn last line is left out."""
    rows = []
    for row in read_jsonl(path):
        rows.append(
            {name: math.nan if value is None else value for name, value in row.items()}
        )
    return rows


class RunLog:
    """The log of a run; every rank may hold one, and only rank 0's writes.

    run_dir      gets metrics.jsonl, a line per step: {"step": 3, "train/loss": 0.1, ...}; NaN and
                 infinity are null
    start        the first step to come; lines of that step and later, which a resumed run writes
                 again, are dropped
    wandb        None or mode "disabled" for none
    tensorboard  True writes to run_dir/tensorboard too
    total        number of steps, for the console line
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        start: int = 0,
        wandb: WandbConfig | None = None,
        tensorboard: bool = False,
        total: int | None = None,
    ) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.total = total
        self._trackers = Trackers(say)
        if not _is_main():
            return
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        self._truncate(start)
        # Trackers read config.yaml, so the folder comes first.
        if wandb is not None and wandb.mode != "disabled":
            self._trackers.start("wandb", WandbTracker, folder, start, wandb)
        if tensorboard:
            self._trackers.start("tensorboard", TensorboardTracker, folder, start)

    def log(
        self, step: int, metrics: Mapping[str, float], *, measured_after: int = 0
    ) -> None:
        """Append the metrics of a step, counted from 0: floats by ``stage/name``.

        People count steps from 1: a line on the console says "step 1/40" of the first step, and of
        held-out data after how many steps they were measured, ``measured_after``.
        """
        if not _is_main():
            return
        # Tensors and numpy numbers become floats.
        values = {name: float(value) for name, value in metrics.items()}

        # 1. The file. JSON has no NaN.
        row: dict[str, float | None] = {"step": step}
        for name, value in values.items():
            row[name] = value if math.isfinite(value) else None
        append_line(self.path, json.dumps(row))

        # 2. The console: training, then held-out data.
        for held_out in (False, True):
            part = {
                name: value
                for name, value in values.items()
                if name.startswith(MEASURED) == held_out
            }
            if part:
                say(self._line(measured_after if held_out else step + 1, part))

        # 3. The trackers.
        self._trackers.call("log", step, values)

    def videos(
        self,
        step: int,
        files: Sequence[Path],
        captions: Sequence[str],
    ) -> None:
        """Send mp4 files to the trackers."""
        self._trackers.call("videos", step, files, captions)

    def close(self) -> None:
        """End the tracking; metrics.jsonl is complete after every `log`."""
        self._trackers.call("close")
        self._trackers.running = {}

    def _truncate(self, step: int) -> None:
        """Drop the lines of ``step`` and later, and a torn last line."""
        if self.path.exists():
            rows, damaged = _sound_rows(self.path)
            if damaged:
                say(f"{self.path}: {damaged} damaged lines are left out")
            kept = [row for row in rows if row["step"] < step]
            replace_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        """Format a console line in fixed columns; metrics that do not fit are left out."""
        # Fixed columns: lines below each other compare easily.
        total = "" if self.total is None else f"/{self.total}"
        line = f"step {step:>{max(len(total) - 1, 4)}}{total}"
        for name, value in values.items():
            column = f" | {name} {value:>10.4g}"
            if len(line) + len(column) > WIDTH:
                break
            line += column
        return line


def _sound_rows(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Read the rows of a metrics.jsonl, and count the complete lines that are none."""
    rows = []
    damaged = 0
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            # Zeros that a lost disk cache has left, for example.
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged


def _is_main() -> bool:
    # set by every launcher, and known before torch is imported
    return os.environ.get("RANK", "0") == "0"
