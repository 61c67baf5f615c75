"""Measure where a GRPO step spends its time, and what the loop itself adds.

    python experiments/bench/grpo_overhead.py

A process trains at the size of the demo under DeepSpeed: 16 prompts, 8 videos each, the tiny Wan,
the oracle as reward. "loop" is the rest of a step: noise, sampler kernels, log-probs, losses,
advantages, gathering and metrics.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from common import distributed
from common.config import load
from experiments.bench.bench_io import bench_parser, write_record
from launch.compose import quiet
from launch.schemas.training import GrpoRun


class Stopwatch:
    """Sums the seconds inside the functions that it wraps, by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.running: str | None = None

    def wrap(self, owner: object, method: str, part: str) -> None:
        """Replace a method by itself with timing.

        The replacement raises AssertionError inside another wrapped method, whose seconds would
        count twice.
        """
        function: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **options: Any) -> Any:
            # Parts must not overlap.
            if self.running is not None:
                raise AssertionError(f"{part} ran inside {self.running}")
            self.running = part
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.running = None
                duration = time.perf_counter() - start
                self.seconds[part] = self.seconds.get(part, 0.0) + duration

        setattr(owner, method, timed)


def main() -> None:
    """Time the steps and write the JSON."""
    parser = bench_parser(__doc__, "grpo_overhead")
    config = Path("configs/shapes/grpo_oracle.yaml")
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    quiet()
    distributed.init_process_group()
    from alignment.prompts import read_prompts
    from launch.training.grpo_loop import build

    # The same objects as in launch/grpo.py.
    cfg = load(GrpoRun, args.config, args.overrides)
    loop = build(cfg, read_prompts(cfg.prompts))
    generator = loop.generator
    engine = loop.engine.engine
    module = type(generator.module).__name__

    # Wrap the parts of a step.
    watch = Stopwatch()
    watch.wrap(generator.module, "forward", "forward")
    watch.wrap(engine, "backward", "backward")
    watch.wrap(engine, "step", "optimizer")
    watch.wrap(generator.codec, "decode", "decode")
    watch.wrap(generator.prompts, "encode", "text encoder")
    for reward in loop.rewards.values():
        watch.wrap(reward, "score", "reward")

    # Time the steps; the first warms up.
    rows = []
    for step in range(args.steps + 1):
        watch.seconds = {}
        start = time.perf_counter()
        loop.step(step)
        total = time.perf_counter() - start

        # The rest is the loop.
        rest = total - sum(watch.seconds.values())
        if step > 0:
            rows.append(
                {
                    **watch.seconds,
                    "loop": rest,
                    "step": total,
                }
            )

    # Medians over steps, of seconds and of shares.
    seconds = {part: median(row.get(part, 0.0) for row in rows) for part in rows[0]}
    record = {
        "module": module,
        "seconds": seconds,
        "loop_share": median(row["loop"] / row["step"] for row in rows),
        "threads": torch.get_num_threads(),
    }
    write_record(args.out, record)
    distributed.shutdown()


if __name__ == "__main__":
    main()
