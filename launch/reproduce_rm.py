"""DeScore's claims in miniature: `make reproduce-rm`, `python launch/reproduce_rm.py`.

The paper's comparison (2605.05922, Figure 1) in the embedded world, with the ordinary entry points: a discriminative
and a generative reward model, DeScore's first stage without and with masking, and both stages, on three sizes of
training data under three seeds. Judged on pairs of the training domain and of four others (`launch.make_shapes`).

Every cell is a few commands with a folder of its own under ``--run-dir``; one that has finished is not run again. Two
run at a time. Results: docs/results/reproduce_rm.{json,md} and two plots.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from launch.reproduce_cells import TESTS, Cell, chains, steps_of
from launch.steps import ROOT, Step, run_step


def make_data(run: Path, seed: int, *, train: int, tests: int) -> None:
    """Pairs to train on in filmed.csv, all test pairs in tests.csv."""
    data = run / f"seed{seed}" / "data"
    if (ROOT / data / "tests.csv").exists():
        return
    counts = [f"filmed={train}", *(f"{name}={tests}" for name in TESTS)]
    words = ["--out", str(data), "--seed", str(seed), "--pairs", *counts]
    run_step(Step("preference data", "make_shapes.py", words, data / "done.json"), 1)
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
    DeScore.from_base(ROOT / "assets/shapes/qwen", generation=how).save(ROOT / run / "base")


def run_chain(cells: Sequence[Cell], run: Path, rl_steps: int, more: Sequence[str]) -> dict[str, float]:
    """Seconds of what had to be run, by step."""
    seconds = {}
    for cell in cells:
        for step in steps_of(cell, run, rl_steps=rl_steps, more=more):
            if not (ROOT / step.done).exists():
                (ROOT / cell.folder(run)).mkdir(parents=True, exist_ok=True)
                log = ROOT / cell.folder(run) / f"{step.title.split()[0]}.log"
                name = f"{step.title.split()[0]} {cell.folder(run).relative_to(run)}"
                seconds[name] = round(run_step(step, 1, log=log), 1)
    return seconds


def cpu_seconds() -> float:
    """Of all commands that have ended, so that a busy machine can be told from a slow recipe."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/reproduce_rm"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sizes", type=int, nargs="+", default=[500, 1000, 2000], help="pairs to train on")
    parser.add_argument("--tests", type=int, default=300, help="pairs of each test")
    parser.add_argument("--rl-steps", type=int, default=30, help="of 16 pairs each")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("more", nargs="*", help="overrides a.b=c of every training run")
    args = parser.parse_args()

    from tqdm import tqdm

    from launch.reproduce_table import write_results

    run: Path = args.run_dir
    (ROOT / run).mkdir(parents=True, exist_ok=True)
    timings, began = ROOT / run / "seconds.json", time.time()
    seconds: dict[str, float] = json.loads(timings.read_text(encoding="utf-8")) if timings.exists() else {}
    before = {name: seconds.get(name, 0.0) for name in ("wall", "cpu")}
    make_base(run)
    for seed in args.seeds:
        make_data(run, seed, train=max(args.sizes), tests=args.tests)
    todo = [cells for seed in args.seeds for cells in chains(seed, args.sizes)]
    todo.sort(key=lambda cells: -cells[0].size)  # the longest first, so that no worker is idle at the end
    with ThreadPoolExecutor(args.workers) as pool:
        running = {pool.submit(run_chain, cells, run, args.rl_steps, args.more): cells for cells in todo}
        with tqdm(total=sum(map(len, todo)), desc="judges", unit="judge") as bar:
            for done in as_completed(running):
                try:
                    seconds |= done.result()
                except RuntimeError as error:
                    pool.shutdown(cancel_futures=True)
                    sys.exit(f"reproduce_rm: {error}\nstarted again, it goes on here")
                seconds["wall"] = round(before["wall"] + time.time() - began, 1)
                seconds["cpu"] = round(before["cpu"] + cpu_seconds(), 1)
                timings.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
                bar.update(len(running[done]))
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    cells = [cell for chain in todo for cell in chain]
    print(write_results(ROOT / run, ROOT / args.out, cells, commit=commit, workers=args.workers))


if __name__ == "__main__":
    main()
