"""Read preference benchmarks in their published layouts as the `PairTable` of training.

videogen  VideoGen-RewardBench (VideoAlign): path_A, path_B, prompt, and A, B or same under VQ,
          MQ, TA and Overall.
genai     GenAI-Bench's video votes: left_video_path, right_video_path, prompt, vote_type.
indomain  DeScore's table: video_A, video_B, prompt, answer (JSON with gsb_result in an
          <answer> block).
descore   the training table, see `rm.data.read_pairs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

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
# How the votes of GenAI-Bench begin: leftvote, rightvote, tievote, bothbad.
VOTES = {"left": 1, "right": -1, "tie": 0, "both": 0}


class _Columns(NamedTuple):
    """The columns of a layout, and what turns the label's cell into a label.

    ``read`` gives None if the cell cannot be read. ``labels`` are columns of further labels.
    """

    video_A: str
    video_B: str
    label: str
    read: Callable[[str], int | None]
    labels: tuple[str, ...] = ()


def _vote(cell: str) -> int | None:
    """Read a vote of GenAI-Bench."""
    for start, label in VOTES.items():
        if cell.lower().startswith(start):
            return label
    return None


# The label of "videogen" is the dimension that the caller chooses.
LAYOUTS = {
    "videogen": _Columns("path_A", "path_B", "", LABELS.get, DIMENSIONS),
    "genai": _Columns("left_video_path", "right_video_path", "vote_type", _vote),
    "indomain": _Columns("video_A", "video_B", "answer", parse_preference),
}


def read_benchmark(
    path: str | Path,
    layout: Layout,
    *,
    dimension: str = "TA",
    videos: str | Path | None = None,
    dimensions: Sequence[str] = (),
) -> PairTable:
    """Read a benchmark's CSV.

    dimension   Of "videogen" only: VQ, MQ, TA or Overall; DeScore's published column is TA.
                The others are in ``Pair.labels``.
    videos      The folder that video paths are relative to; None is the CSV's.
    dimensions  Of "descore" only, see `rm.data.read_pairs`.

    Bad rows are left out and described as ``file:line: problem``; invalid labels are counted.
    Raises ValueError, naming the file, for an unknown dimension, an unreadable table, a missing
    column, or a table without a usable row.
    """
    # The training layout.
    if layout == "descore":
        if videos is not None:
            raise ValueError(
                f"{path}: the training layout names its videos relative to the CSV"
            )
        return read_pairs(path, require_cot=False, dimensions=dimensions)

    # The published layouts.
    if dimension not in DIMENSIONS:
        names = ", ".join(DIMENSIONS)
        raise ValueError(f"{path}: dimension must be one of {names}, got {dimension!r}")
    columns = LAYOUTS[layout]
    if layout == "videogen":
        columns = columns._replace(label=dimension)
    path = csv_file(Path(path))
    root = path.parent if videos is None else Path(videos)

    def make_pair(row: Mapping[str, str], cell: str) -> Pair:
        label = columns.read(cell)
        if label is None:
            raise ValueError(f"{columns.label}: {cell!r:.80} names no preference")
        files = []
        for name in columns[:2]:
            files.append(root / (row[name] or "").strip())
        check_videos(files)
        labels = labels_in(row, columns.labels)
        return Pair(prompt_in(row), *files, "", "", label, labels=labels)

    return collect(path, [*columns[:3], "prompt"], columns.label, make_pair)
