"""Where a step of GRPO spends its time: models, backward and decoding, and what the loop itself adds.

    python experiments/bench/grpo_overhead.py

The demo's size on one process, under DeepSpeed as in training: 16 prompts x 8 members of the tiny
Wan, the oracle as the reward. "loop" is everything that is none of the others: noise, kernels of
the sampler, log-probs and losses, advantages, gathering, metrics. The optimizer's step and the
reward are parts of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import distributed
from common.config import load
from common.log import say
from launch.compose import quiet
from launch.schemas.training import GrpoRun


class Stopwatch:
    """Seconds inside the functions it wraps, by part. None of them may be inside another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside: str | None = None

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*of: Any, **options: Any) -> Any:
            if self.inside is not None:
                raise AssertionError(
                    f"{part} inside {self.inside} would be counted twice"
                )
            self.inside, start = part, time.perf_counter()
            try:
                return function(*of, **options)
            finally:
                self.inside = None
                self.seconds[part] = (
                    self.seconds.get(part, 0.0) + time.perf_counter() - start
                )

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", type=Path, default=Path("configs/shapes/grpo_oracle.yaml")
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/grpo_overhead.json")
    )
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    quiet()
    distributed.init_process_group()
    from alignment.prompts import read_prompts
    from launch.grpo import build

    cfg = load(GrpoRun, args.config, args.overrides)
    loop, generator, engine = build(cfg, read_prompts(cfg.prompts))
    watch = Stopwatch()
    module = type(generator.module)
    generator.module.forward = watch.wrap("forward", generator.module.forward)
    engine.backward, engine.step = (
        watch.wrap("backward", engine.backward),
        watch.wrap("optimizer", engine.step),
    )
    generator.codec.decode = watch.wrap("decode", generator.codec.decode)
    generator.prompts.encode = watch.wrap("text encoder", generator.prompts.encode)
    for reward in loop.rewards.values():
        reward.score = watch.wrap("reward", reward.score)
    rows = []
    for step in range(args.steps + 1):
        watch.seconds = {}
        start = time.perf_counter()
        loop.step(step)
        whole = time.perf_counter() - start
        if step:  # the first one warms up
            rows.append(
                {
                    **watch.seconds,
                    "loop": whole - sum(watch.seconds.values()),
                    "step": whole,
                }
            )
    median = {
        part: statistics.median(row.get(part, 0.0) for row in rows) for part in rows[0]
    }
    result = {
        "command": "python experiments/bench/grpo_overhead.py",
        "module": module.__name__,
        "seconds": median,
        "loop_share": statistics.median(row["loop"] / row["step"] for row in rows),
        "optimizer_share": statistics.median(
            row["optimizer"] / row["step"] for row in rows
        ),
        "threads": torch.get_num_threads(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(json.dumps(result))
    distributed.shutdown()


if __name__ == "__main__":
    main()
