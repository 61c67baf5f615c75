"""What is looked at before a run trains: a few seconds against the complaints that cost people days.

Each check is a function that returns a `Finding`; its message says what is wrong and what to do. None of them draws
from a global generator or changes a weight, so a run is the same with and without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from alignment.clips import RewardClip, score_clips
from alignment.reward_check import MUST, spoil
from common import gaussian
from common.distributed import derive_seed, differing_ranks, world_size

if TYPE_CHECKING:
    from torch import Tensor, nn

    from common.types import Generator, RewardModel

REPLAY_LIMIT = {"float32": 1e-4, "bfloat16": 1e-3}  # of |ratio - 1|
STOCK_LIMIT = {
    "float32": 1e-5,
    "bfloat16": 5e-2,
}  # relative; the stock pipeline mixes guidance in bf16
PERMUTATION_LIMIT = 1e-3  # of the spread of the scores: kernels may round differently in another place of a batch


@dataclass(frozen=True)
class Finding:
    """What was found, and what to do if it is not ``ok``. ``fatal`` findings stop the run, others are warnings."""

    name: str
    ok: bool
    fact: str
    advice: str
    fatal: bool = True

    @property
    def message(self) -> str:
        return f"{self.name}: {self.fact}" + ("" if self.ok else f"; {self.advice}")


def first_ratio(
    generator: Generator, prompt: str, *, dtype: str, fatal: bool = True, seed: int = 0
) -> Finding:
    """Sample two members and ask how likely they were: the policy has not moved, so every ratio is 1."""
    (group,) = generator.rollout(
        [prompt], group_size=2, seeds=[derive_seed(seed, "self-check")]
    )
    worst = 0.0
    with torch.no_grad():
        for step in group.steps:
            again_G = gaussian.log_prob(
                generator.transition(group.prompt, step), step.next_GCFHW
            )
            ratio_G = (again_G - step.log_prob_G.to(again_G.device)).exp()
            worst = max(worst, float((ratio_G - 1).abs().max()))
    return Finding(
        "first ratio",
        worst <= REPLAY_LIMIT[dtype],
        f"max |ratio - 1| before any update is {worst:.1e}, allowed {REPLAY_LIMIT[dtype]:g}",
        "sampling and training compute different velocities: is guidance_in_update off, dropout on, or a dtype other?",
        fatal,
    )


def stock_trajectory(gap: Callable[[], float], *, dtype: str) -> Finding:
    """``gap``: relative difference between our noiseless walk and the plain pipeline's."""
    found = gap()
    return Finding(
        "noiseless sampling",
        found <= STOCK_LIMIT[dtype],
        f"differs from the stock pipeline by {found:.1e}, allowed {STOCK_LIMIT[dtype]:g}",
        "another model would be trained than people sample from: check the folder's scheduler and text encoder",
    )


def same_weights(module: nn.Module) -> Finding:
    """All ranks start from the same trained weights."""
    odd = differing_ranks(
        {name: p for name, p in module.named_parameters() if p.requires_grad}
    )
    return Finding(
        "weights across ranks",
        not odd,
        f"ranks {odd} of {world_size()} differ from rank 0"
        if odd
        else f"alike on {world_size()}",
        "is a new adapter drawn from a generator that nobody seeded, or a checkpoint read by some ranks only?",
    )


def permutation(
    reward: RewardModel, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
) -> Finding:
    """Scores belong to videos, not to places in a batch."""
    order = list(range(len(prompts)))[::-1]
    plain = reward.score(video_BTYXC, prompts, fps=fps).value_B
    turned = reward.score(
        video_BTYXC[order], [prompts[i] for i in order], fps=fps
    ).value_B[order]
    judged = plain[plain.isfinite()]
    spread = float(judged.std(correction=0)) if judged.numel() else 0.0
    worst = _worst(plain, turned)
    same_missing = torch.equal(plain.isfinite(), turned.isfinite())
    return Finding(
        f"order of a batch, {reward.name}",
        same_missing and worst <= PERMUTATION_LIMIT * max(spread, 1e-6),
        f"turned around, scores move by {worst:.1e}, their spread is {spread:.1e}"
        + ("" if same_missing else ", and others are missing"),
        "the reward answers for the wrong videos, lets them look at their neighbours, or rounds differently by place",
        fatal=worst
        > spread,  # less may be a chain of thought that took another turn on another kernel
    )


def sense(
    reward: RewardModel,
    video_BTYXC: Tensor,
    prompts: Sequence[str],
    *,
    fps: float,
    seed: int = 0,
) -> Finding:
    """MEAN score with the right prompts, with each other's, and of noise. A warning: few videos prove little."""
    clips = [
        RewardClip(video_TYXC, fps, prompt)
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True)
    ]
    cases = {"right": clips} | {case: spoil(clips, case, seed=seed) for case in MUST}
    means = {
        name: _mean(score_clips(reward, case).value_B) for name, case in cases.items()
    }
    return Finding(
        f"sense, {reward.name}",
        all(means["right"] > value for name, value in means.items() if name != "right"),
        "mean score: "
        + ", ".join(f"{name} {value:.3f}" for name, value in means.items()),
        f"it should be highest where it is right; {len(prompts)} videos prove little, but a wrong fps, prompt format "
        "or checkpoint looks like this",
        fatal=False,
    )


def _worst(a: Tensor, b: Tensor) -> float:
    both = a.isfinite() & b.isfinite()
    return float((a - b)[both].abs().max()) if both.any() else 0.0


def _mean(value_B: Tensor) -> float:
    judged = value_B[value_B.isfinite()]
    return float(judged.mean()) if judged.numel() else math.nan
