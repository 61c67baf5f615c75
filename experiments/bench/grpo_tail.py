"""Measure what each tail option of a rollout saves, and how far it moves the videos.

    python experiments/bench/grpo_tail.py

The tiny Wan samples groups of four with T = 16, T' = 6 and guidance 4.5, as in LongCat-Video
(2510.22200). All options get the same prompts and seeds, so the stochastic step starts from the
same latent. "speed" is relative to a tail without options. "difference" is the distance of the
clean latents from that tail's, relative to their norm. "oracle" is the MEAN over all videos.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from alignment.prompts import read_prompts
from common.config import load
from common.distributed import derive_seed
from experiments.bench.bench_io import bench_parser, median_seconds, write_record
from launch.compose import build_generator, quiet
from launch.schemas.training import GrpoRun
from toy.measure import measure

# Videos of a prompt, and prompts of a timed rollout.
GROUP_SIZE = 4
TIMED_PROMPTS = 6
# Overrides of the sampler.
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
    """Time all options, compare their videos, and write the JSON."""
    parser = bench_parser(__doc__, "grpo_tail")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    quiet()

    # Make a generator per option.
    cfg = load(GrpoRun, "configs/shapes/grpo_oracle.yaml")
    prompts = read_prompts(cfg.evaluation.prompts)[: args.prompts]
    seeds = [derive_seed(0, "bench", index) for index in range(len(prompts))]

    # The paper's steps and noise.
    base = replace(
        cfg.generator.sampler,
        num_steps=16,
        stochastic_range=6,
        max_std=0.45,
        guidance_scale=4.5,
    )
    generators = {}
    for name, options in OPTIONS.items():
        sampler = replace(base, **options)
        generators[name] = build_generator(replace(cfg.generator, sampler=sampler))

    # Time their rollouts.
    rollouts = {}
    for name, generator in generators.items():
        rollouts[name] = partial(
            generator.rollout,
            prompts[:TIMED_PROMPTS],
            group_size=GROUP_SIZE,
            seeds=seeds[:TIMED_PROMPTS],
        )
    seconds = median_seconds(rollouts, args.rounds)

    # Sample all prompts and score the videos with the oracle.
    texts = [prompt for prompt in prompts for _ in range(GROUP_SIZE)]
    clean: dict[str, Tensor] = {}
    oracle: dict[str, float] = {}
    for name, generator in generators.items():
        groups = generator.rollout(
            prompts,
            group_size=GROUP_SIZE,
            seeds=seeds,
        )
        clean[name] = torch.cat([group.clean_GCFHW for group in groups])
        videos = zip(generator.decode(clean[name]), texts, strict=True)
        oracle[name] = fmean(measure(video, text).total for video, text in videos)

    # Compare each option with the tail that has none.
    plain = clean["none"]
    compared = {}
    for name in OPTIONS:
        difference = float((clean[name] - plain).norm() / plain.norm())
        compared[name] = {
            "speed": round(seconds["none"] / seconds[name], 3),
            "difference": round(difference, 4),
            "oracle": round(oracle[name], 4),
        }
    write_record(
        args.out,
        {
            "prompts": len(prompts),
            "options": compared,
        },
    )


if __name__ == "__main__":
    main()
