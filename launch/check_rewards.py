"""Do rewards order videos sensibly? A handful of yours, with right and wrong prompts, and spoilt.

    python launch/check_rewards.py --config score.yaml --videos 'clips/*.mp4' --prompts prompts.jsonl

Takes the yaml of launch/score.py, and videos and prompts as it does. Prints, for every reward and every way to spoil a
video, the mean score and on how many videos it fell. Exit code 1 when a reward prefers wrong prompts or noise: a wrong
fps, prompt format or checkpoint looks like this.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.command import read_command
from launch.schemas.evaluation import ScoreRun


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
            "--limit",
            type=int,
            default=8,
            help="videos that are looked at, the first ones",
        )

    command = read_command(
        ScoreRun, argv, description=__doc__.splitlines()[0], extend=extend
    )
    args = command.args
    sys.exit(0 if look(command.cfg, args.videos, args.prompts, limit=args.limit) else 1)


def look(cfg: ScoreRun, pattern: str | None, prompts: Path, *, limit: int) -> bool:
    """Print what comes out; False when a reward prefers what no reward may."""
    from common.cli import exit_with_error, user_errors
    from launch.compose import build_rewards, quiet
    from launch.evaluation.files import find_items, read_clip

    quiet()
    from alignment import reward_check
    from alignment.clips import RewardClip
    from common.log import say

    with user_errors():
        items = find_items(pattern, prompts)[:limit]
        read = [
            (item, read_clip(item.path, max_frames=cfg.max_frames)) for item in items
        ]
        clips = [
            RewardClip(clip.frames_TYXC, clip.fps, item.prompt) for item, clip in read
        ]
        rewards = build_rewards(cfg.rewards)
    try:
        found = {
            name: reward_check.check(reward, clips) for name, reward in rewards.items()
        }
    except ValueError as error:
        exit_with_error(str(error))
    good = True
    for name, verdicts in found.items():
        say(f"\n{name}, {len(clips)} videos as they are: mean {verdicts[0].right:.4f}")
        for one in verdicts:
            counts = f"fell {one.below}, same {one.same}, rose {one.above}"
            missing = f", {one.unjudged} not judged" if one.unjudged else ""
            wrong = one.case in reward_check.MUST and one.above > one.below
            good &= not wrong
            blind = one.case in reward_check.MUST and one.same == len(clips)
            remark = (
                "  <- NOT SENSIBLE"
                if wrong
                else "  <- makes no difference to it"
                if blind
                else ""
            )
            say(
                f"  {one.case:>16}  mean {one.spoilt:>10.4f}  {counts}{missing}{remark}"
            )
    return good


if __name__ == "__main__":
    main()
