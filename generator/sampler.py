"""Walks down the sigma grid: the plain ODE, and the group rollout that shares everything but one noise.

Pure functions over a velocity `(x_BCFHW, sigma) -> v_BCFHW`; no model, no config, no progress. Noise is drawn on the
CPU from seeds, so a latent does not depend on the device, the rank, the batch it was sampled in or its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

import torch

from common import faults
from common.distributed import derive_seed
from common.distributed import generator as seeded
from common.gaussian import log_prob
from common.memory import AdaptiveBatcher
from common.types import Group, Step
from generator.flow import adams_bashforth_step, euler_step

if TYPE_CHECKING:
    from torch import Tensor

    from generator.flow import Kernel

Velocity: TypeAlias = Callable[["Tensor", float], "Tensor"]


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """x at sigma = 1 for this seed, fp32 on the CPU, of shape `shape`. Rollouts and evaluation share it."""
    return torch.randn(tuple(shape), generator=seeded(seed, "noise"))


def member_noise(
    seed: int, member: int, shape: Sequence[int], *, number: int = 0
) -> Tensor:
    """xi of one group member at the group's ``number``-th stochastic step, fp32 on the CPU, of shape `shape`."""
    return torch.randn(
        tuple(shape),
        generator=seeded(seed, "member", member, *([number] if number else [])),
    )


def ode(velocity: Velocity, x_BCFHW: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler steps along `sigmas` (descending): len(sigmas) - 1 velocities, none for a single sigma. Shape as given."""
    for sigma, sigma_next in pairwise(sigmas):
        x_BCFHW = euler_step(x_BCFHW, velocity(x_BCFHW, sigma), sigma, sigma_next)
    return x_BCFHW


def ode_ab2(velocity: Velocity, x_BCFHW: Tensor, sigmas: Sequence[float]) -> Tensor:
    """The same walk by two-step Adams-Bashforth: as many velocities as `ode`, an error of second order.

    The first step is Euler's: there is nothing before it, a stochastic step having broken the path.
    """
    before: tuple[float, Tensor] | None = None
    for sigma, sigma_next in pairwise(sigmas):
        v_BCFHW = velocity(x_BCFHW, sigma)
        if before is None:
            x_BCFHW = euler_step(x_BCFHW, v_BCFHW, sigma, sigma_next)
        else:
            x_BCFHW = adams_bashforth_step(
                x_BCFHW, v_BCFHW, before[1], (before[0], sigma, sigma_next)
            )
        before = (sigma, v_BCFHW)
    return x_BCFHW


def velocity_calls(
    steps: Sequence[int],
    num_steps: int,
    group_size: int,
    batch: int,
    *,
    shared_noise: bool,
    tail_steps: int | None,
) -> int:
    """How often `rollout_group` asks for a velocity: every step of the walk once for each batch of its latents."""
    whole = -(-group_size // batch)
    left = num_steps - 1 - steps[-1]
    tail = left if tail_steps is None else min(left, tail_steps)
    return (steps[0] + 1) * (1 if shared_noise else whole) + (
        len(steps) - 1 + tail
    ) * whole


@torch.no_grad()
def rollout_group(
    velocity: Velocity,
    prompt: str,
    *,
    seed: int,
    group_size: int,
    shape: Sequence[int],
    sigmas: Sequence[float],
    steps: Sequence[int],
    kernel: Kernel,
    shared_noise: bool = True,
    tail: Callable[[Tensor, Sequence[float]], Tensor] | None = None,
    first_member: int = 0,
    batch: int | AdaptiveBatcher,
    device: torch.device | str = "cpu",
) -> Group:
    """G latents of one prompt. With shared noise they differ from the first stochastic step on only.

    All members start from one noise and walk the same ODE to step k, so that walk and the velocity at step k are
    computed ONCE, at batch 1 (LongCat-Video 2510.22200, section 3.3.1). There each member takes its own step, and then
    the ODE to sigma = 0, `batch` members at a time: (k + 1) + G (T - k - 1) velocity samples instead of G T.

    seed decides everything: x_T ("noise"), xi_g ("member", g). shape is (C, F, H, W), sigmas the T + 1 values of the
    grid, steps the consecutive stochastic ones (`generator.schedule.stochastic_steps`).
    shared_noise  False starts every member from a noise of its own ("initial", g): nothing is shared then
    tail          the deterministic walk to 0 from x and what is left of the grid; None is Euler along it
    first_member  number of the first, where these are a part of a larger group: noise belongs to the number
    log-probs are NaN when the kernel adds no noise: such a step has no density.
    """
    steps, members = list(steps), range(first_member, first_member + group_size)
    portions = (
        batch
        if isinstance(batch, AdaptiveBatcher)
        else AdaptiveBatcher(batch, what="latents")
    )
    if group_size < 1 or not steps or len(sigmas) < steps[-1] + 2:
        raise ValueError(
            f"need group_size >= 1 and steps {steps} on the grid, got {group_size}, {sigmas}"
        )
    if steps != list(range(steps[0], steps[0] + len(steps))):
        raise ValueError(f"stochastic steps must follow each other, got {steps}")

    def in_batches(x_BCFHW: Tensor, sigma: float) -> Tensor:
        return portions.over(lambda part_BCFHW: velocity(part_BCFHW, sigma), x_BCFHW)

    seeds = (
        [seed]
        if shared_noise
        else [derive_seed(seed, "initial", member) for member in members]
    )
    x_MCFHW = torch.stack([initial_noise(own, shape) for own in seeds]).to(device)
    faults.point("prefix")
    x_MCFHW = ode(in_batches, x_MCFHW, sigmas[: steps[0] + 1])
    taken = []
    for number, k in enumerate(steps):
        sigma, sigma_next = sigmas[k], sigmas[k + 1]
        law = kernel.transition(x_MCFHW, in_batches(x_MCFHW, sigma), sigma, sigma_next)
        xi_GCFHW = torch.stack(
            [member_noise(seed, g, shape, number=number) for g in members]
        ).to(device)
        next_GCFHW = law.mean + law.std * xi_GCFHW
        log_prob_G = (
            log_prob(law, next_GCFHW)
            if law.std > 0
            else next_GCFHW.new_full((group_size,), math.nan)
        )
        taken.append(
            Step(
                x_MCFHW,
                next_GCFHW,
                sigma,
                sigma_next,
                log_prob_G,
                law.std,
                kernel.gain(sigma, sigma_next),
            )
        )
        x_MCFHW = next_GCFHW

    faults.point("tail")
    after = sigmas[steps[-1] + 1 :]
    finish = tail if tail is not None else lambda x, left: ode(velocity, x, left)
    clean_GCFHW = portions.over(lambda part_BCFHW: finish(part_BCFHW, after), x_MCFHW)
    return Group(prompt, tuple(taken), clean_GCFHW)
