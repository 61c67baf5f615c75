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


@dataclass(frozen=True)
class Kernel:
    """The kind of a stochastic step. A noise_level of 0 is `euler_step`.

    sde  Euler-Maruyama steps that keep the marginals (Flow-GRPO 2505.05470 and LongCat-Video
         2510.22200 equation 23; the score is -(x + (1 - sigma) v) / sigma)

             mean = x (1 - s^2 delta / (2 sigma)) - v delta (1 + s^2 (1 - sigma) / (2 sigma))
             std  = s sqrt(delta)

         The SAME clipped s (`sde_noise`) is in the mean and in the std.
    cps  coefficients-preserving sampling (Flow-CPS 2509.05952): exchanges noise instead of
         adding it. noise_level is in [0, 1], and max_std is not used

             x0   = x - sigma v            the video that v implies
             x1   = x + (1 - sigma) v      the noise that v implies
             std  = sigma_next sin(noise_level pi / 2)
             mean = (1 - sigma_next) x0 + sqrt(sigma_next^2 - std^2) x1
    anchor  a jump of a flow map to a lower noise level a, then noise up to sigma_next; u is the
         mean velocity from sigma to a (`target`). Where x has the marginal of sigma and u is the
         flow map's, the next x has exactly that of sigma_next, however long the step (Flow-Map
         GRPO 2607.00535 has the idea). noise_level is in [0, 1]

             std   = noise_level min(max_std, sigma_next)
             q     = sqrt(sigma_next^2 - std^2) / (1 - sigma_next),   a = q / (1 + q)
             alpha = (1 - sigma_next) / (1 - a)
             mean  = alpha (x - (sigma - a) u)

    Every method raises ValueError unless 1 >= sigma > sigma_next >= 0.
    """

    name: Literal["sde", "cps", "anchor"] = "sde"
    noise_level: float = 1.0
    max_std: float | None = None

    def transition(
        self,
        x: Tensor,
        v: Tensor,
        sigma: float,
        sigma_next: float,
    ) -> Gaussian:
        """Distribution of x at sigma_next, fp32 or better, with gradient through x and v.

        x and v are (B, ...) or broadcast against each other -> Gaussian of that shape. v is the
        velocity at sigma, or for an anchor the mean velocity from sigma to `target`.
        """
        x = widen(x)
        v = widen(v)
        delta = _delta(sigma, sigma_next)
        if self.name == "anchor":
            anchor = self.target(sigma, sigma_next)
            scale = (1 - sigma_next) / (1 - anchor)
            jumped = euler_step(x, v, sigma, anchor)
            return Gaussian(scale * jumped, self._anchor_std(sigma_next))
        if self.name == "sde":
            # The same clipped s is in the drift and in the std.
            s = self.sde_noise(sigma, sigma_next)
            decay = 1 - s**2 * delta / (2 * sigma)
            return Gaussian(
                decay * x - self.gain(sigma, sigma_next) * v, s * math.sqrt(delta)
            )
        # Split the new noise level into old and fresh noise.
        std = sigma_next * math.sin(self.noise_level * math.pi / 2)
        old_noise = math.sqrt(sigma_next**2 - std**2)
        # Mix the video and the old noise; fresh noise is the Gaussian's std.
        video = x - sigma * v
        noise = x + (1 - sigma) * v
        return Gaussian((1 - sigma_next) * video + old_noise * noise, std)

    def gain(self, sigma: float, sigma_next: float) -> float:
        """Return -d mean / d v of the transition.

        sde  delta (1 + s^2 (1 - sigma) / (2 sigma))
        cps  sigma (1 - sigma_next) - (1 - sigma) sqrt(sigma_next^2 - std^2)
        anchor  alpha (sigma - a)
        """
        if self.name == "sde":
            s = self.sde_noise(sigma, sigma_next)
            correction = 1 + s**2 * (1 - sigma) / (2 * sigma)
            return _delta(sigma, sigma_next) * correction
        if self.name == "anchor":
            anchor = self.target(sigma, sigma_next)
            return (1 - sigma_next) / (1 - anchor) * (sigma - anchor)
        # sqrt(sigma_next^2 - std^2) is a cosine when std is the sine
        old_noise = sigma_next * math.cos(self.noise_level * math.pi / 2)
        return sigma * (1 - sigma_next) - (1 - sigma) * old_noise

    def target(self, sigma: float, sigma_next: float) -> float:
        """Noise level where the velocity that `transition` takes ends: sigma, or the anchor a."""
        _delta(sigma, sigma_next)
        if self.name != "anchor":
            return sigma
        std = self._anchor_std(sigma_next)
        old_noise = math.sqrt(sigma_next**2 - std**2)
        ratio = old_noise / (1 - sigma_next)
        return ratio / (1 + ratio)

    def _anchor_std(self, sigma_next: float) -> float:
        ceiling = sigma_next if self.max_std is None else self.max_std
        return self.noise_level * min(ceiling, sigma_next)

    def sde_noise(self, sigma: float, sigma_next: float) -> float:
        """Diffusion coefficient of an sde step after truncation.

            s = min(a sqrt(sigma / (1 - sigma)), tau / sqrt(delta))

        LongCat-Video 2510.22200, section 3.3.1: the standard deviation s sqrt(delta) of the
        step is limited to tau = ``max_std``, and the same s enters the drift. Raises ValueError
        without a ceiling when noise_level > 0 and sigma > 1 - 1e-7, where s is infinite to the
        resolution of fp32.
        """
        delta = _delta(sigma, sigma_next)
        if self.noise_level == 0:
            return 0.0
        if self.max_std is None and 1 - sigma < SINGULAR_GAP:
            raise ValueError(
                f"noise is infinite at sigma={sigma}: set max_std, or start below 1"
            )
        # compared by cross-multiplication, so that the result is finite at sigma = 1 too
        if self.max_std is not None:
            unbounded = self.noise_level * math.sqrt(sigma * delta)
            if unbounded >= self.max_std * math.sqrt(1 - sigma):
                return self.max_std / math.sqrt(delta)
        return self.noise_level * math.sqrt(sigma / (1 - sigma))


def _delta(sigma: float, sigma_next: float) -> float:
    """Return the size of a step, after checking its direction."""
    if not 1 >= sigma > sigma_next >= 0:
        raise ValueError(
            f"a step needs 1 >= sigma > sigma_next >= 0, got {sigma} and {sigma_next}"
        )
    return sigma - sigma_next
