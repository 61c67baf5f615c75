"""Give a DeScore its zero and unit: `python launch/calibrate.py CHECKPOINT runs/eval_rm`.

Reads what `launch/evaluate.py rm` found on validation pairs and writes mean and spread of the rewards, each dimension
by itself, into the checkpoint's calibration.json. From then on `DeScoreScorer.load(path, calibrated=True)`, or
``calibrated: true`` among a reward's options, gives z = (r - mean) / std. The weights are not touched.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import exit_with_error

if TYPE_CHECKING:
    from launch.evaluation.results_table import Row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a DeScore")
    parser.add_argument(
        "evaluation", type=Path, help="folder that launch/evaluate.py rm wrote about it"
    )
    args = parser.parse_args()

    from rm.calibration import Calibration
    from rm.model import DESCORE_FILE, DeScore

    for path in (
        args.checkpoint / DESCORE_FILE,
        args.evaluation / "results.jsonl",
        args.evaluation / "config.yaml",
    ):
        if not path.is_file():
            exit_with_error(f"there is no {path}")
    options = evaluated(args.evaluation, args.checkpoint)
    rows = [
        json.loads(line)
        for line in (args.evaluation / "results.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    try:
        rewards = rewards_of(rows, DeScore.dimensions_in(args.checkpoint))
        found = Calibration.of(rewards, chains=int(options.get("chains", 1)))
    except ValueError as error:
        exit_with_error(f"{args.evaluation}: {error}")
    print(f"{found.save(args.checkpoint)}: from {found.videos} videos")
    for name in found.mean:
        print(f"{name:>24}  mean {found.mean[name]:8.4f}  std {found.std[name]:8.4f}")


def evaluated(folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The scorer's options of that evaluation; exit with code 2 if it was of another judge or of other values."""
    from common.safe_yaml import parse

    config = parse((folder / "config.yaml").read_text(encoding="utf-8")).value
    if Path(config["checkpoint"]).resolve() != checkpoint.resolve():
        exit_with_error(f"{folder} is about {config['checkpoint']}, not {checkpoint}")
    options = config.get("options") or {}
    for name, plain in (("calibrated", False), ("value", "head")):
        if options.get(name, plain) != plain:
            exit_with_error(
                f"{folder} was made with options.{name}={options[name]}: these are not the head's raw rewards"
            )
    return options


def rewards_of(rows: list[Row], dimensions: list[str]) -> dict[str, list[float | None]]:
    """Of both videos of every pair, by dimension."""
    sides = [
        (row.get(f"reward_{side}"), row.get(f"parts_{side}") or {})
        for row in rows
        for side in "AB"
    ]
    if len(dimensions) == 1:
        return {dimensions[0]: [reward for reward, _ in sides]}
    return {
        name: [parts.get(f"reward.{name}") for _, parts in sides] for name in dimensions
    }


if __name__ == "__main__":
    main()
