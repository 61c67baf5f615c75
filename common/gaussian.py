"""The law of one stochastic sampling step: an isotropic Gaussian whose spread is one number.

Both reductions are the MEAN over latent elements, not the sum: an 81-frame 480p Wan latent has 2 million elements
and the exponential of a sum leaves fp32. Ratios stay close to one, which is why published runs clip near 1e-4
(flow_grpo, GenRL and MixGRPO reduce the same way; LongCat-Video 2510.22200 does not say).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I). mean (B or 1, ...); std one python float >= 0 for the whole step, 0 is the ODE.

    Raises ValueError when std is negative, infinite or NaN.
    """

    mean: Tensor
    std: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.std < math.inf:
            raise ValueError(
                f"Gaussian.std must be a finite number >= 0, got {self.std}"
            )


def log_prob(p: Gaussian, x: Tensor) -> Tensor:
    """log p(x), MEAN over every dimension but the first -> (B,), fp32 or fp64.

        log p = mean[ -(x - mean)^2 / (2 std^2) ] - ln std - ln(2 pi) / 2        (Flow-GRPO 2505.05470, appendix)

    x is (B, ...); p.mean is (B, ...), or (1, ...) when all samples share one mean. Gradient flows into both.
    Raises ValueError when std is 0 (no density) or the shapes do not fit.
    """
    if p.std == 0.0:
        raise ValueError("log_prob needs std > 0: a step without noise has no density")
    squared_B = _mean_square(x, p.mean)
    return (
        -squared_B / (2.0 * p.std**2) - math.log(p.std) - 0.5 * math.log(2.0 * math.pi)
    )


def kl_same_std(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of two Gaussians of the same spread, MEAN over every dimension but the first -> (B,), fp32 or fp64.

        KL = mean[ (mean_p - mean_q)^2 ] / (2 std^2)                             (Flow-GRPO 2505.05470, equation 14)

    Raises ValueError when the spreads differ or are 0, or the shapes do not fit.
    """
    if not math.isclose(p.std, q.std, rel_tol=1e-6):
        raise ValueError(f"kl_same_std needs equal std, got {p.std} and {q.std}")
    if p.std == 0.0:
        raise ValueError(
            "kl_same_std needs std > 0: two point masses have no finite divergence"
        )
    return _mean_square(p.mean, q.mean) / (2.0 * p.std**2)


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    """MEAN of (a - b)^2 over all but the first dimension -> (B,). Only a first dimension of 1 is broadcast."""
    if a.shape[1:] != b.shape[1:] or (
        a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])
    ):
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} must agree in all but a first dimension of 1"
        )
    # half precision would lose the difference of two nearly equal latents, so widen before subtracting
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return (a.to(dtype) - b.to(dtype)).square().flatten(1).mean(dim=1)
