"""Calibrate a DeScore: store the mean and spread of its rewards on validation pairs.

    python launch/calibrate.py CHECKPOINT runs/eval_rm
    python launch/calibrate.py CHECKPOINT runs/eval_rm --fast runs/eval_fast

Reads the results of `launch/evaluate.py rm` and writes mean and std of each reward dimension into
the checkpoint's calibration.json. `DeScoreScorer.load(path, calibrated=True)`, or
``calibrated: true`` among a reward's options, then gives z = (r - mean) / std. The weights stay
as they are.

With --fast it chooses when the model thinks instead, and writes the checkpoint's thinking.json:
``thinking: adaptive`` among a reward's options then scores fast where the order is sure.
runs/eval_fast is the same evaluation with ``options.cots=0``. The pairs must be held out, and like
those that will be scored. A run that scores groups needs --groups too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import command_parser, exit_with_error, user_errors
from common.files import read_jsonl

if TYPE_CHECKING:
    from launch.evaluation.results_table import Row
    from rm.cascade import Threshold
    from rm.config import CotInTraining


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a DeScore")
    parser.add_argument(
        "evaluation", type=Path, help="folder that launch/evaluate.py rm wrote about it"
    )
    add_thinking_options(parser)
    args = parser.parse_args()

    from rm.calibration import Calibration
    from rm.model import DESCORE_FILE, DeScore

    results = args.evaluation / "results.jsonl"
    # Check that both folders are what they should be.
    needed = [args.checkpoint / DESCORE_FILE]
    for folder in (args.evaluation, args.fast):
        if folder is not None:
            needed += [folder / "results.jsonl", folder / "config.yaml"]
    needed += args.groups or []
    for path in needed:
        if not path.is_file():
            exit_with_error(f"there is no {path}")
    if args.fast is not None:
        choose_thinking(args)
        return
    if args.groups is not None:
        exit_with_error("--groups needs --fast, which gives the common scale")

    # Compute the calibration from the raw rewards.
    options = scorer_options(args.evaluation, args.checkpoint)
    with user_errors():
        rows = read_jsonl(results)
        rewards = rewards_by_dimension(rows, DeScore.dimensions_in(args.checkpoint))
        trained = DeScore.cot_in_training_of(args.checkpoint)
        cots = cots_in(options, trained)
        calibration = Calibration.of(rewards, cots=cots)

    # Store it in the same folder as the weights.
    path = calibration.save(args.checkpoint)
    print(f"{path}: from {calibration.videos} videos")
    for name, mean in calibration.mean.items():
        print(f"{name:>24}  mean {mean:8.4f}  std {calibration.std[name]:8.4f}")
    print(
        f"next: rewards.descore.checkpoint={args.checkpoint} "
        "rewards.descore.options.calibrated=true in a run that scores with it"
    )


def add_thinking_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the thresholds from which fast scores decide."""
    add = parser.add_argument
    add(
        "--fast",
        type=Path,
        metavar="EVALUATION",
        help="the same evaluation with options.cots=0: choose when the model thinks",
    )
    add(
        "--groups",
        type=Path,
        nargs=2,
        metavar=("FAST", "SLOW"),
        help="scores of the same videos by launch/score.py, several of each prompt, "
        "with options.cots=0 and behind chains of thought",
    )
    add(
        "--method",
        choices=("clopper_pearson", "crc"),
        default="clopper_pearson",
        help="clopper_pearson: the risk is at most alpha with probability 1 - delta; "
        "crc: its mean is at most alpha",
    )
    add(
        "--risk",
        choices=("harm", "disagreement"),
        default="harm",
        help="of pairs: a right order that thinking would have found, or any other order",
    )
    add("--alpha", type=_share, default=0.02, help="bound of the risk of a pair")
    add(
        "--group-alpha",
        type=_share,
        default=0.05,
        help="bound of the share of a group's pairs whose order differs",
    )
    add("--delta", type=_share, default=0.05)


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def choose_thinking(args: argparse.Namespace) -> None:
    """Choose the thresholds, store them beside the weights, and print what they promise."""
    from common.files import sha256
    from launch.evaluation.thinking import Guarantee, HeldoutPairs, thinking_from
    from rm.model import DeScore

    # The evaluations must differ in the chain of thought alone.
    slow_options = scorer_options(args.evaluation, args.checkpoint)
    fast_options = scorer_options(args.fast, args.checkpoint)
    trained = DeScore.cot_in_training_of(args.checkpoint)
    cots = cots_in(slow_options, trained)
    if cots == 0 or cots_in(fast_options, trained) != 0:
        exit_with_error(
            f"{args.fast} must be made with options.cots=0, and {args.evaluation} with "
            "chains of thought"
        )
    # The thresholds, and what they were made of.
    with user_errors():
        if len(DeScore.dimensions_in(args.checkpoint)) > 1:
            raise ValueError("thinking=adaptive needs a single reward dimension")
        files = []
        for folder in (args.fast, args.evaluation):
            files.append(sha256(folder / "results.jsonl"))
        thinking = thinking_from(
            HeldoutPairs.read(args.fast, args.evaluation),
            Guarantee(args.method, args.risk, args.alpha, args.delta),
            cots=cots,
            files=files,
            groups=args.groups,
            group_promise=Guarantee(
                args.method, "disagreement", args.group_alpha, args.delta
            ),
        )
    # Store them in the same folder as the weights.
    path = thinking.save(args.checkpoint)
    print(f"{path}: sigma {thinking.sigma:.4f}, slope {thinking.slope:.4f}")
    for what, threshold in (("pairs", thinking.pairs), ("groups", thinking.groups)):
        if threshold is not None:
            print(f"{what:>8}  {describe_threshold(threshold)}")
    print(
        f"next: rewards.descore.checkpoint={args.checkpoint} "
        "rewards.descore.options.thinking=adaptive in a run that scores with it"
    )


