"""What one update of GRPO costs, three ways: every step stochastic, one step with nothing shared, one shared step.

    python experiments/bench/grpo_forwards.py

The tiny Wan, T = 16 and T' = 6, four members, guidance, KL; the stochastic step is the third (k =
2). Samples through the transformer are counted by a hook and must equal the formulas of
`GrpoLoop`'s cost

    without gradient  c [(k + 1) + G (T - k - 1)] with a shared prefix, else c G T
    with gradient     c K M, and as many again for the reference; K stochastic steps, M latents to start them from

exactly. Wall time is the median of alternating rounds, peak memory that of a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from alignment.config import GrpoConfig
from alignment.grpo import GrpoLoop
from alignment.prompts import PromptSchedule
from common.config import load
from common.log import say
from common.types import Score
from launch.compose import build_generator, quiet
from launch.schemas.training import GrpoRun

STEPS, MEMBERS, K = 16, 4, 2
ALL = {
    "stochastic": "all",
    "stochastic_first": 0,
    "stochastic_range": STEPS,
    "initial_noise": "member",
}
ONE = {"stochastic": "one", "stochastic_first": K, "stochastic_range": K + 1}
ARMS = {
    "all_steps": ALL,
    "one_step": {**ONE, "initial_noise": "member"},
    "shared": {**ONE, "initial_noise": "shared"},
}
C = 2  # samples of one velocity under guidance
COUNTS = {
    "all_steps": (C * MEMBERS * STEPS, C * MEMBERS * STEPS),
    "one_step": (C * MEMBERS * STEPS, C * MEMBERS),
    "shared": (C * (K + 1 + MEMBERS * (STEPS - K - 1)), C),
}


class CountingEngine:
    """deepspeed's two calls around plain SGD of rate 0: gradients are kept, weights stay."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        """The gradients of a whole update are read by `gradients`."""

    def gradients(self) -> Tensor:
        found = torch.cat([p.grad.flatten() for p in self.parameters])
        for p in self.parameters:
            p.grad = None
        return found


class Red:
    """MEAN red of a video: costs nothing and tells members apart."""

    name = "red"

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        return Score(video_BTYXC[..., 0].float().mean((1, 2, 3)))


class CountedArm:
    """A loop of one group a step, and what went through its transformer."""

    def __init__(self, name: str, *, size: int, frames: int) -> None:
        run = load(GrpoRun, "configs/shapes/grpo.yaml")
        sampler = replace(
            run.generator.sampler,
            num_steps=STEPS,
            max_std=0.45,
            guidance_scale=4.5,
            **ARMS[name],
        )
        shape = {"height": size, "width": size, "num_frames": frames}
        config = replace(run.generator, **shape, sampler=sampler, rollout_batch=1)
        self.generator = build_generator(config, seed=0)
        draw = torch.Generator().manual_seed(0)
        for parameter in self.generator.module.parameters():
            if parameter.requires_grad:
                parameter.data = 0.02 * torch.randn(
                    parameter.shape, generator=draw
                )  # policy and reference differ
        cfg = GrpoConfig(group_size=MEMBERS, kl_weight=1e-3)
        self.engine = CountingEngine(self.generator.module)
        self.loop = GrpoLoop(
            cfg,
            generator=self.generator,
            rewards={"red": Red()},
            weights={"red": 1.0},
            engine=self.engine,
            prompts=PromptSchedule(
                ["a red circle moves left"], seed=0, prompts_per_step=1
            ),
            fps=8.0,
        )
        self.counts = dict.fromkeys(("no_grad", "grad", "reference"), 0)
        self.generator.module.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: torch.nn.Module, args: tuple, options: dict) -> None:
        kind = (
            "grad"
            if torch.is_grad_enabled()
            else "reference"
            if self.generator._in_reference
            else "no_grad"
        )
        self.counts[kind] += len(options["hidden_states"])

    def step(self) -> tuple[Tensor, dict[str, int], dict[str, float]]:
        """Gradient of one update, the samples it took, and its metrics."""
        self.counts = dict.fromkeys(self.counts, 0)
        result = self.loop.step(0)
        return self.engine.gradients(), self.counts, result.metrics


def per_member_gradient(arm: CountedArm) -> Tensor:
    """Gradient of the update with a forward and a backward for each member, MEAN over members."""
    generator = arm.generator

    # The loop asks for one transition of the whole group. Detached copies of its mean collect the
    # gradient of the loss; each member then carries its share through a forward of its own.
    transition = generator.transition
    backward = arm.engine.backward
    asked: list[tuple[str, object, Tensor]] = []

    def record(prompt: str, step: object, member: int | None = None) -> object:
        found = transition(prompt, step, member)
        if not torch.is_grad_enabled():
            return found
        mean = found.mean.detach().expand(step.next_GCFHW.shape).clone()
        mean.requires_grad_()
        asked.append((prompt, step, mean))
        return replace(found, mean=mean)

    def backward_by_member(loss: Tensor) -> None:
        backward(loss)
        prompt, step, mean = asked.pop()
        for member in range(step.size):
            own_mean = transition(prompt, step, member).mean
            own_mean.backward(mean.grad[member : member + 1])

    generator.transition = record
    arm.engine.backward = backward_by_member
    return arm.step()[0]


def peak_memory(name: str, size: int, frames: int) -> float:
    """GB of a process that does nothing else, twice the same step."""
    words = [
        sys.executable,
        __file__,
        "--only",
        name,
        "--size",
        str(size),
        "--frames",
        str(frames),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="height and width")
    parser.add_argument("--frames", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only", choices=ARMS, help="one arm, twice; prints the peak memory in GB"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("docs/results/grpo_forwards.json")
    )
    args = parser.parse_args()
    quiet()
    size = {"size": args.size, "frames": args.frames}
    if args.only:
        arm = CountedArm(args.only, **size)
        arm.step()
        arm.step()
        say(str(round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)))
        return
    arms = {name: CountedArm(name, **size) for name in ARMS}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    counts: dict[str, dict[str, int]] = {}
    for round_number in range(args.rounds + 1):
        for name, arm in arms.items():
            start = time.perf_counter()
            _, counts[name], _ = arm.step()
            if round_number:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    for name, (no_grad, grad) in COUNTS.items():
        want = {"no_grad": no_grad, "grad": grad, "reference": grad}
        if counts[name] != want:
            raise AssertionError(
                f"{name}: counted {counts[name]}, the formula says {want}"
            )
    one, each = (
        CountedArm("shared", **size).step()[0] for update in ("collapsed", "per_member")
    )
    # the engine averages over backwards, of which there are G here and 1 there
    error = float((one - each / MEMBERS).norm() / one.norm())
    median = {name: statistics.median(times) for name, times in seconds.items()}
    cost = {
        name: found["no_grad"] + found["reference"] + 3 * found["grad"]
        for name, found in counts.items()
    }
    ratio = {
        "seconds": median["shared"] / median["one_step"],
        "counts": cost["shared"] / cost["one_step"],
    }
    result = {
        "command": "python experiments/bench/grpo_forwards.py",
        "size": [args.size, args.size, args.frames],
        "samples": counts,
        "seconds": median,
        "shared_to_one_step": {
            **ratio,
            "seconds_over_counts": ratio["seconds"] / ratio["counts"],
        },
        "relative_gradient_difference": error,
        "peak_memory_gb": {
            name: peak_memory(name, args.size, args.frames) for name in arms
        },
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(json.dumps(result))


if __name__ == "__main__":
    main()
