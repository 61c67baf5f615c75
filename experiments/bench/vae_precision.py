"""Measure what a bf16 VAE and kernels with channels last save, and by how much videos differ.

    python experiments/bench/vae_precision.py

The base Wan of the embedded world samples videos of held-out prompts, which each VAE decodes and
encodes. "seconds" are medians of alternating rounds. "levels" are differences from the fp32 VAE in
units of 1 of 255, "psnr" is in dB, "oracle" the largest change of a video's score, and "latents"
the relative difference of encoded latents.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alignment.prompts import read_prompts
from common.config import load
from experiments.bench.bench_io import bench_parser, median_seconds, write_record
from launch.compose import build_generator, build_rewards, quiet
from launch.schemas.training import GrpoRun

if TYPE_CHECKING:
    from torch import Tensor

BF16 = {"vae_dtype": "bfloat16"}
LAST = {"vae_channels_last": True}
VAES = {
    "fp32": {},
    "fp32, channels last": LAST,
    "bf16": BF16,
    "bf16, channels last": BF16 | LAST,
}


def differences(video_BTYXC: Tensor, plain_BTYXC: Tensor) -> dict[str, float]:
    """Largest and MEAN difference of two videos in levels, and their PSNR in dB."""
    error = (video_BTYXC.int() - plain_BTYXC.int()).abs().double()
    mean_square = error.square().mean()
    return {
        "largest_levels": float(error.max()),
        "mean_levels": round(float(error.mean()), 6),
        "psnr": round(float(10 * torch.log10(255**2 / mean_square)), 2),
    }


def main() -> None:
    """Sample, decode, encode, and write the JSON."""
    parser = bench_parser(__doc__, "vae_precision")
    parser.add_argument("--videos", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    quiet()
    run = load(GrpoRun, Path("configs/shapes/grpo_oracle.yaml"))
    prompts = read_prompts(run.evaluation.prompts)[: args.videos]

    # The same latents for every VAE.
    generators = {}
    for name, changes in VAES.items():
        generators[name] = build_generator(
            dataclasses.replace(run.generator, **changes)
        )
    plain = generators["fp32"]
    clean_BCFHW = plain.sample(prompts, list(range(args.videos)))
    video_BTYXC = plain.decode(clean_BCFHW)
    latent_BCFHW = plain.encode(video_BTYXC)
    (oracle,) = build_rewards(run.rewards).values()
    score_B = oracle.score(video_BTYXC, prompts, fps=run.generator.fps).value_B

    # What they save.
    decoders = {
        name: partial(generator.decode, clean_BCFHW)
        for name, generator in generators.items()
    }
    seconds = median_seconds(decoders, args.rounds)

    # What they change.
    record = {}
    for name, generator in generators.items():
        result: dict[str, float] = {"seconds": round(seconds[name], 4)}
        if name != "fp32":
            decoded = generator.decode(clean_BCFHW)
            scores = oracle.score(decoded, prompts, fps=run.generator.fps)
            gap = (generator.encode(video_BTYXC) - latent_BCFHW).norm()
            result |= differences(decoded, video_BTYXC)
            result["oracle"] = float((scores.value_B - score_B).abs().max())
            result["latents"] = float(gap / latent_BCFHW.norm())
        record[name] = result
    settings = {"videos": args.videos, "threads": torch.get_num_threads()}
    write_record(args.out, {**settings, "vaes": record})


if __name__ == "__main__":
    main()
