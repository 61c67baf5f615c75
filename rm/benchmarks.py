"""Read preference benchmarks in their published layouts as the `PairTable` of training.

videogen  VideoGen-RewardBench (VideoAlign): path_A, path_B, prompt, and A, B or same under VQ,
          MQ, TA and Overall.
genai     GenAI-Bench's video votes: left_video_path, right_video_path, prompt, vote_type.
indomain  DeScore's table: video_A, video_B, prompt, answer (JSON with gsb_result in an
          <answer> block).
descore   the training table, see `rm.data.read_pairs`.

`rm.labels` has the words for a label, the same in every layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from rm.data import (
    Pair,
    PairTable,
    check_videos,
    collect,
    csv_file,
    labels_in,
    prompt_in,
    read_pairs,
)
from rm.labels import is_invalid, read_label
from rm.prompt import preference_word

Layout = Literal["descore", "videogen", "genai", "indomain"]
DIMENSIONS = ("VQ", "MQ", "TA", "Overall")


class _Columns(NamedTuple):
    """The columns of a layout.

    ``word_in`` finds the label's text in its cell. ``labels`` are columns of further labels.
    """

    video_A: str
    video_B: str
    label: str
    word_in: Callable[[str], str] = str.strip
    labels: tuple[str, ...] = ()


def _word_in_answer(cell: str) -> str:
    """Find the label in an answer, or in a cell that calls the pair invalid."""
    return cell if is_invalid(cell) else preference_word(cell)


# The label of "videogen" is the dimension that the caller chooses.
LAYOUTS = {
    "videogen": _Columns("path_A", "path_B", "", labels=DIMENSIONS),
    "genai": _Columns("left_video_path", "right_video_path", "vote_type"),
    "indomain": _Columns("video_A", "video_B", "answer", _word_in_answer),
}


def read_benchmark(
    path: str | Path,
    layout: Layout,
    *,
    dimension: str = "TA",
    videos: str | Path | None = None,
    dimensions: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
) -> PairTable:
    """Read a benchmark's CSV.

    dimension   Of "videogen" only: VQ, MQ, TA or Overall; DeScore's published column is TA.
                The others are in ``Pair.labels``.
    videos      The folder that video paths are relative to; None is the CSV's.
    dimensions  Of "descore" only, see `rm.data.read_pairs`.
    columns     The same: the table's own names of the columns.

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
        return read_pairs(
            path, require_cot=False, dimensions=dimensions, columns=columns
        )

    # The published layouts.
    if dimension not in DIMENSIONS:
        names = ", ".join(DIMENSIONS)
        raise ValueError(f"{path}: dimension must be one of {names}, got {dimension!r}")
    places = LAYOUTS[layout]
    if layout == "videogen":
        places = places._replace(label=dimension)
    path = csv_file(Path(path))
    root = path.parent if videos is None else Path(videos)

    def make_pair(row: Mapping[str, str], word: str) -> Pair:
        label = read_label(word)
        if label is None:
            raise ValueError(
                f"{places.label} must be A, B, same or invalid, "
                f"got {row[places.label]!r:.80}"
            )
        files = [root / row[name].strip() for name in places[:2]]
        check_videos(files)
        labels = labels_in(row, places.labels)
        return Pair(prompt_in(row), *files, "", "", label, labels=labels)

    required = [*places[:3], "prompt"]
    return collect(path, required, places.label, make_pair, places.word_in)