def describe_threshold(threshold: Threshold) -> str:
    """A threshold and its promise in a line."""
    if threshold.confidence is None:
        return (
            f"WARNING: no threshold keeps the {threshold.risk} at {threshold.alpha:g} with "
            f"{threshold.n} items: the model always thinks"
        )
    # What the bound is a bound of.
    promise = f"in {1 - threshold.delta:.0%} of calibrations"
    if threshold.method == "crc":
        promise = "in the mean"
    return (
        f"fast from confidence {threshold.confidence:.4f}: {threshold.risk} at most "
        f"{threshold.alpha:g} {promise}, {threshold.losses:g} of {threshold.n} here; "
        f"thinks about {threshold.thought:.1%}"
    )


def scorer_options(evaluation: Path, checkpoint: Path) -> dict[str, Any]:
    """Return the scorer's options of an evaluation.

    Exits with code 2 if it is about another checkpoint, or about other values than raw rewards.
    """
    from launch.reporting.data import config

    cfg = config(evaluation)
    if Path(cfg["checkpoint"]).resolve() != checkpoint.resolve():
        exit_with_error(f"{evaluation} is about {cfg['checkpoint']}, not {checkpoint}")
    # Only the head's raw rewards can be calibrated.
    options = cfg.get("options") or {}
    for name, raw in (
        ("calibrated", (False,)),
        ("value", ("head",)),
        ("thinking", ("always", "never")),
    ):
        if options.get(name, raw[0]) not in raw:
            exit_with_error(
                f"{evaluation} was made with options.{name}={options[name]}, "
                "so it does not hold the head's raw rewards"
            )
    return options


def cots_in(options: dict[str, Any], trained: CotInTraining | None) -> int:
    """CoTs of each score of an evaluation with these options."""
    from rm.scorer import cots_of

    if options.get("thinking") == "never":
        return 0
    # An evaluation of version 0.1 calls the option chains.
    return cots_of(trained, options.get("cots", options.get("chains")))


def rewards_by_dimension(
    rows: list[Row], dimensions: list[str]
) -> dict[str, list[float | None]]:
    """Collect the rewards of both videos of every pair, by dimension."""
    from launch.evaluation.preference import reward_of

    rewards = {}
    for name in dimensions:
        # A DeScore with a single dimension logs no parts.
        part = name if len(dimensions) > 1 else None
        rewards[name] = [reward_of(row, side, part) for row in rows for side in "AB"]
    return rewards


if __name__ == "__main__":
    main()
