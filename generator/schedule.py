"""When to evaluate the flow, which step is stochastic, and what its loss weighs. Numbers only.

The grid is our own, not a diffusers scheduler's: those differ between versions in their first value, truncate
timesteps to integers, or (UniPC) remember previous steps, for which no one-step law exists.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from common.distributed import derive_seed
from generator.flow import effective_noise

if TYPE_CHECKING:
    from torch import Tensor


class LossWeights(NamedTuple):
    """Factors of the two GRPO loss terms at one step."""

    policy: float
    kl: float


def sigma_grid(num_steps: int, *, shift: float) -> Tensor:
    """sigma_i = shift u / (1 + (shift - 1) u), u = 1 - i / N, for i = 0..N -> (N + 1,) fp64, 1 first and 0 last.

    The time shift of SD3 (2403.03206, section 5.3.2), as Wan uses it. Raises ValueError unless N >= 1 and shift > 0.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(f"sigma_grid needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}")
    u = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    sigmas = shift * u / (1 + (shift - 1) * u)
    sigmas[0], sigmas[-1] = 1.0, 0.0  # exact by definition, whatever shift / (1 + (shift - 1)) rounds to
    return sigmas


def stochastic_step(seed: int, stochastic_range: int) -> int:
    """The index of the one stochastic step, uniform over 0..T'-1 (LongCat-Video 2510.22200, Algorithm 1).

    The same seed gives the same index, on every rank and for every member of a group.
    """
    if stochastic_range < 1:
        raise ValueError(f"stochastic_range must be at least 1, got {stochastic_range}")
    return derive_seed(seed, "step") % stochastic_range


def loss_weights(sigma: float, sigma_next: float, *, noise_level: float, max_std: float | None) -> LossWeights:
    """policy = s / sqrt(delta), kl = s^2 / delta, with the clipped s of `effective_noise`.

    LongCat-Video 2510.22200, equations 6 to 8, states sqrt(sigma / (delta (1 - sigma))) and its square for an unclipped
    s, infinite at sigma = 1. With the clipped s the weighted gradients become

        policy * d logp = -c~ xi dv,    kl * KL = c~^2 |v - v_ref|^2 / 2,    c~ = 1 + s^2 (1 - sigma) / (2 sigma)

    (c~ is 3/2 where nothing is clipped and noise_level is 1, as in the paper, and tends to 1 at sigma = 1, as the
    authors say of their code in LongCat-Video issue 80). Both are 0 when noise_level is 0. Errors as `effective_noise`.
    """
    s = effective_noise(sigma, sigma_next, noise_level=noise_level, max_std=max_std)
    delta = float(sigma) - float(sigma_next)
    return LossWeights(policy=s / math.sqrt(delta), kl=s**2 / delta)
