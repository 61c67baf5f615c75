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

from common.distributed import generator as seeded
from common.gaussian import log_prob
from common.types import Group
from generator.flow import euler_step, sde_transition
from generator.schedule import stochastic_step

if TYPE_CHECKING:
    from torch import Tensor

Velocity: TypeAlias = Callable[["Tensor", float], "Tensor"]


def initial_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """x at sigma = 1 for this seed, fp32 on the CPU, of shape `shape`. Rollouts and evaluation share it."""
    return torch.randn(tuple(shape), generator=seeded(seed, "noise"))


def member_noise(seed: int, member: int, shape: Sequence[int]) -> Tensor:
    """xi of one group member at the stochastic step, fp32 on the CPU, of shape `shape`."""
    return torch.randn(tuple(shape), generator=seeded(seed, "member", member))


def ode(velocity: Velocity, x_BCFHW: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Euler steps along `sigmas` (descending): len(sigmas) - 1 velocities, none for a single sigma. Shape as given."""
    for sigma, sigma_next in pairwise(sigmas):
        x_BCFHW = euler_step(x_BCFHW, velocity(x_BCFHW, sigma), sigma, sigma_next)
    return x_BCFHW


@torch.no_grad()
def rollout_group(
    velocity: Velocity,
    prompt: str,
    *,
    seed: int,
    group_size: int,
    shape: Sequence[int],
    sigmas: Sequence[float],
    stochastic_range: int,
    noise_level: float,
    max_std: float | None,
    batch: int,
    device: torch.device | str = "cpu",
) -> Group:
    """G latents of one prompt that differ in one noise xi_g only (LongCat-Video 2510.22200, section 3.3.1).

    All members start from one noise and walk the same ODE to step k, so that walk and the velocity at step k are
    computed ONCE, at batch 1. There each member takes its own SDE step, and then the ODE to sigma = 0, `batch` members
    at a time: (k + 1) + G (T - k - 1) velocity samples instead of G T.

    seed decides everything: x_T ("noise"), k ("step"), xi_g ("member", g). shape is (C, F, H, W), sigmas the T + 1
    values of the grid. log_prob_G is NaN when noise_level is 0: such a step has no density.
    """
    k = stochastic_step(seed, stochastic_range)
    if group_size < 1 or batch < 1 or len(sigmas) < k + 2:
        raise ValueError(f"need group_size, batch >= 1 and step {k} on the grid, got {group_size}, {batch}, {sigmas}")
    sigma, sigma_next = sigmas[k], sigmas[k + 1]

    x_1CFHW = ode(velocity, initial_noise(seed, shape).unsqueeze(0).to(device), sigmas[: k + 1])
    law = sde_transition(x_1CFHW, velocity(x_1CFHW, sigma), sigma, sigma_next, noise_level=noise_level, max_std=max_std)
    xi_GCFHW = torch.stack([member_noise(seed, member, shape) for member in range(group_size)]).to(device)
    next_GCFHW = law.mean + law.std * xi_GCFHW
    if law.std > 0:
        log_prob_G = log_prob(law, next_GCFHW)
    else:
        log_prob_G = torch.full((group_size,), math.nan, device=next_GCFHW.device)

    tails = [ode(velocity, part, sigmas[k + 1 :]) for part in next_GCFHW.split(batch)]
    return Group(prompt, x_1CFHW[0], next_GCFHW, sigma, sigma_next, torch.cat(tails), log_prob_G)
