"""Rectified flow, and the one sign convention of this project:

    x_sigma = (1 - sigma) x_0 + sigma eps      sigma = 1 is noise, sigma = 0 is video
    v       = eps - x_0                        what the transformer predicts, from x_sigma and t = 1000 sigma
    sampling walks sigma down                  delta = sigma - sigma_next > 0

Wan, diffusers and Flow-GRPO use it too. LongCat-Video 2510.22200 states the opposite v in its equation 20 and this one
in equation 23. Tensors keep their device; arithmetic is fp32 or better: halves are widened, fp64 stays fp64. Nothing
here draws a random number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from common.gaussian import Gaussian

if TYPE_CHECKING:
    from torch import Tensor

# Without a ceiling, s = a sqrt(sigma / (1 - sigma)) is refused closer to sigma = 1 than this. The gap is fp32's
# resolution there, so 1.0 is caught after any round trip through fp32, and no test for equality is needed.
SINGULAR_GAP = 1e-7


@dataclass(frozen=True)
class Kernel:
    """How a stochastic step is taken: `sde_transition`, or `cps_transition`, which has no ``max_std``."""

    name: Literal["sde", "cps"] = "sde"
    noise_level: float = 1.0
    max_std: float | None = None

    def transition(
        self, x: Tensor, v: Tensor, sigma: float, sigma_next: float
    ) -> Gaussian:
        """Law of x at sigma_next."""
        if self.name == "cps":
            return cps_transition(x, v, sigma, sigma_next, noise_level=self.noise_level)
        return sde_transition(
            x, v, sigma, sigma_next, noise_level=self.noise_level, max_std=self.max_std
        )

    def gain(self, sigma: float, sigma_next: float) -> float:
        """-d mean / d v."""
        if self.name == "cps":
            return cps_gain(sigma, sigma_next, noise_level=self.noise_level)
        return sde_gain(
            sigma, sigma_next, noise_level=self.noise_level, max_std=self.max_std
        )


def widen(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 if it already is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_sample(sigma_B: Tensor, like: Tensor) -> Tensor:
    """sigma_B (B,) viewed as (B, 1, ...) so that it multiplies `like` (B, ...) sample by sample."""
    return sigma_B.to(like.device, like.dtype).view(-1, *[1] * (like.dim() - 1))


def interpolate(clean: Tensor, noise: Tensor, sigma_B: Tensor) -> Tensor:
    """x_sigma = (1 - sigma) x_0 + sigma eps, one sigma per sample. clean, noise (B, ...), sigma_B (B,) -> (B, ...)."""
    clean, noise = widen(clean), widen(noise)
    sigma = per_sample(sigma_B, clean)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """v = eps - x_0, what a perfect model predicts on average. Shapes as given."""
    return widen(noise) - widen(clean)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """u + scale (c - u): classifier-free guidance (2207.12598).

    Both are widened BEFORE they are mixed: the difference is amplified `scale` times, and so is bf16 rounding.
    """
    cond, uncond = widen(cond), widen(uncond)
    return uncond + scale * (cond - uncond)


def euler_step(x: Tensor, v: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x - delta v: one step of the probability-flow ODE."""
    delta = _delta(sigma, sigma_next)
    return widen(x) - delta * widen(v)


def adams_bashforth_step(
    x: Tensor, v: Tensor, v_before: Tensor, sigmas: tuple[float, float, float]
) -> Tensor:
    """x - delta [(1 + r / 2) v - (r / 2) v_before], r = delta / delta_before: second order, one velocity a step.

    sigmas  of v_before, of v, and after the step (two-step Adams-Bashforth with unequal steps)
    """
    before, sigma, after = sigmas
    delta = _delta(sigma, after)
    half = delta / _delta(before, sigma) / 2
    return widen(x) - delta * ((1 + half) * widen(v) - half * widen(v_before))


