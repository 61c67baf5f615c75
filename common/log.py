"""Where a run says what it does: metrics.jsonl always, one console line per step, a progress bar, wandb if asked.

Only rank 0 writes. Imports no torch, so that command-line tools may use it at once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from common.tracking import TensorboardTracker, Tracker, Trackers, WandbTracker

if TYPE_CHECKING:
    from common.config import WandbConfig

T = TypeVar("T")
WIDTH = 118  # of a console line
MEASURED = (
    "eval/",
    "heldout/",
)  # on held-out data, now and then: a console line of its own


def say(message: str) -> None:
    """One line on stdout, from rank 0, flushed, above any progress bar."""
    if _is_main():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()  # behind a launcher's pipe an unflushed line looks like a hang


def progress(iterable: Iterable[T], total: int | None, label: str) -> Iterator[T]:
    """Iterate with a progress bar on stderr, on rank 0; in a log file one line every ten seconds."""
    interval = 0.1 if sys.stderr.isatty() else 10.0
    bar = tqdm(
        iterable,
        total=total,
        desc=label,
        disable=not _is_main(),
        mininterval=interval,
        dynamic_ncols=True,
    )
    yield from bar


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Every complete line of a metrics.jsonl; null is NaN, a torn last line (a killed run) is left out."""
    text = Path(path).read_text(encoding="utf-8")
    lines = text.split("\n")[:-1]  # what follows the last newline is torn
    return [
        {
            key: math.nan if value is None else value
            for key, value in json.loads(line).items()
        }
        for line in lines
    ]


class RunLog:
    """The log of one run. Every rank may hold one and call it; only rank 0's writes.

    run_dir      gets metrics.jsonl, one line a step: {"step": 3, "train/loss": 0.1, ...}; NaN and infinity are null
    start        the first step to come: lines of it and later ones, which a resumed run writes again, are dropped
    wandb        None or mode "disabled" for none; what fails there is said once and the run goes on
    tensorboard  its files in run_dir/tensorboard as well
    total        number of steps, for the console line
    quiet        no console line per step
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        start: int = 0,
        wandb: WandbConfig | None = None,
        tensorboard: bool = False,
        total: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        self.total, self.quiet = total, quiet
        self._trackers: Trackers | None = None
        if not _is_main():
            return
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        self._truncate(start)
        makers: dict[str, Callable[[], Tracker]] = {}
        if wandb is not None and wandb.mode != "disabled":
            makers["wandb"] = lambda: WandbTracker(wandb, folder, fresh=start == 0)
        if tensorboard:
            makers["tensorboard"] = lambda: TensorboardTracker(folder, step=start)
        self._trackers = Trackers(makers, say)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one step's metrics. Names are ``stage/name``, values floats."""
        if not _is_main():
            return
        values = {name: float(value) for name, value in metrics.items()}
        row = {
            "step": step,
            **{
                name: value if math.isfinite(value) else None
                for name, value in values.items()
            },
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if not self.quiet:
            measured = {
                name: value
                for name, value in values.items()
                if name.startswith(MEASURED)
            }
            trained = {
                name: value for name, value in values.items() if name not in measured
            }
            for part in filter(None, (trained, measured)):
                say(self._line(step, part))
        if self._trackers is not None:
            self._trackers.log(step, values)

    def videos(self, step: int, files: Sequence[Path], captions: Sequence[str]) -> None:
        """Where runs are tracked, these mp4 files too."""
        if self._trackers is not None:
            self._trackers.videos(step, files, captions)

    def message(self, text: str) -> None:
        """A line for people; not kept."""
        say(text)

    def _truncate(self, step: int) -> None:
        """Drop the lines of ``step`` and later, and a torn last line."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        kept = [line for line in lines if json.loads(line)["step"] < step]
        partial = self.path.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)

    def close(self) -> None:
        """End the tracking; metrics.jsonl is complete after every `log`."""
        if self._trackers is not None:
            self._trackers.finish()
            self._trackers = None

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        """Fixed columns, so that lines under each other can be compared; what does not fit is in metrics.jsonl."""
        total = "" if self.total is None else f"/{self.total}"
        line = f"step {step:>{max(len(total) - 1, 4)}}{total}"
        for name, value in values.items():
            column = f" | {name} {value:>10.4g}"
            if len(line) + len(column) > WIDTH:
                break
            line += column
        return line


def _is_main() -> bool:
    return (
        os.environ.get("RANK", "0") == "0"
    )  # set by every launcher, and known before torch is imported
