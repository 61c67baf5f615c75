"""Learning from pairs against learning online: `python experiments/reproduce_dpo.py`.

In the embedded world, with the ordinary entry points and under three seeds: DeScore is trained on preferences, judges
eight videos a prompt of the tiny Wan, and the best and the worst of each make a pair. On these pairs learn plain
fine-tuning, Flow-RWR, and Flow-DPO with both of its schedules of beta; beside them Longcat-GRPO with the same DeScore,
for as many DiT forwards as the pairs and Flow-DPO took together (a backward counts two). The oracle, on which nobody
was trained, judges held-out prompts.

Every run has a folder of its own under ``--run-dir``; one that has finished is not run again. Two run at a time.
Results: docs/results/reproduce_dpo.{json,md}.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from experiments.dpo_arms import ARMS, Size, learn, prepare
from experiments.runner import ROOT, commit, run_jobs


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/reproduce_dpo"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--judge-pairs",
        type=int,
        default=2000,
        help="preference pairs that DeScore learns from",
    )
    parser.add_argument(
        "--prompts", type=int, default=691, help="that eight videos each are made of"
    )
    parser.add_argument(
        "--epochs",
        type=float,
        default=1.0,
        help="times those of configs/shapes/dpo.yaml",
    )
    parser.add_argument(
        "--heldout", type=int, default=240, help="prompts that the oracle judges"
    )
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    from experiments.dpo_table import write_results

    root, size = (
        args.run_dir,
        Size(args.judge_pairs, args.prompts, args.epochs, args.heldout),
    )
    ready = [[prepare(seed, root, size)] for seed in args.seeds]
    run_jobs(ready, root, workers=args.workers, program="reproduce_dpo")
    # the longest first, so that no worker is idle at the end
    arms = ["grpo", *ARMS, "base"]
    jobs = [[learn(seed, arm, root, size)] for arm in arms for seed in args.seeds]
    minutes = (
        run_jobs(jobs, root, workers=args.workers, program="reproduce_dpo")["wall"] / 60
    )
    print(
        write_results(
            ROOT / root,
            ROOT / args.out,
            args.seeds,
            size,
            commit=commit(),
            minutes=minutes,
        )
    )


if __name__ == "__main__":
    main()
