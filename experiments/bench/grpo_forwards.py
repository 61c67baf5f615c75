"""Compare the cost of a GRPO update: all steps stochastic, a single step, and a shared single step.

    python experiments/bench/grpo_forwards.py

The tiny Wan samples T = 16 steps of G = 4 videos with guidance (c = 2) and a KL term; the single
stochastic step is step k = 2. A hook counts the DiT samples, which must equal

    without gradient  c [(k + 1) + G (T - k - 1)] with a shared prefix, else c G T
    with gradient     c K M, and as many for the reference policy

with K stochastic steps that start from M latents. Seconds are medians of alternating rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignment.config import GrpoConfig
from alignment.grpo import GrpoLoop
from alignment.prompts import PromptSchedule
from common.config import load
from common.gaussian import Gaussian
from common.types import Score, Step
from experiments.bench.bench_io import bench_parser, median_seconds, write_record
from launch.compose import build_generator, quiet
from launch.schemas.training import GrpoRun

# The size of LongCat-Video (2510.22200), with four videos instead of more.
STEPS = 16
GROUP_SIZE = 4
K = 2
# DiT samples of a velocity under guidance.
BRANCHES = 2
SINGLE_STEP = {
    "stochastic": "one",
    "stochastic_first": K,
    "stochastic_range": K + 1,
}
# Overrides of the sampler.
ARMS = {
    "all_steps": {
        "stochastic": "all",
        "stochastic_first": 0,
        "stochastic_range": STEPS,
        "initial_noise": "member",
    },
    "one_step": {
        **SINGLE_STEP,
        "initial_noise": "member",
    },
    "shared": {
        **SINGLE_STEP,
        "initial_noise": "shared",
    },
}
FULL_ROLLOUT = BRANCHES * GROUP_SIZE * STEPS
SHARED_ROLLOUT = BRANCHES * (K + 1 + GROUP_SIZE * (STEPS - K - 1))
# Predicted DiT samples without and with gradient.
COUNTS = {
    "all_steps": (FULL_ROLLOUT, FULL_ROLLOUT),
    "one_step": (FULL_ROLLOUT, BRANCHES * GROUP_SIZE),
    "shared": (SHARED_ROLLOUT, BRANCHES),
}


class CountingEngine:
    """Collects gradients and leaves the weights as they are."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients."""
        loss.backward()

    def step(self) -> None:
        """Do nothing: `gradients` reads the result of an update."""

    def gradients(self) -> Tensor:
        """Return all gradients in a vector and clear them."""
        vector = torch.cat([p.grad.flatten() for p in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        return vector


class RedReward:
    """MEAN red of a video: it costs nothing and tells videos apart."""

    name = "red"

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        """Score videos (B,)."""
        return Score(video_BTYXC[..., 0].float().mean((1, 2, 3)))


class CountedArm:
    """A GRPO loop of a group per step that counts the samples through its transformer."""

    def __init__(self, name: str, *, size: int, frames: int) -> None:
        # The tiny Wan at this bench's size.
        run = load(GrpoRun, "configs/shapes/grpo.yaml")
        sampler = replace(
            run.generator.sampler,
            num_steps=STEPS,
            max_std=0.45,
            guidance_scale=4.5,
            **ARMS[name],
        )
        config = replace(
            run.generator,
            height=size,
            width=size,
            num_frames=frames,
            sampler=sampler,
            rollout_batch=1,
        )
        self.generator = build_generator(config, seed=0)
        module = self.generator.module

        # Random adapters, so that policy and reference policy differ.
        draw = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.data = 0.02 * noise

        self.engine = CountingEngine(module)

        # A loop of a single prompt.
        prompts = ["a red circle moves left"]
        self.loop = GrpoLoop(
            GrpoConfig(group_size=GROUP_SIZE, kl_weight=1e-3),
            generator=self.generator,
            rewards={"red": RedReward()},
            weights={"red": 1.0},
            engine=self.engine,
            prompts=PromptSchedule(
                prompts,
                seed=0,
                prompts_per_step=1,
            ),
            fps=8.0,
        )

        # A hook counts the samples of every forward.
        self.counts: dict[str, int] = {}
        module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: torch.nn.Module, args: tuple, options: dict) -> None:
        kind = "no_grad"
        if torch.is_grad_enabled():
            kind = "grad"
        elif self.generator._in_reference:
            kind = "reference"
        self.counts[kind] += len(options["hidden_states"])

    def update(self) -> Tensor:
        """Return the gradient of an update and leave its samples in ``counts``."""
        self.counts = dict.fromkeys(("no_grad", "grad", "reference"), 0)
        self.loop.step(0)
        return self.engine.gradients()


def per_member_gradient(arm: CountedArm) -> Tensor:
    """Gradient of an update with a forward and a backward per member, SUM over members."""
    generator = arm.generator

    # The original methods.
    transition = generator.transition
    backward = arm.engine.backward
    calls: list[tuple[str, Step, Tensor]] = []

    # The loop computes the transition of the group. Detached copies of its mean collect the
    # gradient of the loss.
    def record(prompt: str, step: Step) -> Gaussian:
        result = transition(prompt, step)
        if not torch.is_grad_enabled():
            return result
        mean = result.mean.detach().expand(step.next_GCFHW.shape).clone()

        # The loss gets a leaf that collects its gradient.
        mean.requires_grad_()
        calls.append((prompt, step, mean))
        return replace(result, mean=mean)

    # Each member carries its share of that gradient through its forward.
    def backward_by_member(loss: Tensor) -> None:
        backward(loss)
        prompt, step, mean = calls.pop()
        for member in range(step.size):
            # All members share the latent that the step starts from.
            member_mean = transition(prompt, step).mean
            member_mean.backward(mean.grad[member : member + 1])

    generator.transition = record
    arm.engine.backward = backward_by_member
    return arm.update()


def check_counts(name: str, counts: dict[str, int]) -> None:
    """Raise AssertionError if an arm's samples differ from the formula."""
    # The reference policy sees the latents that the policy sees.
    no_grad, grad = COUNTS[name]
    expected = {
        "no_grad": no_grad,
        "grad": grad,
        "reference": grad,
    }
    if counts != expected:
        raise AssertionError(f"{name}: counted {counts}, expected {expected}")


def main() -> None:
    """Time and count all arms, compare the gradients, and write the JSON."""
    parser = bench_parser(__doc__, "grpo_forwards")
    parser.add_argument("--size", type=int, default=64, help="height and width")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    quiet()
    shape = {"size": args.size, "frames": args.frames}

    # Count and time the updates.
    arms = {name: CountedArm(name, **shape) for name in ARMS}
    updates = {name: arm.update for name, arm in arms.items()}
    seconds = median_seconds(updates, args.rounds)
    cost = {}
    for name, arm in arms.items():
        check_counts(name, arm.counts)
        # A forward with gradient costs three: the backward costs two.
        counts = arm.counts
        cost[name] = counts["no_grad"] + counts["reference"] + 3 * counts["grad"]

    # Compare the collapsed update with a forward per member.
    collapsed = CountedArm("shared", **shape).update()
    per_member = per_member_gradient(CountedArm("shared", **shape))
    error = float((collapsed - per_member).norm() / collapsed.norm())

    # Ratios of the shared step to the unshared step.
    seconds_ratio = seconds["shared"] / seconds["one_step"]
    counts_ratio = cost["shared"] / cost["one_step"]
    record = {
        "size": [args.size, args.size, args.frames],
        "samples": {name: arm.counts for name, arm in arms.items()},
        "seconds": seconds,
        "shared_to_one_step": {
            "seconds": seconds_ratio,
            "counts": counts_ratio,
            "seconds_over_counts": seconds_ratio / counts_ratio,
        },
        "relative_gradient_difference": error,
    }
    write_record(args.out, record)


if __name__ == "__main__":
    main()
