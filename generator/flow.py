"""Rectified flow: steps of the sampler, and the sign convention of this project.

    x_sigma = (1 - sigma) x_0 + sigma eps      sigma = 1 is noise, sigma = 0 is video
    v       = eps - x_0                        what the transformer predicts, given t = 1000 sigma
    sampling walks sigma down                  delta = sigma - sigma_next > 0

Wan, diffusers and Flow-GRPO use the same signs. LongCat-Video (2510.22200) states the opposite v
in its equation 20 and this v in equation 23. Tensors keep their device. Arithmetic is fp32 or
better: half precision is widened, fp64 stays fp64. Nothing in this file draws a random number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from common.gaussian import SINGULAR_GAP, Gaussian, widen

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Kernel:
    """The kind of a stochastic step: `sde_transition`, or `cps_transition` without ``max_std``."""

    name: Literal["sde", "cps"] = "sde"
    noise_level: float = 1.0
    max_std: float | None = None

    def transition(
        self,
        x: Tensor,
        v: Tensor,
        sigma: float,
        sigma_next: float,
    ) -> Gaussian:
        """Distribution of x at sigma_next."""
        # Coefficients-preserving steps have no ceiling on their std.
        if self.name == "cps":
            return cps_transition(x, v, sigma, sigma_next, noise_level=self.noise_level)
        return sde_transition(
            x,
            v,
            sigma,
            sigma_next,
            noise_level=self.noise_level,
            max_std=self.max_std,
        )

    def gain(self, sigma: float, sigma_next: float) -> float:
        """Return -d mean / d v of the transition."""
        if self.name == "cps":
            return cps_gain(sigma, sigma_next, noise_level=self.noise_level)
        return sde_gain(
            sigma,
            sigma_next,
            noise_level=self.noise_level,
            max_std=self.max_std,
        )


# ---- training pairs, guidance ----


def interpolate(
    clean: Tensor,
    noise: Tensor,
    sigma_B: Tensor,
) -> Tensor:
    """Noise clean latents: x_sigma = (1 - sigma) x_0 + sigma eps, one sigma per sample.

    clean and noise are (B, ...), sigma_B is (B,) -> (B, ...).
    """
    clean = widen(clean)
    noise = widen(noise)
    # A sigma holds for all elements of its sample.
    ones = [1] * (clean.dim() - 1)
    sigma = sigma_B.to(clean.device, clean.dtype).view(-1, *ones)
    return (1 - sigma) * clean + sigma * noise


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Return v = eps - x_0, the mean prediction of a perfect model, in the shape of the inputs."""
    return widen(noise) - widen(clean)


def guide(
    cond: Tensor,
    uncond: Tensor,
    scale: float,
) -> Tensor:
    """Classifier-free guidance: u + scale (c - u) (2207.12598)."""
    # widened BEFORE mixing: the difference is amplified `scale` times, and so is bf16 rounding
    cond = widen(cond)
    uncond = widen(uncond)
    return uncond + scale * (cond - uncond)


# ---- deterministic steps ----


def euler_step(
    x: Tensor,
    v: Tensor,
    sigma: float,
    sigma_next: float,
) -> Tensor:
    """Take one Euler step of the probability-flow ODE: x - delta v."""
    # towards the video
    delta = _delta(sigma, sigma_next)
    return widen(x) - delta * widen(v)


def adams_bashforth_step(
    x: Tensor,
    v: Tensor,
    v_before: Tensor,
    sigmas: tuple[float, float, float],
) -> Tensor:
    """Take one second-order step with unequal step sizes, at one velocity a step.

        x - delta [(1 + r / 2) v - (r / 2) v_before],   r = delta / delta_before

    ``sigmas`` are the noise levels of v_before, of v, and after the step.
    """
    # The two last velocities extrapolate to the middle of the step.
    before, sigma, after = sigmas
    delta = _delta(sigma, after)
    half = delta / _delta(before, sigma) / 2
    return widen(x) - delta * ((1 + half) * widen(v) - half * widen(v_before))


# ---- stochastic steps ----


def effective_noise(
    sigma: float,
    sigma_next: float,
    *,
    noise_level: float,
    max_std: float | None,
) -> float:
    """Diffusion coefficient after truncation.

        s = min(a sqrt(sigma / (1 - sigma)), tau / sqrt(delta))

    LongCat-Video 2510.22200, section 3.3.1: the standard deviation s sqrt(delta) of the step is
    limited to tau = ``max_std``, and the same s enters the drift.

    Raises ValueError unless 1 >= sigma > sigma_next >= 0; also when there is no ceiling,
    noise_level > 0 and sigma > 1 - 1e-7, where s is infinite to the resolution of fp32.
    """
    delta = _delta(sigma, sigma_next)
    if noise_level < 0 or (max_std is not None and max_std <= 0):
        raise ValueError(
            f"need noise_level >= 0 and max_std > 0 or None, got {noise_level} and {max_std}"
        )
    if noise_level == 0:
        return 0.0
    sigma = float(sigma)
    if max_std is None:
        if 1 - sigma < SINGULAR_GAP:
            raise ValueError(
                f"noise is infinite at sigma={sigma}: set max_std, or start below 1"
            )
        return noise_level * math.sqrt(sigma / (1 - sigma))
    # compared by cross-multiplication, so that the result is finite at sigma = 1 too
    if noise_level * math.sqrt(sigma * delta) >= max_std * math.sqrt(1 - sigma):
        return max_std / math.sqrt(delta)
    return noise_level * math.sqrt(sigma / (1 - sigma))


