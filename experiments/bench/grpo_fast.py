"""Measure a GRPO step with the fast sampler against the same step without, in one process.

    python experiments/bench/grpo_fast.py

The arms take turns at the size of the demo: 32 prompts, 8 videos each, the tiny Wan under
DeepSpeed, the oracle as reward. "wall" and "cpu" are median seconds of a step on the clock and of
the processor, "ratio" is the median over rounds of the plain arm's step over the fast arm's of the
same round. The number of a step decides its prompts and stochastic steps, which all arms share.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch

from common import distributed
from common.config import load
from experiments.bench.bench_io import bench_parser, write_record
from experiments.fast_sampler import ARMS, PAIRS
from launch.compose import quiet
from launch.schemas.training import GrpoRun

# The demo's prompts of a step.
DEMO = "prompts_per_step=32"
PHASES = ("rollout", "decode", "update")


def main() -> None:
    """Time the steps and write the JSON."""
    parser = bench_parser(__doc__, "grpo_fast")
    config = Path("configs/shapes/grpo_oracle.yaml")
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    args = parser.parse_args()
    quiet()
    distributed.init_process_group()
    from alignment.prompts import read_prompts
    from launch.training.grpo_loop import build

    # The same objects as in launch/grpo.py, for every arm.
    loops = {}
    for name in args.arms:
        run = load(GrpoRun, args.config, (DEMO, *ARMS[name].overrides))
        loops[name] = build(run, read_prompts(run.prompts))

    # Arms take turns; the first round warms up.
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in loops}
    for step in range(args.rounds + 1):
        for name, loop in loops.items():
            wall = time.perf_counter()
            cpu = time.process_time()
            metrics = loop.step(step).metrics
            row = {
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - cpu,
            }
            for phase in PHASES:
                row[phase] = metrics[f"seconds/{phase}"]
            if step > 0:
                rows[name].append(row)

    # Medians of the arms, and ratios round by round.
    record = {}
    for name, measured in rows.items():
        record[name] = {
            field: round(median(row[field] for row in measured), 3)
            for field in measured[0]
        }
    for plain, fast in PAIRS:
        if plain not in rows or fast not in rows:
            continue
        ratios = {}
        for clock in ("wall", "cpu"):
            pairs = zip(rows[plain], rows[fast], strict=True)
            ratios[clock] = round(median(a[clock] / b[clock] for a, b in pairs), 3)
        record[fast]["ratio"] = ratios
    settings = {"rounds": args.rounds, "threads": torch.get_num_threads()}
    write_record(args.out, {**settings, "arms": record})
    distributed.shutdown()


if __name__ == "__main__":
    main()
