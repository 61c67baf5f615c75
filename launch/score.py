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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.command import read_command
from launch.evaluation.files import ScoreItem, find_items, judge_batch
from launch.schemas.evaluation import ScoreRun

if TYPE_CHECKING:
    from launch.evaluation.results_table import Row


def main(argv: Sequence[str] | None = None) -> None:
    def extend(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--videos", metavar="GLOB", help="video files, quoted: 'clips/*.mp4'"
        )
        parser.add_argument(
            "--prompts",
            type=Path,
            required=True,
            metavar="PATH",
            help=".txt, .jsonl or .csv",
        )
        parser.add_argument(
            "--out",
            type=Path,
            required=True,
            metavar="PATH",
            help="the .jsonl to write",
        )

    command = read_command(
        ScoreRun, argv, description=__doc__.splitlines()[0], extend=extend
    )
    args = command.args
    failed = score(
        command.cfg, args.videos, args.prompts, args.out, resume=command.resume
    )
    sys.exit(1 if failed else 0)


def score(
    cfg: ScoreRun,
    pattern: str | None,
    prompts: Path,
    out: Path,
    *,
    resume: str = "auto",
) -> bool:
    """Judge what is not judged yet; True when not one video could be."""
    from common.cli import user_errors
    from launch.evaluation.results_table import all_ranks

    with all_ranks():
        from common.log import say
        from common.run_record import plain
        from launch.evaluation.results_table import ResultsTable, fingerprint

        with user_errors():
            items = find_items(pattern, prompts)
            if out.suffix != ".jsonl":
                raise ValueError(f"--out must end in .jsonl, got {out}")
            checkpoints = {
                r.checkpoint: fingerprint(r.checkpoint)
                for r in cfg.rewards.values()
                if r.checkpoint
            }
            settings = {
                "rewards": plain(cfg.rewards),
                "max_frames": cfg.max_frames,
                "files": checkpoints,
            }
            table = ResultsTable(
                out,
                identity=settings,
                key=("video", "prompt"),
                resume=resume,
                retry="error",
            )
        asked = {(item.name, item.prompt): item for item in items}
        own = [asked[key] for key in table.share(asked)]
        say(
            f"{sum(key not in table.done for key in asked)} of {len(asked)} videos to judge"
        )
        if own:
            _judge(cfg, own, table)
        others = [
            key for key in table.done if key not in asked
        ]  # of earlier calls; they stay
        rows = table.finish([*asked, *others])[: len(asked)]
    return _report(rows, list(cfg.rewards), out)


def _judge(cfg: ScoreRun, own: list[ScoreItem], table: Any) -> None:
    from common.cli import user_errors
    from common.log import progress, say
    from launch.compose import build_rewards, quiet
    from launch.evaluation.results_table import attempt, batches
    from rm.video_check import VideoChecker

    quiet()
    say(f"loading the rewards {', '.join(cfg.rewards)}")
    with user_errors():
        rewards = build_rewards(cfg.rewards)
    unjudged = {"rewards": dict.fromkeys(rewards), "parts": {}, "texts": {}}
    with VideoChecker(frames=cfg.max_frames) as checker:
        for part in progress(
            batches(own, cfg.batch), -(-len(own) // cfg.batch), "score"
        ):
            judged = attempt(
                lambda items: judge_batch(
                    rewards, items, checker, max_frames=cfg.max_frames
                ),
                part,
            )
            table.add(
                [
                    {
                        "video": item.name,
                        "prompt": item.prompt,
                        **(unjudged if "error" in row else {}),
                        **row,
                    }
                    for item, row in zip(part, judged, strict=True)
                ]
            )


def _report(rows: Sequence[Row], rewards: Sequence[str], out: Path) -> bool:
    """Say what came out; True when nothing could be judged."""
    from common.log import say

    failures = [row for row in rows if "error" in row]
    for name in rewards:
        values = [
            row["rewards"][name] for row in rows if row["rewards"][name] is not None
        ]
        mean = (
            f"mean {sum(values) / len(values):.4f} over {len(values)} videos"
            if values
            else "no video judged"
        )
        unjudged = len(rows) - len(failures) - len(values)
        say(
            f"{name:>24}  {mean}"
            + (f", {unjudged} could not be judged" if unjudged else "")
        )
    for row in failures[:5]:
        say(f"  {row['video']}: {row['error']}")
    say(f"{len(rows) - len(failures)} rows and {len(failures)} failures are in {out}")
    return len(failures) == len(rows)


if __name__ == "__main__":
    main()