def velocity_gain(sigma: float, noise: float) -> float:
    """Factor of the SDE's drift correction on the velocity: 1 + s^2 (1 - sigma) / (2 sigma)."""
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
    """Distribution of x at sigma_next after one Euler-Maruyama step that keeps the marginals.

        mean = x (1 - s^2 delta / (2 sigma)) - v delta (1 + s^2 (1 - sigma) / (2 sigma))
        std  = s sqrt(delta)

    Flow-GRPO 2505.05470 and LongCat-Video 2510.22200 equation 23; the score is
    -(x + (1 - sigma) v) / sigma. The SAME clipped s (`effective_noise`) is in the mean and in the
    std. A noise_level of 0 equals `euler_step` bit for bit.

    x and v are (B, ...) or broadcast against each other -> Gaussian of that shape, fp32 or better,
    with gradient through both. Raises ValueError as `effective_noise` does.
    """
    s = effective_noise(
        sigma,
        sigma_next,
        noise_level=noise_level,
        max_std=max_std,
    )
    sigma = float(sigma)
    # The same clipped s is in the drift and in the std.
    delta = _delta(sigma, sigma_next)
    decay = 1 - s**2 * delta / (2 * sigma)
    mean = decay * widen(x) - delta * velocity_gain(sigma, s) * widen(v)
    return Gaussian(mean, s * math.sqrt(delta))


def sde_gain(
    sigma: float,
    sigma_next: float,
    *,
    noise_level: float,
    max_std: float | None,
) -> float:
    """Return -d mean / d v of `sde_transition`: delta (1 + s^2 (1 - sigma) / (2 sigma))."""
    s = effective_noise(
        sigma,
        sigma_next,
        noise_level=noise_level,
        max_std=max_std,
    )
    delta = _delta(sigma, sigma_next)
    return delta * velocity_gain(sigma, s)


def cps_transition(
    x: Tensor,
    v: Tensor,
    sigma: float,
    sigma_next: float,
    *,
    noise_level: float,
) -> Gaussian:
    """Coefficients-preserving sampling (Flow-CPS 2509.05952): exchanges noise instead of adding it.

        x0   = x - sigma v            the video that v implies
        x1   = x + (1 - sigma) v      the noise that v implies
        std  = sigma_next sin(noise_level pi / 2)
        mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1

    noise_level is in [0, 1]; 0 equals `euler_step` up to rounding. Shapes, gradient and errors are
    those of `sde_transition`.
    """
    _delta(sigma, sigma_next)
    if not 0 <= noise_level <= 1:
        raise ValueError(
            f"cps_transition needs noise_level in [0, 1], got {noise_level}"
        )
    x = widen(x)
    v = widen(v)
    sigma = float(sigma)
    sigma_next = float(sigma_next)
    # Split the new noise level into old and fresh noise.
    std = sigma_next * math.sin(noise_level * math.pi / 2)
    old_noise = math.sqrt(sigma_next**2 - std**2)
    # Mix the video and the old noise; fresh noise is the Gaussian's std.
    video = x - sigma * v
    noise = x + (1 - sigma) * v
    mean = (1 - sigma_next) * video + old_noise * noise
    return Gaussian(mean, std)


def cps_gain(
    sigma: float,
    sigma_next: float,
    *,
    noise_level: float,
) -> float:
    """Return -d mean / d v of `cps_transition`.

    sigma (1 - sigma_next) - (1 - sigma) sqrt(sigma_next^2 - std^2)
    """
    # sqrt(sigma_next^2 - std^2) is a cosine when std is the sine
    old_noise = sigma_next * math.cos(noise_level * math.pi / 2)
    return sigma * (1 - sigma_next) - (1 - sigma) * old_noise


def _delta(sigma: float, sigma_next: float) -> float:
    """Return the size of a step, after checking its direction."""
    if not 1 >= sigma > sigma_next >= 0:
        raise ValueError(
            f"a step needs 1 >= sigma > sigma_next >= 0, got {float(sigma)} and {float(sigma_next)}"
        )
    return float(sigma) - float(sigma_next)
