"""The sigma grid of the sampler, and which of its steps are stochastic.

The grid does not come from a diffusers scheduler: those differ between versions in their first
value, truncate timesteps to integers, or (UniPC) use previous steps, so that a step has no density
of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from common.distributed import derive_seed

if TYPE_CHECKING:
    from torch import Tensor

    from generator.config import SamplerConfig


def sigma_grid(num_steps: int, *, shift: float) -> Tensor:
    """Noise levels from 1 down to 0 with the time shift of SD3 -> (N + 1,) fp64.

        sigma_i = shift u / (1 + (shift - 1) u),  u = 1 - i / N,  i = 0..N

    SD3 (2403.03206, section 5.3.2), as Wan uses it.
    """
    return _shifted(1.0, 1.0, num_steps, shift)


def tail_grid(
    sigma: float,
    num_steps: int,
    *,
    shift: float,
) -> Tensor:
    """`sigma_grid` from ``sigma`` down to 0 in ``num_steps`` steps, equal in u: (N + 1,) fp64."""
    # u of the first sigma: the inverse of the time shift
    start = sigma / (shift - (shift - 1) * sigma)
    return _shifted(sigma, start, num_steps, shift)


def prefix_grid(
    sigma: float,
    num_steps: int,
    *,
    shift: float,
) -> Tensor:
    """Noise levels from 1 down to ``sigma`` in ``num_steps`` steps, equal in u: (N + 1,) fp64."""
    end = sigma / (shift - (shift - 1) * sigma)
    part = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    u = 1 - (1 - end) * part
    sigmas = shift * u / (1 + (shift - 1) * u)
    # exact, whatever the time shift rounds to
    sigmas[0] = 1.0
    sigmas[-1] = sigma
    return sigmas


def _shifted(
    sigma: float,
    start: float,
    num_steps: int,
    shift: float,
) -> Tensor:
    """Equal steps in u from ``start`` to 0, then the time shift; the first value is ``sigma``."""
    u = start * (1 - torch.arange(num_steps + 1, dtype=torch.float64) / num_steps)
    sigmas = shift * u / (1 + (shift - 1) * u)
    # exact by definition, whatever shift / (1 + (shift - 1)) rounds to
    sigmas[0] = sigma
    sigmas[-1] = 0.0
    return sigmas


def solver_grid(how: SamplerConfig) -> list[float]:
    """Noise levels of a rollout without stochastic steps, from 1 down to 0.

    With ``tail_steps`` it is a grid of that many steps, if they are fewer.
    """
    return sigma_grid(how.solver_steps, shift=how.shift).tolist()


def stochastic_steps(
    seed: int,
    how: SamplerConfig,
    *,
    iteration: int = 0,
) -> tuple[int, ...]:
    """Indices of the stochastic steps, in order, the same for every member of a group.

    "one"     draws from the seed, uniformly over stochastic_first..stochastic_range-1
              (LongCat-Video 2510.22200, Algorithm 1).
    "all"     takes every step of that range (Flow-GRPO 2505.05470).
    "window"  takes ``window_size`` neighbours, which move one step towards sigma = 0 every
              ``window_every`` training steps and stay at the end (MixGRPO 2507.21802).
    """
    # The range that the config allows.
    first = how.stochastic_first
    end = how.stochastic_range
    if how.stochastic == "none":
        return ()
    if how.stochastic == "one":
        return (first + derive_seed(seed, "step") % (end - first),)
    if how.stochastic == "all":
        return tuple(range(first, end))
    # a window, moved by the training step
    start = first + min(iteration // how.window_every, end - first - how.window_size)
    return tuple(range(start, start + how.window_size))
