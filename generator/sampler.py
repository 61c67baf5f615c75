"""The group rollout: one shared ODE prefix, stochastic steps per member, a deterministic tail.

Everything here is a function of a velocity `(x_BCFHW, sigma) -> v_BCFHW`, without model or config.
Noise is drawn on the CPU from seeds, so a latent does not depend on the device, the rank, the
batch it was sampled in or the other latents of that batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import torch

from common import faults
from common.distributed import derive_seed, seeded_generator
from common.gaussian import log_prob
from common.types import Group, Step
from generator.flow import adams_bashforth_step, euler_step

if TYPE_CHECKING:
    from torch import Tensor

    from common.memory import AdaptiveBatcher
    from generator.flow import Kernel

Velocity: TypeAlias = Callable[["Tensor", float], "Tensor"]
# u(x, sigma, target) of a flow map.
MeanVelocity: TypeAlias = Callable[["Tensor", float, float], "Tensor"]
# A deterministic walk from (x, descending sigmas).
DeterministicWalk: TypeAlias = Callable[["Tensor", Sequence[float]], "Tensor"]


@dataclass(frozen=True)
class Members:
    """The members of one prompt's group that a call computes.

    seed   decides all noise of the group
    size   G, the number of members
    first  number of the first member, where other calls compute the rest of the group
    """

    prompt: str
    seed: int
    size: int
    first: int = 0

    @property
    def numbers(self) -> range:
        """Numbers of these members within their group; a member's noise depends on its number."""
        return range(self.first, self.first + self.size)


@dataclass(frozen=True)
class Walk:
    """How a group gets from noise to clean latents.

    shape         (C, F, H, W) of one latent
    sigmas        the T + 1 noise levels of the grid, descending
    steps         consecutive indices of the stochastic steps
    kernel        of the stochastic steps
    shared_noise  False starts every member from its own noise, so that no prefix is shared
    tail          deterministic walk to sigma = 0 from (x, remaining sigmas)
    prefix        deterministic walk to the first stochastic step; None takes Euler steps with
                  the velocity that the stochastic steps have

    Only stochastic steps have a density, so the policy gradient is exact for whatever prefix and
    tail compute: they decide which x_k and which video a group gets.
    Without stochastic steps the tail is the whole way from noise of each member's own. Raises
    ValueError when the steps are not consecutive, not on the grid, or none with shared noise.
    """

    shape: Sequence[int]
    sigmas: Sequence[float]
    steps: Sequence[int]
    kernel: Kernel
    tail: DeterministicWalk
    shared_noise: bool = True
    prefix: DeterministicWalk | None = None

    def __post_init__(self) -> None:
        if not self.steps and not self.shared_noise:
            return
        # A step has a noise level before and after it.
        if not self.steps or len(self.sigmas) < self.steps[-1] + 2:
            raise ValueError(
                f"steps {list(self.steps)} must lie on the grid {self.sigmas}"
            )
        # Between stochastic steps there is no deterministic step.
        if list(self.steps) != list(range(self.steps[0], self.steps[-1] + 1)):
            raise ValueError(
                f"stochastic steps must be consecutive, got {list(self.steps)}"
            )


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """x at sigma = 1 for a seed, fp32 on the CPU; rollouts and evaluation share it."""
    return torch.randn(tuple(shape), generator=seeded_generator(seed, "noise"))


def member_noise(
    seed: int,
    member: int,
    shape: Sequence[int],
    *,
    number: int = 0,
) -> Tensor:
    """Noise of one member at the group's ``number``-th stochastic step, fp32 on the CPU."""
    purpose = ["member", member]
    # the first step's seed has no number, so a group with a single step keeps its noise
    if number > 0:
        purpose.append(number)
    return torch.randn(tuple(shape), generator=seeded_generator(seed, *purpose))


def ode(
    velocity: Velocity,
    x_BCFHW: Tensor,
    sigmas: Sequence[float],
) -> Tensor:
    """Take Euler steps along descending ``sigmas``: one velocity a step, the shape of x."""
    # From noise towards the video.
    for sigma, sigma_next in pairwise(sigmas):
        x_BCFHW = euler_step(x_BCFHW, velocity(x_BCFHW, sigma), sigma, sigma_next)
    return x_BCFHW


def ode_ab2(
    velocity: Velocity,
    x_BCFHW: Tensor,
    sigmas: Sequence[float],
) -> Tensor:
    """Take two-step Adams-Bashforth steps along ``sigmas``: second order at the cost of `ode`."""
    before: tuple[float, Tensor] | None = None
    for sigma, sigma_next in pairwise(sigmas):
        v_BCFHW = velocity(x_BCFHW, sigma)
        # the first step is Euler's: no velocity before it belongs to this path
        if before is None:
            x_BCFHW = euler_step(x_BCFHW, v_BCFHW, sigma, sigma_next)
        else:
            levels = (before[0], sigma, sigma_next)
            x_BCFHW = adams_bashforth_step(x_BCFHW, v_BCFHW, before[1], levels)
        before = (sigma, v_BCFHW)
    return x_BCFHW


