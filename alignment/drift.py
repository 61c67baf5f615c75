"""Signs that a policy drifts away from what its rewards stand for. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Steps of the KL weight, and how far it may go from its first value (Schulman et al., 1707.06347).
KL_FACTOR = 1.5
KL_RANGE = 100.0


@dataclass(frozen=True)
class PairedChange:
    """MEAN of paired differences, its standard error, and their ratio.

    Differences that are all equal have the ratio +-inf, or 0 if they are 0; fewer than two have
    NaN.
    """

    mean: float
    error: float
    z: float


def paired_change(
    now: Sequence[float | None], before: Sequence[float | None]
) -> PairedChange:
    """Compare two measurements of the same items: D = MEAN(now - before), SE from the pairs.

        SE = std / sqrt(n),   z = D / SE

    std divides by n - 1. Items that either lacks (None or NaN) are left out.
    """
    # Both measurements have the item.
    gaps = []
    for a, b in zip(now, before, strict=True):
        if a is not None and b is not None and math.isfinite(a - b):
            gaps.append(a - b)
    count = len(gaps)
    if count < 2:
        return PairedChange(math.nan, math.nan, math.nan)
    # The spread of the differences, not of the items: pairs cancel what they share.
    mean = math.fsum(gaps) / count
    variance = math.fsum((gap - mean) ** 2 for gap in gaps) / (count - 1)
    error = math.sqrt(variance / count)
    # All differences are equal.
    if error == 0:
        z = 0.0 if mean == 0 else math.copysign(math.inf, mean)
        return PairedChange(mean, error, z)
    return PairedChange(mean, error, mean / error)


def adapted_kl_weight(
    weight: float, kl: float, *, target: float, first: float
) -> float:
    """Move the weight of the KL term towards a KL (PPO, arXiv 1707.06347, section 4).

    KL above 1.5 target: weight x 1.5; below target / 1.5: weight / 1.5; else as it is. It stays
    within a factor of 100 of its ``first`` value. A KL that is NaN changes nothing.
    """
    # Outside of the band.
    if kl > KL_FACTOR * target:
        weight *= KL_FACTOR
    elif kl < target / KL_FACTOR:
        weight /= KL_FACTOR
    return min(max(weight, first / KL_RANGE), first * KL_RANGE)


def mean_of_finite(values: Sequence[float | None]) -> float:
    """MEAN over the values that are numbers; NaN without any."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else math.nan
