"""Two GRPO steps and an evaluation, run by test_context_parallel.py on real ranks.

    python tests/launch/context_ranks.py CONFIG [KEY=VALUE ...]

Rank 0 prints a JSON line. Adapters start at random weights, so that the policy differs from its
reference and the loss is not zero.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import launch.training.grpo_loop
from common import distributed
from common.config import load
from common.distributed import gather_objects
from launch.compose import quiet
from launch.evaluation.heldout import means_of, score_heldout
from launch.schemas.training import GrpoRun
from launch.training.grpo_loop import build
from tests.launch.grpo_ranks import moved

PROMPTS = ["a red circle", "a blue square", "two cats", "rain", "snow"]
TIMES = ("seconds/", "videos_per_second", "memory/")


def run(config: str, overrides: list[str]) -> dict[str, Any]:
    cfg = load(GrpoRun, Path(config), [*overrides, "grpo.kl_weight=1.0"])
    loop = build(cfg, PROMPTS)
    history = []
    scored = []
    for step in range(2):
        result = loop.step(step)
        metrics = {}
        for name, value in result.metrics.items():
            if not name.startswith(TIMES):
                metrics[name] = value
        history.append(metrics)
        scored.append(list(result.batch.prompts))
    rows = score_heldout(
        loop.generator,
        loop.rewards,
        PROMPTS,
        seed=0,
        stock=True,
        folder=Path(cfg.run_dir) / "evaluation",
        videos=0,
    )
    heldout = means_of(rows)
    return {"steps": history, "heldout": heldout, "scored": gather_objects(scored)}


def main() -> None:
    quiet()
    distributed.init_process_group()
    launch.training.grpo_loop.build_generator = moved
    results = run(sys.argv[1], sys.argv[2:])
    if distributed.is_main():
        sys.stdout.write("\n" + json.dumps(results) + "\n")
        sys.stdout.flush()
    distributed.barrier()
    distributed.shutdown()


if __name__ == "__main__":
    main()
