"""Match video files with their prompts, and score them in batches."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

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
        files = sorted(glob.glob(pattern, recursive=True))
        if not files:
            raise ValueError(f"--videos {pattern} matches no file")
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
    """Give the n-th prompt of a file to the n-th video."""
    from alignment.prompts import read_prompts

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
    pairs = zip(files, texts, strict=True)
    return [ScoreItem(file, Path(file), text) for file, text in pairs]


def _read_table(path: Path) -> list[tuple[str, str]] | None:
    """Read (video, prompt) of every row; None for a file that names no videos.

    A row whose video is null is skipped: an evaluation keeps the first videos only.
    """
    try:
        rows, columns = _read_rows(path)
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    # Only a .csv must name videos: a .jsonl may hold prompts alone.
    names = [name for name in VIDEO_COLUMNS if name in columns]
    if not names or "prompt" not in columns:
        if path.suffix == ".csv":
            wanted = " or ".join(VIDEO_COLUMNS)
            raise ValueError(f"{path}: needs the columns {wanted} and prompt")
        return None

    # Check every row, so that a mistake is found before a model is loaded.
    table = []
    for number, row in enumerate(rows, start=1):
        video = row.get(names[0]) if isinstance(row, dict) else ""
        prompt = row.get("prompt") if isinstance(row, dict) else ""
        if video is None and isinstance(prompt, str):
            continue
        texts = isinstance(video, str) and isinstance(prompt, str)
        if not texts or not video or not prompt.strip():
            raise ValueError(
                f"{path}: row {number} needs texts under {names[0]!r} and 'prompt'"
            )
        table.append((video, prompt.strip()))
    if not table:
        raise ValueError(f"{path}: names no video")
    return table


def _read_rows(path: Path) -> tuple[list[Any], Sequence[str]]:
    """Read the rows and the column names of a .csv or .jsonl; other files have none.

    A .jsonl written by hand may lack the end of its last line, so `read_rows` would not do.
    """
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            rows: list[Any] = list(reader)
            return rows, reader.fieldnames or ()
    if path.suffix != ".jsonl":
        return [], ()
    # The first row of a .jsonl has the names of its columns.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()]
    columns = rows[0] if rows and isinstance(rows[0], dict) else ()
    return rows, list(columns)


def score_files(
    rewards: dict[str, RewardModel],
    items: Sequence[ScoreItem],
    checker: VideoChecker,
    *,
    max_frames: int,
) -> list[Row]:
    """Score some files with every reward; returns a row per file, in order.

    Raises ValueError when a file cannot be read or scored.
    """
    from alignment.reward_check import RewardClip, score_clips
    from launch.evaluation.results_table import score_fields

    # Another process decodes the files first, and dies of a broken one in our place.
    checker.require(*(item.path for item in items))
    clips = []
    for item in items:
        clip = read_clip(item.path, max_frames=max_frames)
        clips.append(RewardClip(clip.frames_TYXC, clip.fps, item.prompt))
    scores = {name: score_clips(reward, clips) for name, reward in rewards.items()}
    return [score_fields(scores, b) for b in range(len(items))]


@dataclass(frozen=True)
class WholeClip:
    """uint8 frames (T, Y, X, 3) and their number per second."""

    frames_TYXC: Tensor
    fps: float


def read_clip(path: Path, *, max_frames: int) -> WholeClip:
    """Read all frames of a file, or ``max_frames`` evenly spaced frames of a longer file.

    fps is that of the frames that were read. Raises `common.film.VideoError`, naming the file, when
    it is missing or broken.
    """
    from common.film import Film
    from rm.config import VideoSettings
    from rm.video import frame_indices

    # At a rate above any video's every frame is read, up to the limit.
    film = Film(path)
    settings = VideoSettings(fps=_EVERY_FRAME, min_frames=1, max_frames=max_frames)
    indices = frame_indices(film.count, film.fps, settings)
    # The rate of the frames that are read, which a limit makes lower than the file's.
    fps = film.fps
    steps = len(indices) - 1
    if steps:
        seconds = indices[-1] / film.fps - indices[0] / film.fps
        fps = round(steps / seconds, 6)
    return WholeClip(film.frames(indices), fps)
