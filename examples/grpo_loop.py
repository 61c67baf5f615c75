"""A GRPO loop in Python around your own generator: one process, no config, no DeepSpeed.

    python examples/grpo_loop.py --steps 30

The loop and its losses are those that train Wan. See own_generator.py for the generator.
"""

from __future__ import annotations

import argparse

from own_generator import TintGenerator
from torch import Tensor

from alignment import GrpoConfig, GrpoLoop
from alignment.prompts import PromptSchedule
from alignment.rewards.plugin import as_reward
from engine import LocalEngine

PROMPTS = ["a red room", "a sunset", "embers", "rust"]


def redness(video_BTYXC: Tensor, prompts: list[str]) -> Tensor:
    """MEAN red minus MEAN blue, in [-1, 1]."""
    red_B, _, blue_B = video_BTYXC.float().mean((1, 2, 3)).unbind(1)
    return (red_B - blue_B) / 255


def train(*, steps: int = 30) -> list[float]:
    """Train a tint with GRPO; return the mean reward of every step."""
    generator = TintGenerator()

    # An optimizer step comes after one backward per prompt.
    engine = LocalEngine(generator.module, accumulation=len(PROMPTS), lr=0.05)
    loop = GrpoLoop(
        GrpoConfig(group_size=8, kl_weight=1e-3),
        generator=generator,
        rewards={"red": as_reward("red", redness, {})},
        weights={"red": 1.0},
        engine=engine,
        prompts=PromptSchedule(PROMPTS, seed=0, prompts_per_step=len(PROMPTS)),
        fps=8.0,
        grad_norm=engine.grad_norm,
    )

    # A step samples, scores, normalises and updates; its number decides all randomness.
    means = []
    for step in range(steps):
        metrics = loop.step(step).metrics
        means.append(metrics["reward/red"])
        kl = metrics.get("train/kl", 0.0)
        print(f"step {step:3d}  reward {means[-1]:7.4f}  KL {kl:.4f}")
    return means


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    train(steps=parser.parse_args().steps)
