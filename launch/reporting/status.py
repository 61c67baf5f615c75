"""How far a run is, and when its files were written."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from launch.reporting import data
from launch.reporting.data import EVALUATIONS


@dataclass(frozen=True)
class Status:
    """A run in the header of a page.

    kind      One of `KINDS`, or dual_rl.
    name      Its folder, without what is above the folder of the report.
    progress  In words: "step 44 of 60".
    finished  Whether it has written what it writes last.
    written   When its rows were last written, in UTC; "" without rows.
    settings  Its config.yaml; None without one.
    """

    kind: str
    name: str
    progress: str
    finished: bool
    written: str
    settings: str | None


def status_of(kind: str, folder: Path, name: str) -> Status:
    """Read the state of a run from its files."""
    if kind in EVALUATIONS:
        rows_file = folder / "results.jsonl"
        finished = bool(data.summary(folder))
        noun = "pairs" if kind == "rm" else "videos"
        progress = f"{len(data.results(folder))} {noun}"
    else:
        rows_file = folder / "metrics.jsonl"
        finished = (folder / "final").is_dir()
        progress = _steps(folder)
    # The time of the rows, not of the folder, which a copy may change.
    written = ""
    if rows_file.is_file():
        written = utc(datetime.fromtimestamp(rows_file.stat().st_mtime, UTC))
    return Status(
        kind,
        name,
        progress + (", finished" if finished else ""),
        finished,
        written,
        data.text_of(folder, "config.yaml"),
    )


def _steps(folder: Path) -> str:
    """Steps that are done, of those that the config asks for where it says so."""
    # The row of a held-out evaluation after the last step is no step.
    steps = [
        int(row["step"])
        for row in data.metrics(folder)
        if not all(name == "step" or name.startswith("eval") for name in row)
    ]
    done = max(steps, default=-1) + 1
    total = data.config(folder).get("steps")
    return f"step {done} of {total}" if isinstance(total, int) else f"step {done}"


def utc(moment: datetime) -> str:
    """Format a time to the minute."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
