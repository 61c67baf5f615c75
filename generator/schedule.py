"""When to evaluate the flow and which step is stochastic. Numbers only.

The grid is our own, not a diffusers scheduler's: those differ between versions in their first value, truncate
timesteps to integers, or (UniPC) remember previous steps, for which no one-step law exists.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from common.distributed import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from generator.config import SamplerConfig


def sigma_grid(num_steps: int, *, shift: float) -> Tensor:
    """sigma_i = shift u / (1 + (shift - 1) u), u = 1 - i / N, for i = 0..N -> (N + 1,) fp64, 1 first and 0 last.

    The time shift of SD3 (2403.03206, section 5.3.2), as Wan uses it. Raises ValueError unless N >= 1 and shift > 0.
    """
    if num_steps < 1 or shift <= 0:
        raise ValueError(
            f"sigma_grid needs num_steps >= 1 and shift > 0, got {num_steps} and {shift}"
        )
    u = 1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    sigmas = shift * u / (1 + (shift - 1) * u)
    sigmas[0], sigmas[-1] = (
        1.0,
        0.0,
    )  # exact by definition, whatever shift / (1 + (shift - 1)) rounds to
    return sigmas


def tail_grid(sigma: float, num_steps: int, *, shift: float) -> Tensor:
    """`sigma_grid` from ``sigma`` down to 0 in ``num_steps`` steps, equal in u: (N + 1,) fp64."""
    if not 0 < sigma <= 1 or num_steps < 1:
        raise ValueError(
            f"tail_grid needs sigma in (0, 1] and num_steps >= 1, got {sigma} and {num_steps}"
        )
    start = sigma / (shift - (shift - 1) * sigma)
    u = start * (1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps)
    sigmas = shift * u / (1 + (shift - 1) * u)
    sigmas[0], sigmas[-1] = sigma, 0.0
    return sigmas


def stochastic_steps(
    seed: int, how: SamplerConfig, *, iteration: int = 0
) -> tuple[int, ...]:
    """Indices of the stochastic steps, in the order they are taken. The same for every member of a group.

    "one"     uniform over stochastic_first..stochastic_range-1, from the seed (LongCat-Video 2510.22200, Algorithm 1)
    "all"     every one of those (Flow-GRPO 2505.05470)
    "window"  ``window_size`` neighbours that move one step towards sigma = 0 every ``window_every`` training steps
              (MixGRPO 2507.21802), and stay at the end of the range
    """
    first, end = how.stochastic_first, how.stochastic_range
    if how.stochastic == "one":
        return (first + derive_seed(seed, "step") % (end - first),)
    if how.stochastic == "all":
        return tuple(range(first, end))
    start = first + min(iteration // how.window_every, end - first - how.window_size)
    return tuple(range(start, start + how.window_size))
