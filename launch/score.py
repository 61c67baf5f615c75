"""Let rewards judge video files.

    python launch/score.py --config score.yaml --videos 'clips/*.mp4' --prompts prompts.jsonl --out scores.jsonl
    python launch/score.py --config score.yaml --prompts table.csv --out scores.jsonl

A .csv or .jsonl with the columns ``video`` (or ``file``) and ``prompt`` names its videos itself, relative to where it
is; --videos then only chooses among them. Any other .txt or .jsonl holds one prompt for each of --videos, in the order
of their names. Every line of the output has the reward of each plug-in, its parts and its text (the chain of thought).
A video that cannot be read or judged has ``error`` and null rewards, and is tried again by the next call; what is done
is not done again. Files are decoded in a process of their own first: one that kills its decoder costs a line. Works
under a launcher too: ranks share the videos.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import RewardConfig
from alignment.rewards import factory_of
from launch.command import read_command

if TYPE_CHECKING:
    from torch import Tensor

    from common.types import RewardModel
    from launch.rows import Row
    from rm.video_check import VideoChecker

VIDEO_COLUMNS = ("video", "file")
_EVERY_FRAME = 1e6  # a sampling rate above any video's


@dataclass(frozen=True)
class ScoreRun:
    """Which rewards judge, and how.

    rewards     as in a training run; weights are ignored
    batch       videos read and judged at once; of those, the ones of one size and rate share a forward
    max_frames  a longer video is judged on this many of its frames, evenly spaced
    """

    rewards: dict[str, RewardConfig]
    batch: int = 8
    max_frames: int = 512

    def __post_init__(self) -> None:
        problems = [f"{n} must be at least 1, got {getattr(self, n)}" for n in ("batch",) if getattr(self, n) < 1]
        if self.max_frames < 2:
            problems.append(f"max_frames must be at least 2, got {self.max_frames}")
        if not self.rewards:
            problems.append("rewards must name at least one reward, got none")
        if problems:
            raise ValueError("; ".join(f"ScoreRun.{problem}" for problem in problems))
        for name, reward in self.rewards.items():
            factory_of(name, reward)


@dataclass(frozen=True)
class Item:
    """One video to judge; ``name`` is how the user called it."""

    name: str
    path: Path
    prompt: str


def main(argv: Sequence[str] | None = None) -> None:
    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--videos", metavar="GLOB", help="video files, quoted: 'clips/*.mp4'")
        parser.add_argument("--prompts", type=Path, required=True, metavar="PATH", help=".txt, .jsonl or .csv")
        parser.add_argument("--out", type=Path, required=True, metavar="PATH", help="the .jsonl to write")

    command = read_command(ScoreRun, argv, description=__doc__.splitlines()[0], extend=extend)
    args = command.args
    failed = score(command.cfg, args.videos, args.prompts, args.out, resume=command.resume)
    sys.exit(1 if failed else 0)


def score(cfg: ScoreRun, pattern: str | None, prompts: Path, out: Path, *, resume: str = "auto") -> bool:
    """Judge what is not judged yet; True when not one video could be."""
    from launch.refuse import refusing
    from launch.rows import all_ranks

    with all_ranks():
        from common.log import say
        from common.run_record import plain
        from launch.rows import RowTable, fingerprint

        with refusing():
            items = find_items(pattern, prompts)
            if out.suffix != ".jsonl":
                raise ValueError(f"--out must end in .jsonl, got {out}")
            checkpoints = {r.checkpoint: fingerprint(r.checkpoint) for r in cfg.rewards.values() if r.checkpoint}
            settings = {"rewards": plain(cfg.rewards), "max_frames": cfg.max_frames, "files": checkpoints}
            table = RowTable(out, identity=settings, key=("video", "prompt"), resume=resume, retry="error")
        asked = {(item.name, item.prompt): item for item in items}
        own = [asked[key] for key in table.share(asked)]
        say(f"{sum(key not in table.done for key in asked)} of {len(asked)} videos to judge")
        if own:
            _judge(cfg, own, table)
        others = [key for key in table.done if key not in asked]  # of earlier calls; they stay
        rows = table.finish([*asked, *others])[: len(asked)]
    return _report(rows, list(cfg.rewards), out)


def find_items(pattern: str | None, prompts: Path) -> list[Item]:
    """Videos with their prompts, see the top of this file. Raises ValueError naming the file, line or counts."""
    files = sorted(glob.glob(pattern, recursive=True)) if pattern is not None else None
    if files == []:
        raise ValueError(f"--videos {pattern} matches no file")
    table = _read_table(prompts)
    if table is None:
        from alignment.data import read_prompts

        texts = read_prompts(prompts)
        if files is None:
            raise ValueError(f"{prompts} names no videos (no column {' or '.join(VIDEO_COLUMNS)}); give --videos")
        if len(files) != len(texts):
            raise ValueError(f"{len(files)} videos match {pattern}, but {prompts} holds {len(texts)} prompts")
        return [Item(file, Path(file), text) for file, text in zip(files, texts, strict=True)]
    items = [Item(name, prompts.parent / name, prompt) for name, prompt in table]
    if files is None:
        return items
    chosen = {os.path.realpath(file) for file in files}
    named = {os.path.realpath(item.path) for item in items}
    if missing := sorted(chosen - named):
        raise ValueError(f"{prompts} has no prompt for {len(missing)} of the videos, such as {missing[0]}")
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
            raise ValueError(f"{path}: needs the columns {' or '.join(VIDEO_COLUMNS)} and prompt")
        return None
    found = []
    for number, row in enumerate(rows, start=1):
        video, prompt = (row.get(name) for name in (column, "prompt")) if isinstance(row, dict) else (None, None)
        if isinstance(row, dict) and video is None and isinstance(prompt, str):
            continue  # an evaluation keeps the first videos only
        if not isinstance(video, str) or not isinstance(prompt, str) or not video or not prompt.strip():
            raise ValueError(f"{path}: row {number} needs texts under {column!r} and 'prompt'")
        found.append((video, prompt.strip()))
    if not found:
        raise ValueError(f"{path}: names no video")
    return found


def _judge(cfg: ScoreRun, own: list[Item], table: Any) -> None:
    from common.log import progress, say
    from launch.compose import build_rewards, quiet
    from launch.refuse import refusing
    from launch.rows import attempt, batches
    from rm.video_check import VideoChecker

    quiet()
    say(f"loading the rewards {', '.join(cfg.rewards)}")
    with refusing():
        rewards = build_rewards(cfg.rewards)
    unjudged = {"rewards": dict.fromkeys(rewards), "parts": {}, "texts": {}}
    with VideoChecker(frames=cfg.max_frames) as checker:
        for part in progress(batches(own, cfg.batch), -(-len(own) // cfg.batch), "score"):
            judged = attempt(lambda items: judge_batch(rewards, items, checker, max_frames=cfg.max_frames), part)
            table.add(
                [
                    {"video": item.name, "prompt": item.prompt, **(unjudged if "error" in row else {}), **row}
                    for item, row in zip(part, judged, strict=True)
                ]
            )


def judge_batch(
    rewards: dict[str, RewardModel], items: Sequence[Item], checker: VideoChecker, *, max_frames: int
) -> list[Row]:
    """Rewards of some files, in order. Raises ValueError when one cannot be read or judged."""
    from alignment.clips import Clip, score_clips
    from launch.rows import score_fields

    checker.require(*(item.path for item in items))
    read = [(item.prompt, read_clip(item.path, max_frames=max_frames)) for item in items]
    clips = [Clip(clip.frames_TYXC, clip.fps, prompt) for prompt, clip in read]
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

    clip = read_video(path, VideoSettings(fps=_EVERY_FRAME, min_frames=1, max_frames=max_frames))
    if len(clip.times) < 2:
        raise VideoError(f"{path}: has one frame only")
    seconds = clip.times[-1] - clip.times[0]
    return WholeClip(clip.frames_TYXC, round((len(clip.times) - 1) / seconds, 6))


def _report(rows: Sequence[Row], rewards: Sequence[str], out: Path) -> bool:
    """Say what came out; True when nothing could be judged."""
    from common.log import say

    failures = [row for row in rows if "error" in row]
    for name in rewards:
        values = [row["rewards"][name] for row in rows if row["rewards"][name] is not None]
        mean = f"mean {sum(values) / len(values):.4f} over {len(values)} videos" if values else "no video judged"
        unjudged = len(rows) - len(failures) - len(values)
        say(f"{name:>24}  {mean}" + (f", {unjudged} could not be judged" if unjudged else ""))
    for row in failures[:5]:
        say(f"  {row['video']}: {row['error']}")
    say(f"{len(rows) - len(failures)} rows and {len(failures)} failures are in {out}")
    return len(failures) == len(rows)


if __name__ == "__main__":
    main()
