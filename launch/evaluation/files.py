"""TODO."""

from __future__ import annotations

import csv
import glob
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel
    from launch.evaluation.results_table import Row
    from rm.video_check import VideoChecker


VIDEO_COLUMNS = ("video", "file")


_EVERY_FRAME = 1e6  # a sampling rate above any video's


@dataclass(frozen=True)
class ScoreItem:
    """One video to judge; ``name`` is how the user called it."""

    name: str
    path: Path
    prompt: str


def find_items(pattern: str | None, prompts: Path) -> list[ScoreItem]:
    """Videos with their prompts, see the top of this file. Raises ValueError naming the file, line or counts."""
    files = sorted(glob.glob(pattern, recursive=True)) if pattern is not None else None
    if files == []:
        raise ValueError(f"--videos {pattern} matches no file")
    table = _read_table(prompts)
    if table is None:
        from alignment.prompts import read_prompts

        texts = read_prompts(prompts)
        if files is None:
            raise ValueError(
                f"{prompts} names no videos (no column {' or '.join(VIDEO_COLUMNS)}); give --videos"
            )
        if len(files) != len(texts):
            raise ValueError(
                f"{len(files)} videos match {pattern}, but {prompts} holds {len(texts)} prompts"
            )
        return [
            ScoreItem(file, Path(file), text)
            for file, text in zip(files, texts, strict=True)
        ]
    items = [ScoreItem(name, prompts.parent / name, prompt) for name, prompt in table]
    if files is None:
        return items
    chosen = {os.path.realpath(file) for file in files}
    named = {os.path.realpath(item.path) for item in items}
    if missing := sorted(chosen - named):
        raise ValueError(
            f"{prompts} has no prompt for {len(missing)} of the videos, such as {missing[0]}"
        )
    return [item for item in items if os.path.realpath(item.path) in chosen]


def _read_table(path: Path) -> list[tuple[str, str]] | None:
    """(video, prompt) of a file that names its videos, None for one that does not. Null videos are skipped."""
    try:
        if path.suffix == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file)
                rows: list[Any] = list(reader)
                columns: Collection[str] = reader.fieldnames or ()
        elif path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8-sig").split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
            columns = rows[0] if rows and isinstance(rows[0], dict) else ()
        else:
            return None
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    column = next((c for c in VIDEO_COLUMNS if c in columns), None)
    if column is None or "prompt" not in columns:
        if path.suffix == ".csv":
            raise ValueError(
                f"{path}: needs the columns {' or '.join(VIDEO_COLUMNS)} and prompt"
            )
        return None
    found = []
    for number, row in enumerate(rows, start=1):
        video, prompt = (
            (row.get(name) for name in (column, "prompt"))
            if isinstance(row, dict)
            else (None, None)
        )
        if isinstance(row, dict) and video is None and isinstance(prompt, str):
            continue  # an evaluation keeps the first videos only
        if (
            not isinstance(video, str)
            or not isinstance(prompt, str)
            or not video
            or not prompt.strip()
        ):
            raise ValueError(
                f"{path}: row {number} needs texts under {column!r} and 'prompt'"
            )
        found.append((video, prompt.strip()))
    if not found:
        raise ValueError(f"{path}: names no video")
    return found


def judge_batch(
    rewards: dict[str, RewardModel],
    items: Sequence[ScoreItem],
    checker: VideoChecker,
    *,
    max_frames: int,
) -> list[Row]:
    """Rewards of some files, in order. Raises ValueError when one cannot be read or judged."""
    from alignment.clips import RewardClip, score_clips
    from launch.evaluation.results_table import score_fields

    checker.require(*(item.path for item in items))
    read = [
        (item.prompt, read_clip(item.path, max_frames=max_frames)) for item in items
    ]
    clips = [RewardClip(clip.frames_TYXC, clip.fps, prompt) for prompt, clip in read]
    scores = {name: score_clips(reward, clips) for name, reward in rewards.items()}
    return [score_fields(scores, b) for b in range(len(items))]


@dataclass(frozen=True)
class WholeClip:
    """uint8 frames (T, Y, X, 3) and how many of them make a second."""

    frames_TYXC: Tensor
    fps: float


def read_clip(path: Path, *, max_frames: int) -> WholeClip:
    """All frames of a file, or ``max_frames`` evenly spaced ones of a longer file, whose fps is lower accordingly.

    Raises `rm.video.VideoError`, naming the file, when it is missing, broken or has fewer than two frames.
    """
    from rm.config import VideoSettings
    from rm.video import VideoError, read_video

    clip = read_video(
        path, VideoSettings(fps=_EVERY_FRAME, min_frames=1, max_frames=max_frames)
    )
    if len(clip.times) < 2:
        raise VideoError(f"{path}: has one frame only")
    seconds = clip.times[-1] - clip.times[0]
    return WholeClip(clip.frames_TYXC, round((len(clip.times) - 1) / seconds, 6))
