"""What each option of the tail saves of a rollout, and how far it moves the videos.

    python experiments/bench/grpo_tail.py

The tiny Wan of assets/shapes at the paper's T = 16 and T' = 6 with guidance 4.5, four members, a
prompt at a time; the same prompts and seeds for all, so that the stochastic step is the same
latent. Wall time is the median of alternating rounds, relative to a tail without options; the
difference is of the clean latents, relative to theirs; the oracle is its MEAN over all videos.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from alignment.prompts import read_prompts
from common.config import load
from common.distributed import derive_seed
from common.log import say
from launch.compose import build_generator, quiet
from launch.schemas.training import GrpoRun
from toy.measure import measure

STEPS, RANGE, MEMBERS = 16, 6, 4
OPTIONS = {
    "none": {},
    "ab2": {"tail_solver": "ab2"},
    "half the steps, Euler": {"tail_steps": 6},
    "half the steps, ab2": {"tail_steps": 6, "tail_solver": "ab2"},
    "no guidance": {"tail_guidance": 1.0},
    "cached every other step": {"tail_cache": 2},
    "cached two of three": {"tail_cache": 3},
    "half the steps, ab2, cached every other": {
        "tail_steps": 6,
        "tail_solver": "ab2",
        "tail_cache": 2,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument(
        "--rounds", type=int, default=5, help="that each prompt's rollout is timed"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results/grpo_tail.json"))
    args = parser.parse_args()
    quiet()
    cfg = load(GrpoRun, "configs/shapes/grpo_oracle.yaml")
    prompts = read_prompts(cfg.evaluation.prompts)[: args.prompts]
    seeds = [derive_seed(0, "bench", i) for i in range(len(prompts))]
    base = replace(
        cfg.generator.sampler,
        num_steps=STEPS,
        stochastic_range=RANGE,
        max_std=0.45,
        guidance_scale=4.5,
    )
    generators = {
        name: build_generator(replace(cfg.generator, sampler=replace(base, **options)))
        for name, options in OPTIONS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in OPTIONS}
    for number in range(args.rounds + 1):
        for name, generator in generators.items():
            start = time.perf_counter()
            generator.rollout(prompts[:6], group_size=MEMBERS, seeds=seeds[:6])
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    clean, oracle = {}, {}
    for name, generator in generators.items():
        groups = generator.rollout(prompts, group_size=MEMBERS, seeds=seeds)
        clean[name] = torch.cat([group.clean_GCFHW for group in groups])
        texts = [prompt for prompt in prompts for _ in range(MEMBERS)]
        videos = generator.decode(clean[name])
        oracle[name] = statistics.fmean(
            measure(v, p).total for v, p in zip(videos, texts, strict=True)
        )
    plain = clean["none"]
    result = {
        "command": "python experiments/bench/grpo_tail.py",
        "prompts": len(prompts),
        "options": {
            name: {
                "speed": round(median["none"] / median[name], 3),
                "difference": round(
                    float((clean[name] - plain).norm() / plain.norm()), 4
                ),
                "oracle": round(oracle[name], 4),
            }
            for name in OPTIONS
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(json.dumps(result))


if __name__ == "__main__":
    main()
