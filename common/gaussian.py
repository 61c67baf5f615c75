"""The transition of one stochastic sampling step: a Gaussian with one standard deviation.

Both reductions are the MEAN over latent elements, not the sum: an 81-frame 480p Wan latent has
2 million elements, and the exponential of a sum leaves the range of fp32. Ratios therefore stay
close to 1, which is why published runs clip near 1e-4. flow_grpo, GenRL and MixGRPO reduce the
same way; LongCat-Video (2510.22200) does not state its reduction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# How close sigma may come to 1 where 1 / (1 - sigma) appears. It is the resolution of fp32 near 1,
# so a 1.0 is caught after any round trip through fp32.
SINGULAR_GAP = 1e-7


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I): ``mean`` is (B or 1, ...), ``std`` is one float for the step.

    A std of 0 is the deterministic ODE step. Raises ValueError when std is negative, infinite or
    NaN.
    """

    mean: Tensor
    std: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.std < math.inf:
            raise ValueError(
                f"Gaussian.std must be a finite number >= 0, got {self.std}"
            )


def widen(x: Tensor) -> Tensor:
    """Convert half precision to fp32; fp32 and fp64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_prob(p: Gaussian, x: Tensor) -> Tensor:
    """Log-density of x under p, MEAN over every dimension but the first -> (B,), fp32 or fp64.

        log p = mean[ -(x - mean)^2 / (2 std^2) ] - ln std - ln(2 pi) / 2
        (Flow-GRPO 2505.05470, appendix)

    x is (B, ...); p.mean is (B, ...), or (1, ...) when all samples share one mean. The gradient
    flows into both. Raises ValueError when std is 0 (no density) or the shapes do not fit.
    """
    if p.std == 0.0:
        raise ValueError("log_prob needs std > 0: a step without noise has no density")
    squared_B = _mean_square(x, p.mean)
    # the two constants cancel in a ratio of two policies
    return (
        -squared_B / (2.0 * p.std**2) - math.log(p.std) - 0.5 * math.log(2.0 * math.pi)
    )


def kl_same_std(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) for equal std, MEAN over every dimension but the first -> (B,), fp32 or fp64.

        KL = mean[ (mean_p - mean_q)^2 ] / (2 std^2)       (Flow-GRPO 2505.05470, equation 14)

    Raises ValueError when the stds differ or are 0, or the shapes do not fit.
    """
    if not math.isclose(p.std, q.std, rel_tol=1e-6):
        raise ValueError(f"kl_same_std needs equal std, got {p.std} and {q.std}")
    if p.std == 0.0:
        raise ValueError(
            "kl_same_std needs std > 0: two point masses have no finite divergence"
        )
    return _mean_square(p.mean, q.mean) / (2.0 * p.std**2)


def _mean_square(a: Tensor, b: Tensor) -> Tensor:
    """MEAN of (a - b)^2 over all but the first dimension -> (B,); only a first 1 is broadcast."""
    # A first dimension of 1 is shared by all samples.
    sizes = {len(a), len(b)}
    if a.shape[1:] != b.shape[1:] or (len(sizes) > 1 and 1 not in sizes):
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} may differ only in a first 1"
        )
    # widened before the subtraction: half precision would lose the difference of close latents
    return (widen(a) - widen(b)).square().flatten(1).mean(dim=1)
