"""Kernels of `generator.flow` as functions of their settings."""

from __future__ import annotations

from torch import Tensor

from common.gaussian import Gaussian
from generator.flow import Kernel


def sde_transition(
    x: Tensor,
    v: Tensor,
    sigma: float,
    after: float,
    *,
    noise_level: float,
    max_std: float | None,
) -> Gaussian:
    return Kernel("sde", noise_level, max_std).transition(x, v, sigma, after)


def cps_transition(
    x: Tensor, v: Tensor, sigma: float, after: float, *, noise_level: float
) -> Gaussian:
    return Kernel("cps", noise_level).transition(x, v, sigma, after)


def effective_noise(
    sigma: float, after: float, *, noise_level: float, max_std: float | None
) -> float:
    return Kernel("sde", noise_level, max_std).sde_noise(sigma, after)
