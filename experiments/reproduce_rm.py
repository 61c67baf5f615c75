"""DeScore's claims in miniature: `make reproduce-rm`, `python experiments/reproduce_rm.py`.

The paper's comparison (2605.05922, Figure 1) in the embedded world, with the ordinary entry points: a discriminative
and a generative reward model, DeScore's first stage without and with masking, and both stages, on three sizes of
training data under three seeds. Judged on pairs of the training domain and of four others (`toy.make_pairs`).

Every cell is a few commands with a folder of its own under ``--run-dir``; one that has finished is not run again. Two
run at a time. Results: docs/results/reproduce_rm.{json,md} and two plots.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

from experiments.rm_arms import TESTS, chains, steps_of
from experiments.runner import ROOT, CommandStep, Job, commit, run_jobs, run_step


def make_data(run: Path, seed: int, *, train: int, tests: int) -> None:
    """Pairs to train on in filmed.csv, all test pairs in tests.csv."""
    data = run / f"seed{seed}" / "data"
    if (ROOT / data / "tests.csv").exists():
        return
    counts = [f"filmed={train}", *(f"{name}={tests}" for name in TESTS)]
    words = ["--out", str(data), "--seed", str(seed), "--pairs", *counts]
    run_step(
        CommandStep("preference data", "make_shapes.py", words, data / "done.json"), 1
    )
    rows: list[dict[str, str]] = []
    for name in TESTS:
        with open(ROOT / data / f"{name}.csv", encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
    partial = ROOT / data / "tests.partial"
    with open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    partial.rename(ROOT / data / "tests.csv")


def make_base(run: Path) -> None:
    """The base Qwen3-VL as a judge with an untrained head, which its stated score does not use."""
    if (ROOT / run / "base" / "descore.json").exists():
        return
    from rm.config import Generation
    from rm.model import DeScore

    how = Generation(max_new_tokens=96, repetition_penalty=1.0)
    DeScore.from_base(ROOT / "assets/shapes/qwen", generation=how).save(
        ROOT / run / "base"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/reproduce_rm"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=[500, 1000, 2000],
        help="pairs to train on",
    )
    parser.add_argument("--tests", type=int, default=300, help="pairs of each test")
    parser.add_argument("--rl-steps", type=int, default=30, help="of 16 pairs each")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("more", nargs="*", help="overrides a.b=c of every training run")
    args = parser.parse_args()

    from experiments.rm_table import write_results

    run: Path = args.run_dir
    began = time.time()
    make_base(run)
    for seed in args.seeds:
        make_data(run, seed, train=max(args.sizes), tests=args.tests)
    todo = [cells for seed in args.seeds for cells in chains(seed, args.sizes)]
    todo.sort(
        key=lambda cells: -cells[0].size
    )  # the longest first, so that no worker is idle at the end
    jobs = [
        [
            Job(
                cell.folder(run),
                steps_of(cell, run, rl_steps=args.rl_steps, more=args.more),
            )
            for cell in cells
        ]
        for cells in todo
    ]
    run_jobs(
        jobs,
        run,
        workers=args.workers,
        program="reproduce_rm",
        since=began,
        unit="judge",
    )
    cells = [cell for chain in todo for cell in chain]
    print(
        write_results(
            ROOT / run, ROOT / args.out, cells, commit=commit(), workers=args.workers
        )
    )


if __name__ == "__main__":
    main()
