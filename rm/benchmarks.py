"""Preference benchmarks in the layouts they are published in, as the same `PairTable` that training reads.

videogen  VideoGen-RewardBench (VideoAlign): path_A, path_B, prompt, and A, B or same under VQ, MQ, TA and Overall
genai     GenAI-Bench's video votes: left_video_path, right_video_path, prompt, vote_type
indomain  DeScore's own table: video_A, video_B, prompt, answer (JSON with gsb_result in an <answer> block)
descore   the training table, see `rm.data.read_pairs`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rm.data import (
    LABELS,
    Pair,
    PairTable,
    check_videos,
    collect,
    csv_file,
    labels_in,
    prompt_in,
    read_pairs,
)
from rm.prompt import parse_preference

Layout = Literal["descore", "videogen", "genai", "indomain"]
DIMENSIONS = ("VQ", "MQ", "TA", "Overall")


@dataclass(frozen=True)
class _Columns:
    """Where a layout keeps both videos and the label, how the label's cell is read (None: it cannot be), and columns
    of further labels.
    """

    video_A: str
    video_B: str
    label: str
    read: Callable[[str], int | None]
    labels: tuple[str, ...] = ()


def read_benchmark(
    path: str | Path,
    layout: Layout,
    *,
    dimension: str = "TA",
    videos: str | Path | None = None,
    dimensions: Sequence[str] = (),
) -> PairTable:
    """Read a benchmark's CSV; video paths are relative to ``videos``, or to the CSV itself.

    dimension  of "videogen" only: VQ, MQ, TA or Overall; DeScore's published column is TA. The others are in
               ``Pair.labels``
    dimensions of "descore" only, see `rm.data.read_pairs`

    Bad rows are left out and described as ``file:line: what``; an invalid label is counted. ValueError, naming the
    file, for an unknown dimension, a table that is unreadable or lacks a column, or no usable row.
    """
    if layout == "descore":
        if videos is not None:
            raise ValueError(
                f"{path}: the training layout names its videos relative to the CSV"
            )
        return read_pairs(path, require_cot=False, dimensions=dimensions)
    if dimension not in DIMENSIONS:
        raise ValueError(
            f"{path}: dimension must be one of {', '.join(DIMENSIONS)}, got {dimension!r}"
        )
    columns = _columns(layout, dimension)
    path = csv_file(Path(path))
    root = path.parent if videos is None else Path(videos)
    required = [columns.video_A, columns.video_B, columns.label, "prompt"]
    return collect(
        path,
        required,
        columns.label,
        lambda row, label: _pair(row, label, columns, root),
    )


def _columns(layout: Layout, dimension: str) -> _Columns:
    if layout == "videogen":
        return _Columns("path_A", "path_B", dimension, LABELS.get, DIMENSIONS)
    if layout == "genai":
        return _Columns("left_video_path", "right_video_path", "vote_type", _vote)
    if layout == "indomain":
        return _Columns("video_A", "video_B", "answer", parse_preference)
    raise ValueError(
        f"layout must be descore, videogen, genai or indomain, got {layout!r}"
    )


def _vote(cell: str) -> int | None:
    """leftvote, rightvote, and a tie for tievote and bothbad."""
    word = cell.lower()
    starts = {"left": 1, "right": -1, "tie": 0, "both": 0}
    return next(
        (label for start, label in starts.items() if word.startswith(start)), None
    )


def _pair(row: Mapping[str, str], text: str, columns: _Columns, root: Path) -> Pair:
    label = columns.read(text)
    if label is None:
        raise ValueError(
            f"{columns.label} says {row[columns.label]!r:.80}, which names no preference"
        )
    files = [
        root / (row[name] or "").strip() for name in (columns.video_A, columns.video_B)
    ]
    check_videos(files)
    return Pair(
        prompt_in(row),
        files[0],
        files[1],
        "",
        "",
        label,
        labels=labels_in(row, columns.labels),
    )
