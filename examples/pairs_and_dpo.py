"""Pairs of a generator's own videos, and Flow-DPO on them, in Python.

    python examples/pairs_and_dpo.py --out runs/examples/pairs

Samples videos of the tiny Wan, lets the oracle of the embedded world choose the best and the worst
of each prompt, stores the pairs and trains on them. launch/pairs.py and launch/dpo.py do the same
on many GPUs, and can be stopped and resumed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from alignment import DpoConfig, DpoLoop, RewardConfig, build_rewards
from alignment.pair_store import LatentPair, PairSet, write_pairs
from alignment.prompts import read_prompts
from common.config import load
from engine import LocalEngine
from generator import WanGenerator
from launch.schemas.training import SampleRun

CONFIG = Path("configs/shapes/sample.yaml")
ORACLE = RewardConfig(target="toy/oracle.py:ShapesOracle")


def compare(
    generator: WanGenerator,
    prompts: Sequence[str],
    *,
    candidates: int,
) -> Iterator[LatentPair]:
    """Yield the best and the worst of each prompt's videos, where they differ."""
    oracle = build_rewards({"oracle": ORACLE})["oracle"]
    for i, prompt in enumerate(prompts):
        # Seeds decide all randomness: the same numbers, the same videos.
        seeds = [1000 * i + k for k in range(candidates)]
        texts = [prompt] * candidates
        clean_BCFHW = generator.sample(texts, seeds)
        video_BTYXC = generator.decode(clean_BCFHW)
        value_B = oracle.score(video_BTYXC, texts, fps=generator.cfg.fps).value_B

        # A pair teaches something where one video is better than the other.
        best = int(value_B.argmax())
        worst = int(value_B.argmin())
        if value_B[best] > value_B[worst]:
            yield LatentPair(
                prompt,
                chosen_CFHW=clean_BCFHW[best],
                rejected_CFHW=clean_BCFHW[worst],
                embedding_LD=generator.prompts.rows_of(prompt),
            )


def train(out: Path, *, prompts: int = 8, candidates: int = 4) -> dict[str, float]:
    """Make pairs, train on them for two epochs, and return the metrics of the last step."""
    run = load(SampleRun, CONFIG, [])
    generator = WanGenerator.load(run.generator)
    texts = read_prompts("assets/shapes/prompts_train.txt")[:prompts]
    count = write_pairs(
        out,
        compare(generator, texts, candidates=candidates),
        per_shard=64,
        dtype=torch.float32,
        about={},
    )
    print(f"{count} pairs of {len(texts)} prompts in {out}")

    # One micro-batch a step; beta holds the policy near the reference.
    cfg = DpoConfig(pairs_per_step=2, micro_batch=2, beta=100.0)
    engine = LocalEngine(generator.module, lr=1e-3)
    loop = DpoLoop(
        cfg,
        generator=generator,
        engine=engine,
        pairs=PairSet(out),
        seed=0,
    )
    steps = max(1, 2 * count // cfg.pairs_per_step)
    for step in range(steps):
        metrics = loop.step(step)
        loss = metrics["train/loss"]
        accuracy = metrics["train/accuracy"]
        print(f"step {step:3d}  loss {loss:.4f}  accuracy {accuracy:.2f}")
    return metrics


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/examples/pairs"))
    train(parser.parse_args().out)
