"""Match video files with their prompts, and score them in batches."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.csv_table import missing_columns, read_csv
from common.files import (
    check_text,
    natural_order,
    parse_json_line,
    read_lines,
)

if TYPE_CHECKING:
    from alignment.reward_check import RewardClip
    from common.types import RewardModel
    from launch.evaluation.results_table import Row
    from rm.video_check import VideoChecker

# Names of the column with the video's file.
VIDEO_COLUMNS = ("video", "file")
_EVERY_FRAME = 1e6


@dataclass(frozen=True)
class ScoreItem:
    """A video file and its prompt; ``name`` is the file as the user wrote it."""

    name: str
    path: Path
    prompt: str


def find_items(pattern: str | None, prompts: Path) -> list[ScoreItem]:
    """List the videos with their prompts, by the rules of `launch/score.py`.

    Raises ValueError that names the file, the row or the counts that do not match.
    """
    files = None
    if pattern is not None:
        files = sorted(glob.glob(pattern, recursive=True), key=natural_order)
        if not files:
            raise ValueError(f"--videos {pattern} matches no file")
        for file in files:
            check_text(file, f"the file name {file!r}")
    # A table names its videos; other files only hold prompts.
    table = _read_table(prompts)
    if table is None:
        return _pair_in_order(files, prompts, pattern)
    items = [ScoreItem(name, prompts.parent / name, prompt) for name, prompt in table]
    if files is None:
        return items

    # The pattern chooses among the videos of the table.
    chosen = {os.path.realpath(file) for file in files}
    named = {os.path.realpath(item.path) for item in items}
    missing = sorted(chosen - named)
    if missing:
        raise ValueError(
            f"{prompts} has no prompt for {len(missing)} of the videos, such as {missing[0]}"
        )
    return [item for item in items if os.path.realpath(item.path) in chosen]


def _pair_in_order(
    files: list[str] | None, prompts: Path, pattern: str | None
) -> list[ScoreItem]:
    """Give the n-th prompt of a file to the n-th video, and print the first and last pair."""
    from alignment.prompts import read_prompts
    from common.log import say

    texts = read_prompts(prompts)
    if files is None:
        columns = " or ".join(VIDEO_COLUMNS)
        raise ValueError(
            f"{prompts} names no videos (no column {columns}); give --videos"
        )
    if len(files) != len(texts):
        raise ValueError(
            f"{len(files)} videos match {pattern}, but {prompts} holds {len(texts)} prompts"
        )

    # Nothing but the order connects them, so the user should see it.
    items = []
    for file, text in zip(files, texts, strict=True):
        items.append(ScoreItem(file, Path(file), text))
    say(f"{len(items)} videos in natural order (2 before 10) get the prompts in order:")
    for item in dict.fromkeys((items[0], items[-1])):
        say(f"  {item.name}  {item.prompt!r:.80}")
    return items


@dataclass(frozen=True)
class _TableRow:
    """A row of a table: where it is, its video (None if it was not kept) and its prompt."""

    where: str
    video: object
    prompt: object


def _read_table(path: Path) -> list[tuple[str, str]] | None:
    """Read (video, prompt) of every row; None for a file that names no videos.

    A row whose video is null is skipped: an evaluation keeps the first videos only.
    """
    try:
        rows = _read_rows(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    if rows is None:
        return None

    # Check every row, so that a mistake is found before a model is loaded.
    table = []
    for row in rows:
        if row.video is None and isinstance(row.prompt, str):
            continue
        for text in (row.video, row.prompt):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{row.where}: needs texts for the video and 'prompt'")
            check_text(text, f"{row.where}: {text[:40]!r}")
        table.append((row.video, row.prompt.strip()))
    if not table:
        raise ValueError(f"{path}: names no video")
    return table


def _read_rows(path: Path) -> list[_TableRow] | None:
    """Read the rows of a .csv or .jsonl that names its videos; None for other files.

    Only a .csv must name videos: a .jsonl may hold prompts alone.
    """
    if path.suffix == ".csv":
        return _read_csv_rows(path)
    if path.suffix != ".jsonl":
        return None
    # A .jsonl written by hand may lack the end of its last line, so `read_jsonl` would not do.
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json_line(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        rows.append((f"{path}:{number}", row if isinstance(row, dict) else {}))

    # A table names the video of every row, prompts alone name none.
    columns = {key for _, row in rows for key in row}
    names = [name for name in VIDEO_COLUMNS if name in columns]
    if not names:
        return None
    if len(names) > 1:
        raise ValueError(f"{path}: has the keys {' and '.join(names)}, one must go")
    return [
        _TableRow(where, row.get(names[0], ""), row.get("prompt"))
        for where, row in rows
    ]


def _read_csv_rows(path: Path) -> list[_TableRow]:
    """Read the rows of a .csv. Raises ValueError for the first bad row or a missing column."""
    table = read_csv(path)
    names = [name for name in VIDEO_COLUMNS if name in table.columns]
    if not names:
        wanted = " or ".join(VIDEO_COLUMNS)
        raise ValueError(
            f"{path}: needs the columns {wanted} and prompt, has {list(table.columns)}"
        )
    problem = missing_columns(table, ["prompt"])
    if problem:
        raise ValueError(problem)
    rows = []
    for row in table.rows:
        where = f"{path}:{row.line}"
        if row.problem:
            raise ValueError(f"{where}: {row.problem}")
        rows.append(_TableRow(where, row.cells[names[0]], row.cells["prompt"]))
    return rows


def share_of_prompts(
    items: Sequence[ScoreItem], missing: Collection[tuple[str, str]]
) -> list[ScoreItem]:
    """This rank's share of the prompts of which a video is missing, with all their videos.

    ``missing`` holds name and prompt of the videos without a row.
    """
    from common.distributed import rank, world_size

    prompts = sorted({prompt for _, prompt in missing})
    mine = set(prompts[rank() :: world_size()])
    return [item for item in items if item.prompt in mine]


def prompt_batches(
    items: Sequence[ScoreItem], size: int, label: str
) -> Iterator[list[ScoreItem]]:
    """Cut items into batches of whole prompts, of ``size`` videos unless a prompt has more."""
    from common.log import progress

    groups: dict[str, list[ScoreItem]] = {}
    for item in items:
        groups.setdefault(item.prompt, []).append(item)
    # fill each batch as long as the next prompt fits
    batches: list[list[ScoreItem]] = []
    for group in groups.values():
        if batches and len(batches[-1]) + len(group) <= size:
            batches[-1].extend(group)
        else:
            batches.append(list(group))
    yield from progress(batches, len(batches), label)


def check_groups(
    rewards: Mapping[str, RewardModel], items: Sequence[ScoreItem]
) -> None:
    """Raise ValueError for a reward that cannot compare as many videos as a prompt has."""
    from alignment.rewards import check_group_size

    sizes = set(Counter(item.prompt for item in items).values())
    for size in sorted(sizes):
        check_group_size(rewards, size)


def score_files(
    rewards: dict[str, RewardModel],
    items: Sequence[ScoreItem],
    checker: VideoChecker,
    *,
    max_frames: int,
) -> list[Row]:
    """Score some files with every reward; returns a row per file, in order.

    A row has an ``error`` that names the rewards without a score and their reasons. Raises
    ValueError when a file cannot be read or scored.
    """
    from alignment.reward_check import score_clips
    from common import progress as phases
    from launch.evaluation.results_table import score_fields

    # Another process decodes the files first, and dies of a broken one in our place.
    checker.require(*(item.path for item in items))
    clips = [read_clip(item, max_frames=max_frames) for item in items]
    scores = {}
    for name, reward in rewards.items():
        phases.enter(f"score/{name}")
        scores[name] = score_clips(reward, clips)
    rows = []
    for b in range(len(items)):
        row = score_fields(scores, b)
        reasons = []
        for name, score in scores.items():
            reason = score.reason(b)
            if reason:
                reasons.append(f"{name}: {reason}")
        if reasons:
            row["error"] = "; ".join(reasons)
        rows.append(row)
    return rows


def read_clip(item: ScoreItem, *, max_frames: int) -> RewardClip:
    """Read all frames of a file, or ``max_frames`` evenly spaced frames of a longer file.

    fps is that of the frames that were read. Raises `common.film.VideoError`, naming the file, when
    it is missing or broken.
    """
    from alignment.reward_check import RewardClip
    from common.film import Film
    from rm.config import VideoSettings
    from rm.video import frame_indices

    # At a rate above any video's every frame is read, up to the limit.
    film = Film(item.path)
    settings = VideoSettings(fps=_EVERY_FRAME, min_frames=1, max_frames=max_frames)
    indices = frame_indices(film.count, film.fps, settings)
    # The rate of the frames that are read, which a limit makes lower than the file's.
    fps = film.fps
    steps = len(indices) - 1
    if steps:
        seconds = indices[-1] / film.fps - indices[0] / film.fps
        fps = round(steps / seconds, 6)
    return RewardClip(film.frames(indices), fps, item.prompt)
