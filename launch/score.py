"""Score video files with rewards.

    python launch/score.py --config score.yaml --videos 'clips/*.mp4' --prompts p.txt --out s.jsonl
    python launch/score.py --config score.yaml --prompts table.csv --out s.jsonl

A .csv or .jsonl with the columns ``video`` (or ``file``) and ``prompt`` names its videos itself,
relative to its folder; --videos then only chooses among them. Any other .txt or .jsonl holds a
prompt for each of --videos, in the natural order of their names: 2.mp4 before 10.mp4. Every row of
the output has the value of each reward, its parts and its text (the chain of thought).

A video that cannot be read or scored gets ``error`` and null rewards, and the next call tries it
again; finished rows are not repeated while their files keep their content. A DeScore with
``thinking: adaptive`` scores all videos of a prompt together, and again if one of them is missing.
Another process decodes each file first, so that a file that kills its decoder costs a single row.
Under a launcher, ranks share the videos.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.command import run_command
from launch.evaluation.files import (
    ScoreItem,
    find_items,
    score_files,
    share_of_prompts,
)
from launch.schemas.evaluation import ScoreRun

if TYPE_CHECKING:
    from common.config import CommandLine
    from launch.evaluation.results_table import ResultsTable, Row


def main(argv: Sequence[str] | None = None) -> None:
    """Score the files of the command line; exit code 1 if no video could be scored."""

    # Flags beside those of every command.
    def extend(parser: argparse.ArgumentParser) -> None:
        add = parser.add_argument
        add("--videos", metavar="GLOB", help="video files, quoted: 'clips/*.mp4'")
        add("--prompts", type=Path, required=True, help=".txt, .jsonl or .csv")
        add("--out", type=Path, required=True, help="the .jsonl to write")

    def run(command: CommandLine[ScoreRun]) -> bool:
        args = command.args
        return score(
            command.cfg, args.videos, args.prompts, args.out, resume=command.resume
        )

    failed = run_command(ScoreRun, run, argv, description=__doc__, extend=extend)
    sys.exit(1 if failed else 0)


def score(
    cfg: ScoreRun,
    pattern: str | None,
    prompts: Path,
    out: Path,
    *,
    resume: str = "auto",
) -> bool:
    """Score the videos that have no row yet; True when no video could be scored."""
    from common.cli import user_errors
    from launch.evaluation.results_table import all_ranks

    with all_ranks():
        from common.log import say

        # A video that is listed twice with the same prompt has a single row.
        with user_errors():
            listed = find_items(pattern, prompts)
            table = open_scores(cfg, listed, out, resume)
        items = {(item.name, item.prompt): item for item in listed}
        if len(items) < len(listed):
            say(
                f"{len(listed) - len(items)} of {len(listed)} rows repeat the video and prompt "
                "of an earlier row and are scored once"
            )
        missing = [key for key in items if key not in table.done]
        say(f"{len(missing)} of {len(items)} videos to score")
        # This rank scores its share of them.
        if any(reward.thinks_when_unsure(name) for name, reward in cfg.rewards.items()):
            share = share_of_prompts(list(items.values()), missing)
        else:
            share = [items[key] for key in table.share(items)]
        if share:
            score_share(cfg, share, table)

        # Rows of earlier calls follow those of this call.
        others = [key for key in table.done if key not in items]
        rows = table.finish([*items, *others])[: len(items)]
    return report(rows, list(cfg.rewards), out)


def open_scores(
    cfg: ScoreRun, items: Sequence[ScoreItem], out: Path, resume: str
) -> ResultsTable:
    """Open the output as a table. Raises ValueError if it holds scores of other settings.

    Rows with an error are scored again, and rows of files whose content has changed.
    """
    from common.log import say
    from common.run_record import plain
    from launch.evaluation.results_table import ResultsTable, failed, fingerprint

    if out.suffix != ".jsonl":
        raise ValueError(f"--out must end in .jsonl, got {out}")
    # A row depends on the rewards, and on the content of their weights and code.
    files = {}
    for reward in cfg.rewards.values():
        for file in reward.files:
            files[file] = fingerprint(file)
    identity = {
        "rewards": plain(cfg.rewards),
        "max_frames": cfg.max_frames,
        "files": files,
    }
    paths = {item.name: item.path for item in items}

    def replaced(row: Row) -> bool:
        # Rows of an earlier version name no content, and stay; so do those of deleted files.
        path = paths.get(row["video"])
        content = None if path is None else content_of(path)
        if content is None or row.get("sha256") in (None, content):
            return False
        say(f"{path} is not the file that {out} scored; it is scored again")
        return True

    return ResultsTable(
        out,
        identity=identity,
        key=("video", "prompt"),
        resume=resume,
        retry=lambda row: failed(row) or replaced(row),
    )


def content_of(path: Path) -> str | None:
    """Return the SHA-256 of a file, None if there is none."""
    from common.files import sha256

    return sha256(path) if path.is_file() else None


def score_share(cfg: ScoreRun, items: list[ScoreItem], table: ResultsTable) -> None:
    """Score this rank's videos, batch by batch, and add their rows to the table."""
    from common.cli import user_errors
    from common.log import say
    from launch.compose import build_rewards, quiet
    from launch.evaluation.files import check_groups, prompt_batches
    from launch.evaluation.results_table import attempt, batches
    from rm.video_check import VideoChecker

    quiet()
    say(f"loading the rewards {', '.join(cfg.rewards)}")
    with user_errors():
        rewards = build_rewards(cfg.rewards)
        check_groups(rewards, items)
    # The fields of a video that could not be read or scored.
    no_scores = {
        "rewards": dict.fromkeys(rewards),
        "parts": {},
        "texts": {},
    }
    with VideoChecker(frames=cfg.max_frames) as checker:

        def score_batch(part: Sequence[ScoreItem]) -> list[Row]:
            return score_files(rewards, part, checker, max_frames=cfg.max_frames)

        by_prompt = any(
            getattr(reward, "groups_by_prompt", False) for reward in rewards.values()
        )
        cut = prompt_batches if by_prompt else batches
        for batch in cut(items, cfg.batch, "score"):
            rows = []
            scored = attempt(score_batch, batch)
            for item, fields in zip(batch, scored, strict=True):
                row = {"video": item.name, "prompt": item.prompt}
                row["sha256"] = content_of(item.path)
                # a file that could not be read has an error alone
                rows.append(row | no_scores | fields)
            table.add(rows)


