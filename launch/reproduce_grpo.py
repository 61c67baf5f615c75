"""What each part of Longcat-GRPO is worth: `python launch/reproduce_grpo.py`.

Ablations and sister algorithms in the embedded world, with the ordinary entry points: every arm of `launch.grpo_arms`
trains the tiny Wan on the exact oracle under three seeds, for the same number of DiT forwards (a backward counts two),
and is judged on held-out prompts. The paper (LongCat-Video 2510.22200, section 3.3) shows such curves without numbers.

Every run has a folder of its own under ``--run-dir``; one that has finished is not run again. Two run at a time.
Results: docs/results/reproduce_grpo.{json,md} and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from launch.grpo_arms import ARMS, BASE, Run, steps_of
from launch.steps import ROOT, run_step


def carry_out(run: Run, root: Path, *, updates: int, prompts: int) -> dict[str, float]:
    """Seconds of what had to be run, by step."""
    seconds = {}
    for step in steps_of(run, root, updates=updates, prompts=prompts):
        if not (ROOT / step.done).exists():
            (ROOT / run.folder(root)).mkdir(parents=True, exist_ok=True)
            kind = step.title.split()[0]
            log = ROOT / run.folder(root) / f"{kind}.log"
            seconds[f"{kind} {run.folder(root).relative_to(root)}"] = round(run_step(step, 1, log=log), 1)
    return seconds


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/reproduce_grpo"))
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument(
        "--updates", type=int, default=40, help="of the recipe; the other arms make what costs the same"
    )
    parser.add_argument("--prompts", type=int, default=240, help="held-out ones")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args(argv)

    from tqdm import tqdm

    from launch.grpo_table import write_results

    root: Path = args.run_dir
    (ROOT / root).mkdir(parents=True, exist_ok=True)
    timings, began = ROOT / root / "seconds.json", time.time()
    seconds: dict[str, float] = json.loads(timings.read_text(encoding="utf-8")) if timings.exists() else {}
    before = seconds.get("wall", 0.0)
    arms = dict.fromkeys(["base", BASE, *args.arms])
    todo = [Run(seed, arm) for seed in args.seeds for arm in arms]
    with ThreadPoolExecutor(args.workers) as pool:
        size = {"updates": args.updates, "prompts": args.prompts}
        running = {pool.submit(carry_out, run, root, **size): run for run in todo}
        with tqdm(total=len(todo), desc="runs", unit="run") as bar:
            for done in as_completed(running):
                try:
                    seconds |= done.result()
                except RuntimeError as error:
                    pool.shutdown(cancel_futures=True)
                    sys.exit(f"reproduce_grpo: {error}\nstarted again, it goes on here")
                seconds["wall"] = round(before + time.time() - began, 1)
                timings.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
                bar.update()
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    print(write_results(ROOT / root, ROOT / args.out, todo, commit=commit))


if __name__ == "__main__":
    main()