def jumps(
    mean_velocity: MeanVelocity,
    x_BCFHW: Tensor,
    sigmas: Sequence[float],
) -> Tensor:
    """Jump along descending ``sigmas``: x - (sigma - target) u, one mean velocity a jump."""
    for sigma, target in pairwise(sigmas):
        u_BCFHW = mean_velocity(x_BCFHW, sigma, target)
        x_BCFHW = euler_step(x_BCFHW, u_BCFHW, sigma, target)
    return x_BCFHW


def velocity_calls(
    steps: Sequence[int],
    num_steps: int,
    group_size: int,
    batch: int,
    *,
    shared_noise: bool,
    tail_steps: int | None,
    prefix_steps: int | None = None,
) -> int:
    """Number of velocity calls of `rollout_group`, at most ``batch`` latents in each."""
    # A step of all members takes this many calls.
    per_step = math.ceil(group_size / batch)
    # without stochastic steps, the whole way is the tail
    if not steps:
        return min(num_steps, tail_steps or num_steps) * per_step
    # prefix, and the velocity of the first stochastic step
    prefix = steps[0] + 1
    if prefix_steps is not None:
        prefix = min(steps[0], prefix_steps) + 1
    if not shared_noise:
        prefix *= per_step
    # further stochastic steps, and the tail
    tail = num_steps - 1 - steps[-1]
    if tail_steps is not None:
        tail = min(tail, tail_steps)
    return prefix + (len(steps) - 1 + tail) * per_step


@torch.no_grad()
def rollout_group(
    velocity: Velocity,
    members: Members,
    walk: Walk,
    *,
    batch: AdaptiveBatcher,
    device: torch.device | str = "cpu",
) -> Group:
    """Sample G latents of one prompt.

    With shared noise all members walk the same ODE to the first stochastic step k, so that walk
    and the velocity at step k are computed ONCE, at batch 1 (LongCat-Video 2510.22200, section
    3.3.1). From there every member takes its own steps to sigma = 0, in batches: (k + 1) +
    G (T - k - 1) velocity samples instead of G T.

    Log-probs are NaN when the kernel adds no noise: such a step has no density.
    """

    def in_batches(x_BCFHW: Tensor, sigma: float) -> Tensor:
        return batch.over(lambda part_BCFHW: velocity(part_BCFHW, sigma), x_BCFHW)

    # 1. Deterministic prefix, from one noise or from one per member.
    if walk.shared_noise:
        seeds = [members.seed]
    else:
        seeds = [derive_seed(members.seed, "initial", g) for g in members.numbers]
    x_MCFHW = torch.stack([initial_noise(s, walk.shape) for s in seeds]).to(device)
    faults.point("prefix")
    if not walk.steps:
        clean_GCFHW = batch.over(lambda part: walk.tail(part, walk.sigmas), x_MCFHW)
        return Group(members.prompt, (), clean_GCFHW, deterministic=True)
    before = walk.sigmas[: walk.steps[0] + 1]
    if walk.prefix is None:
        x_MCFHW = ode(in_batches, x_MCFHW, before)
    elif len(before) > 1:
        x_MCFHW = batch.over(lambda part: walk.prefix(part, before), x_MCFHW)

    # 2. Stochastic steps: every member draws its own noise.
    taken = []
    for number, k in enumerate(walk.steps):
        v_MCFHW = in_batches(x_MCFHW, walk.sigmas[k])
        xi = [
            member_noise(members.seed, g, walk.shape, number=number)
            for g in members.numbers
        ]
        step = _stochastic_step(walk, k, x_MCFHW, v_MCFHW, torch.stack(xi).to(device))
        taken.append(step)
        x_MCFHW = step.next_GCFHW

    # 3. Deterministic tail.
    faults.point("tail")
    remaining = walk.sigmas[walk.steps[-1] + 1 :]

    clean_GCFHW = batch.over(lambda part: walk.tail(part, remaining), x_MCFHW)
    return Group(members.prompt, tuple(taken), clean_GCFHW)


def _stochastic_step(
    walk: Walk,
    k: int,
    x_MCFHW: Tensor,
    v_MCFHW: Tensor,
    xi_GCFHW: Tensor,
) -> Step:
    """Take step k of the grid for all members, and record the density of where they went."""
    # Move every member by its noise.
    sigma = walk.sigmas[k]
    sigma_next = walk.sigmas[k + 1]
    transition = walk.kernel.transition(x_MCFHW, v_MCFHW, sigma, sigma_next)
    next_GCFHW = transition.mean + transition.std * xi_GCFHW
    # A step without noise has no density.
    if transition.std > 0:
        log_prob_G = log_prob(transition, next_GCFHW)
    else:
        log_prob_G = next_GCFHW.new_full((len(next_GCFHW),), math.nan)
    return Step(
        x_MCFHW,
        next_GCFHW,
        sigma,
        sigma_next,
        log_prob_G,
        transition.std,
        walk.kernel.gain(sigma, sigma_next),
        transition.mean,
    )