def report(rows: Sequence[Row], rewards: Sequence[str], out: Path) -> bool:
    """Print the spread of every reward, the first failures and the next step.

    Returns True when no reward could score any video.
    """
    from common.log import say

    nothing = True
    failures = [row for row in rows if "error" in row]
    for name in rewards:
        values = [row["rewards"][name] for row in rows]
        scored = [value for value in values if value is not None]
        line = "no video could be scored"
        if scored:
            nothing = False
            line = describe_values(scored)
        missing = len(rows) - len(scored)
        if missing:
            line += f", {missing} missing"
        say(f"{name:>24}  {line}")
    # The first failures show what is wrong with most of them.
    for row in failures[:5]:
        say(f"  {row['video']}: {row['error']}")
    say(f"{len(rows) - len(failures)} rows and {len(failures)} failures are in {out}")
    if not nothing:
        say(
            "next: launch/check_rewards.py with the same videos and prompts shows whether "
            "these rewards order videos sensibly"
        )
    return nothing


def describe_values(values: Sequence[float]) -> str:
    """Mean, extremes and percentiles of a reward, over the videos that have it."""
    line = f"mean {sum(values) / len(values):.4f} over {len(values)} videos"
    if len(values) < 2:
        return line
    # Linear between the sorted values, as numpy.percentile.
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    named = {
        "min": min(values),
        "5 %": cuts[0],
        "median": cuts[9],
        "95 %": cuts[18],
        "max": max(values),
    }
    return line + "".join(f", {name} {value:.4f}" for name, value in named.items())


if __name__ == "__main__":
    main()
