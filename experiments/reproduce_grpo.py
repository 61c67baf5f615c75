"""What each part of Longcat-GRPO is worth: `python experiments/reproduce_grpo.py`.

Ablations and sister algorithms in the embedded world, with the ordinary entry points: every arm of `experiments.grpo_arms`
trains the tiny Wan on the exact oracle under three seeds, for the same number of DiT forwards (a backward counts two),
and is judged on held-out prompts. The paper (LongCat-Video 2510.22200, section 3.3) shows such curves without numbers.

Every run has a folder of its own under ``--run-dir``; one that has finished is not run again. Two run at a time.
Results: docs/results/reproduce_grpo.{json,md} and a plot.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.grpo_arms import ARMS, BASE, COMMAND, GrpoArmRun, steps_of
from experiments.runner import ROOT, Job, commit, run_jobs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/reproduce_grpo"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=ARMS,
        default=list(ARMS),
        metavar="ARM",
        help=", ".join(ARMS),
    )
    parser.add_argument(
        "--updates",
        type=int,
        default=40,
        help="of the recipe; the other arms make what costs the same",
    )
    parser.add_argument("--prompts", type=int, default=240, help="held-out ones")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(argv)

    from experiments.grpo_table import write_results

    root: Path = args.run_dir
    arms = dict.fromkeys(["base", BASE, *args.arms])
    todo = [GrpoArmRun(seed, arm) for seed in args.seeds for arm in arms]
    jobs = [
        [
            Job(
                run.folder(root),
                steps_of(run, root, updates=args.updates, prompts=args.prompts),
            )
        ]
        for run in todo
    ]
    minutes = (
        run_jobs(jobs, root, workers=args.workers, program="reproduce_grpo")["wall"]
        / 60
    )
    chosen = "" if set(arms) == {"base", *ARMS} else f" --arms {' '.join(args.arms)}"
    facts = {"command": COMMAND + chosen, "commit": commit(), "minutes": minutes}
    print(write_results(ROOT / root, ROOT / args.out, todo, **facts))


if __name__ == "__main__":
    main()
