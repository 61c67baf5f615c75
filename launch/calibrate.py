"""Calibrate a DeScore: store the mean and spread of its rewards on validation pairs.

    python launch/calibrate.py CHECKPOINT runs/eval_rm

Reads the results of `launch/evaluate.py rm` and writes mean and std of each reward dimension into
the checkpoint's calibration.json. `DeScoreScorer.load(path, calibrated=True)`, or
``calibrated: true`` among a reward's options, then gives z = (r - mean) / std. The weights stay
as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import command_parser, exit_with_error, user_errors
from common.files import read_jsonl

if TYPE_CHECKING:
    from launch.evaluation.results_table import Row


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", type=Path, help="folder of a DeScore")
    parser.add_argument(
        "evaluation", type=Path, help="folder that launch/evaluate.py rm wrote about it"
    )
    args = parser.parse_args()

    from rm.calibration import Calibration
    from rm.model import DESCORE_FILE, DeScore
    from rm.scorer import cots_of

    results = args.evaluation / "results.jsonl"
    settings = args.evaluation / "config.yaml"
    # Check that both folders are what they should be.
    for path in (args.checkpoint / DESCORE_FILE, results, settings):
        if not path.is_file():
            exit_with_error(f"there is no {path}")

    # Compute the calibration from the raw rewards.
    options = scorer_options(args.evaluation, args.checkpoint)
    with user_errors():
        rows = read_jsonl(results)
        rewards = rewards_by_dimension(rows, DeScore.dimensions_in(args.checkpoint))
        trained = DeScore.cot_in_training_of(args.checkpoint)
        # An evaluation of version 0.1 calls the option chains.
        cots = cots_of(trained, options.get("cots", options.get("chains")))
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
    for name, default in (("calibrated", False), ("value", "head")):
        if options.get(name, default) != default:
            exit_with_error(
                f"{evaluation} was made with options.{name}={options[name]}, "
                "so it does not hold the head's raw rewards"
            )
    return options


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
