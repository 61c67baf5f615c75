"""Check that rewards order videos sensibly: a few of yours, with wrong prompts, and corrupted.

    python launch/check_rewards.py --config score.yaml --videos 'clips/*.mp4' \\
        --prompts prompts.jsonl

Takes the yaml of launch/score.py, and videos and prompts as it does. Prints the mean score for
every reward and every corruption, and on how many videos the score fell. Exits with code 1 when a
reward that reads prompts prefers wrong prompts or shuffled pixels on most videos: a wrong fps,
prompt format or checkpoint has this effect. Exits with code 1, too, when a reward scores no video.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.command import read_command
from launch.schemas.evaluation import ScoreRun

if TYPE_CHECKING:
    from alignment.reward_check import SensitivityResult


def main(argv: Sequence[str] | None = None) -> None:
    # The exit code is for scripts.
    command = read_command(ScoreRun, argv, description=__doc__, extend=add_options)
    args = command.args
    files = (args.videos, args.prompts)
    sensible = run_checks(command.cfg, *files, limit=args.limit, out=args.out)
    sys.exit(0 if sensible or args.no_fail else 1)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--videos", metavar="GLOB", help="video files, quoted: 'clips/*.mp4'")
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="PATH",
        help=".txt, .jsonl or .csv",
    )
    add("--limit", type=int, default=8, help="use the first LIMIT videos")
    add("--out", type=Path, metavar="FILE", help="also write all counts as JSON")
    add(
        "--no-fail",
        action="store_true",
        help="exit with 0 for a reward that is not sensible, too",
    )


def run_checks(
    cfg: ScoreRun,
    pattern: str | None,
    prompts: Path,
    *,
    limit: int,
    out: Path | None = None,
) -> bool:
    """Print the results of every reward, and write them to ``out`` as JSON if it is given.

    Returns False when a reward prefers wrong videos or scores none.
    """
    # Heavy imports come after the command line.
    from common.cli import user_errors
    from common.files import write_json
    from launch.compose import build_rewards, quiet
    from launch.evaluation.files import find_items, read_clip

    quiet()
    from alignment import reward_check
    from common.log import say

    # Everything here depends on what the user gave.
    with user_errors():
        items = find_items(pattern, prompts)[:limit]
        clips = [read_clip(item, max_frames=cfg.max_frames) for item in items]
        rewards = build_rewards(cfg.rewards)
        results = {
            name: reward_check.check(reward, clips) for name, reward in rewards.items()
        }

    # Counts and means of every corruption, by reward.
    if out is not None:
        record = {}
        for name, cases in results.items():
            record[name] = {result.case: result.as_dict() for result in cases}
        write_json(out, record)

    # Print a line for every corruption.
    sensible = True
    for name, cases in results.items():
        kind = "reads the prompt"
        if not reward_check.reads_prompt(cases):
            kind = "does not read the prompt, so no case has to lower its score"
        say(f"\n{name}, {len(clips)} videos, intact: mean {cases[0].right:.4f}; {kind}")
        disliked = reward_check.not_sensible(cases)
        for result in cases:
            say(f"  {result.case:>16}  {describe_result(result, disliked)}")
        if disliked or not any(result.scored for result in cases):
            sensible = False
    return sensible


def describe_result(result: SensitivityResult, disliked: Sequence[str]) -> str:
    """A line about a corruption; ``disliked`` are those that should have lowered the score."""
    # Heavy imports come after the command line.
    from alignment.reward_check import UNFAMILIAR

    text = (
        f"mean {result.spoilt:>10.4f}  fell {result.below}, same {result.same}, "
        f"rose {result.above}"
    )
    if result.unscored:
        text += f", {result.unscored} not scored"
    # What to make of it.
    if result.case in disliked:
        return f"{text}  <- NOT SENSIBLE"
    if result.changes_nothing:
        return f"{text}  <- makes no difference"
    if result.case in UNFAMILIAR:
        return f"{text}  (unfamiliar to most reward models, not counted)"
    return text


if __name__ == "__main__":
    main()