def effective_noise(
    sigma: float, sigma_next: float, *, noise_level: float, max_std: float | None
) -> float:
    """s = min(a sqrt(sigma / (1 - sigma)), tau / sqrt(delta)): the diffusion coefficient after truncation.

    LongCat-Video 2510.22200, section 3.3.1: the step's spread s sqrt(delta) is held at tau = `max_std`, and the same
    clipped s belongs into the drift. Which side is smaller is decided by cross-multiplication, so with a ceiling the
    value is finite everywhere, sigma = 1 included.

    Raises ValueError unless 1 >= sigma > sigma_next >= 0; and when there is no ceiling, noise_level > 0 and
    sigma > 1 - 1e-7, where s is infinite to fp32's resolution.
    """
    delta = _delta(sigma, sigma_next)
    if noise_level < 0 or (max_std is not None and max_std <= 0):
        raise ValueError(
            f"need noise_level >= 0 and max_std > 0 or None, got {noise_level} and {max_std}"
        )
    if noise_level == 0:
        return 0.0
    sigma = float(sigma)
    if max_std is not None and noise_level * math.sqrt(
        sigma * delta
    ) >= max_std * math.sqrt(1 - sigma):
        return max_std / math.sqrt(delta)
    if max_std is None and 1 - sigma < SINGULAR_GAP:
        raise ValueError(
            f"noise is infinite at sigma={sigma}: give max_std, or start the stochastic step below 1"
        )
    return noise_level * math.sqrt(sigma / (1 - sigma))


def velocity_gain(sigma: float, noise: float) -> float:
    """c~ = 1 + s^2 (1 - sigma) / (2 sigma): how much the drift correction of the SDE amplifies the velocity."""
    return 1 + noise**2 * (1 - sigma) / (2 * sigma)


def sde_transition(
    x: Tensor,
    v: Tensor,
    sigma: float,
    sigma_next: float,
    *,
    noise_level: float,
    max_std: float | None,
) -> Gaussian:
    """Law of x at sigma_next given x at sigma, one Euler-Maruyama step that keeps the flow's marginals.

        mean = x (1 - s^2 delta / (2 sigma)) - v delta (1 + s^2 (1 - sigma) / (2 sigma)),   std = s sqrt(delta)

    Flow-GRPO 2505.05470 and LongCat-Video 2510.22200 equation 23, the score being -(x + (1 - sigma) v) / sigma. ONE
    clipped s (`effective_noise`) is used in the mean and in the std. noise_level 0 is `euler_step`, bit for bit.

    x, v are (B, ...) or broadcast against each other -> Gaussian of that shape, fp32 or better, gradient through both.
    Raises ValueError as `effective_noise` does.
    """
    s = effective_noise(sigma, sigma_next, noise_level=noise_level, max_std=max_std)
    sigma, delta = float(sigma), _delta(sigma, sigma_next)
    keep = 1 - s**2 * delta / (2 * sigma)
    return Gaussian(
        keep * widen(x) - delta * velocity_gain(sigma, s) * widen(v),
        s * math.sqrt(delta),
    )


def cps_transition(
    x: Tensor, v: Tensor, sigma: float, sigma_next: float, *, noise_level: float
) -> Gaussian:
    """Coefficients-preserving sampling (Flow-CPS 2509.05952): noise is exchanged, not added, so x stays on the path.

        std = sigma_next sin(noise_level pi / 2),   mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1
        x0 = x - sigma v,  x1 = x + (1 - sigma) v   what v says is the video, and the noise

    noise_level in [0, 1]; 0 is `euler_step` up to rounding. Shapes, gradient and errors as `sde_transition`.
    """
    _delta(sigma, sigma_next)
    if not 0 <= noise_level <= 1:
        raise ValueError(
            f"cps_transition needs noise_level in [0, 1], got {noise_level}"
        )
    x, v, sigma, sigma_next = widen(x), widen(v), float(sigma), float(sigma_next)
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    kept = math.sqrt(sigma_next**2 - std**2)
    return Gaussian(
        (1 - sigma_next) * (x - sigma * v) + kept * (x + (1 - sigma) * v), std
    )


def cps_gain(sigma: float, sigma_next: float, *, noise_level: float) -> float:
    """-d mean / d v of `cps_transition`: sigma (1 - sigma_next) - (1 - sigma) sqrt(sigma_next^2 - std^2)."""
    kept = sigma_next * math.cos(noise_level * math.pi / 2)
    return sigma * (1 - sigma_next) - (1 - sigma) * kept


def sde_gain(
    sigma: float, sigma_next: float, *, noise_level: float, max_std: float | None
) -> float:
    """-d mean / d v of `sde_transition`: delta c~."""
    s = effective_noise(sigma, sigma_next, noise_level=noise_level, max_std=max_std)
    return _delta(sigma, sigma_next) * velocity_gain(sigma, s)


def _delta(sigma: float, sigma_next: float) -> float:
    if not 1 >= sigma > sigma_next >= 0:
        raise ValueError(
            f"a step needs 1 >= sigma > sigma_next >= 0, got {float(sigma)} and {float(sigma_next)}"
        )
    return float(sigma) - float(sigma_next)
