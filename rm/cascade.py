"""Think when unsure: the rule, and its thresholds with a guarantee from held-out data.

A reward model that is trained with random masking scores with and without a chain of thought. The
fast scores decide where they are confident, and the model thinks about the rest:

    pair   confidence = |r_A - r_B|
    group  confidence = 1 - 2 U,   U = MEAN_{g<j} Phi( -|r_g - r_j| / (sqrt 2 sigma) )
    fast, if confidence >= threshold;   else think about ALL members

sigma is the std of (score behind a CoT - affine fit of the fast score). A threshold is chosen on
n exchangeable held-out items with losses in [0, 1] that an item has if it is scored fast. The
accuracy of the cascade is at least that of always thinking minus the mean harm, because a pair
whose fast order alone is right can only help.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from common.files import write_json
from common.schema import Fraction, PositiveInt, config, read_section

THINKING_FILE = "thinking.json"
Method = Literal["clopper_pearson", "crc"]
Risk = Literal["harm", "disagreement"]
# Halvings of an interval of length 1, down to the precision of a float.
HALVINGS = 60


@config
class Threshold:
    """Confidence from which the fast scores decide, and the data that it is chosen on.

    confidence  None always thinks: no threshold keeps the risk.
    method      "clopper_pearson": P(risk > alpha) <= delta over draws of the held-out data;
                "crc": the risk's mean over draws is at most alpha.
    risk        Loss of an item that is scored fast. "harm": the fast order is wrong and that of
                the CoTs is right. "disagreement": the two orders differ, which needs no labels.
    n, losses   Items, and the SUM of the losses at this threshold.
    thought     Share of the items that the model thinks about.
    sha256      Of the files with the scores.
    """

    confidence: FiniteFloat | None
    method: Method
    risk: Risk
    alpha: Fraction
    delta: Fraction
    n: PositiveInt
    losses: Annotated[FiniteFloat, Field(ge=0)]
    thought: Fraction
    sha256: tuple[str, ...]

    def decides_fast(self, confidence: float) -> bool:
        """Whether the fast scores of an item with this confidence suffice. NaN never does."""
        return self.confidence is not None and confidence >= self.confidence


@config
class Thinking:
    """When a checkpoint thinks; lies beside its weights as thinking.json.

    A fast score r becomes offset + slope r, its least-squares fit to the scores behind a CoT, so
    that fast and slow groups of a batch have a common scale.

    sigma   POPULATION std of the residuals of that fit.
    cots    CoTs of each score behind which the fit was made.
    pairs   For two videos of a prompt.
    groups  For any other number of videos; None if it is not calibrated.
    """

    offset: FiniteFloat
    slope: Annotated[FiniteFloat, Field(gt=0)]
    sigma: Annotated[FiniteFloat, Field(gt=0)]
    cots: PositiveInt
    pairs: Threshold
    groups: Threshold | None = None

    def save(self, folder: str | Path) -> Path:
        """Write the thresholds into a checkpoint folder."""
        path = Path(folder) / THINKING_FILE
        write_json(path, asdict(self))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Thinking:
        """Read the thresholds of a checkpoint folder.

        Raises FileNotFoundError if there are none, ValueError, naming the file, if they are not
        valid.
        """
        path = Path(folder) / THINKING_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {THINKING_FILE}: make it with launch/calibrate.py --fast"
            )
        return read_section(cls, path)

    def threshold_of(self, size: int) -> Threshold | None:
        """Return the threshold for so many videos of a prompt. None for one: nothing to order.

        Raises ValueError for a size that the checkpoint is not calibrated for.
        """
        if size < 2:
            return None
        if size == 2:
            return self.pairs
        if self.groups is None:
            raise ValueError(
                f"{THINKING_FILE} is calibrated for pairs only, not for {size} videos of a "
                "prompt: add launch/calibrate.py --groups, or use thinking=always"
            )
        return self.groups


# ------------------------------------------------------------------ confidence


def pair_confidence(fast_B: Tensor) -> float:
    """|r_A - r_B| of two rewards; NaN if either is missing."""
    return float((fast_B[0] - fast_B[1]).abs())


def group_confidence(fast_G: Tensor, *, sigma: float) -> float:
    """1 - 2 U of a group's rewards: 0 if all are equal, 1 if no order is in doubt.

        U = MEAN_{g<j} Phi( -|r_g - r_j| / (sqrt 2 sigma) )

    Phi(-x / sqrt 2) is erfc(x / 2) / 2. U is the expected share of pairs whose order is the
    opposite after thinking, if the residuals are independent N(0, sigma^2).
    """
    # Every pair of members, once.
    gap_M = _pairwise(fast_G.double()).abs()
    return float(1 - torch.special.erfc(gap_M / (2 * sigma)).mean())


def confidence_of(fast_B: Tensor, *, sigma: float) -> float:
    """Confidence in the order of two rewards or more, in the unit of its threshold."""
    if len(fast_B) == 2:
        return pair_confidence(fast_B)
    return group_confidence(fast_B, sigma=sigma)


def _pairwise(value_G: Tensor) -> Tensor:
    """v_g - v_j of all g < j, (G (G - 1) / 2,)."""
    row, column = torch.triu_indices(len(value_G), len(value_G), offset=1)
    return value_G[row] - value_G[column]


# ------------------------------------------------------------------ losses


def harm(fast: float, slow: float, label: float) -> float:
    """1 if the fast margin r_A - r_B has the wrong sign and the slow margin the right one.

    ``label`` is 1 (A is better) or -1. A margin of 0 or NaN is wrong.
    """
    return float(not fast * label > 0 and slow * label > 0)


def discordant_pairs(fast_G: Tensor, slow_G: Tensor) -> Tensor:
    """1 for each pair g < j whose order differs between fast and slow rewards, else 0.

    The MEAN is (1 - Kendall's tau) / 2 where there are no ties. A tie in only one of the two is a
    difference, and so is a missing reward.
    """
    # -1, 0 or 1: which of a pair is better.
    fast_M = _pairwise(fast_G.double()).sign()
    slow_M = _pairwise(slow_G.double()).sign()
    # NaN differs from everything.
    return (fast_M != slow_M).double()


# ------------------------------------------------------------------ thresholds


def clopper_pearson_upper(losses: int, n: int, *, delta: float) -> float:
    """Upper bound of a rate that holds with probability 1 - delta (Clopper, Pearson 1934).

    p with P(Binomial(n, p) <= losses) = delta,   which is BetaInv(1 - delta; k + 1, n - k)
    """
    # Nothing is ruled out.
    if losses >= n:
        return 1.0
    return _bisect(lambda p: _binomial_cdf(losses, n, p) > delta)


def clopper_pearson_lower(losses: int, n: int, *, delta: float) -> float:
    """Lower bound of a rate that holds with probability 1 - delta.

    p with P(Binomial(n, p) >= losses) = delta
    """
    # A rate of 0 is not ruled out.
    if losses <= 0:
        return 0.0
    return _bisect(lambda p: 1 - _binomial_cdf(losses - 1, n, p) < delta)


def _bisect(below: Callable[[float], bool]) -> float:
    """The number in [0, 1] up to which a monotone condition holds."""
    low = 0.0
    high = 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if below(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) <= k), a sum of terms in the log domain."""
    # The ends have no logarithm.
    if p <= 0:
        return 1.0
    if p >= 1:
        return float(k >= n)
    # n choose i, p^i (1 - p)^(n - i)
    terms = []
    for i in range(k + 1):
        ways = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        terms.append(math.exp(ways + i * math.log(p) + (n - i) * math.log1p(-p)))
    return math.fsum(terms)


def passes(
    losses: float,
    n: int,
    *,
    method: Method,
    alpha: float,
    delta: float,
) -> bool:
    """Whether a SUM of losses over n items keeps the risk.

    crc              (losses + 1) / (n + 1) <= alpha   (Angelopoulos et al., 2208.02814)
    clopper_pearson  clopper_pearson_upper(losses, n) <= alpha, for losses of 0 and 1; which is
                     P(Binomial(n, alpha) <= losses) <= delta
    """
    if method == "crc":
        return (losses + 1) / (n + 1) <= alpha
    return _binomial_cdf(round(losses), n, alpha) <= delta


def choose_threshold(
    confidence: Sequence[float],
    losses: Sequence[float],
    *,
    method: Method,
    alpha: float,
    delta: float,
) -> float:
    """Return the lowest confidence from which the fast scores may decide; inf for none.

    It walks down from inf over the confidences of the items and stops at the first that does not
    pass. The loss can only grow on the way, so that a bound which holds at each fixed threshold
    holds at the chosen one, and many thresholds need no correction (Bates et al., 2101.02703). An
    item without a confidence (NaN) is never scored fast.
    """
    # The most confident first.
    order = sorted(
        (-value, loss)
        for value, loss in zip(confidence, losses, strict=True)
        if not math.isnan(value)
    )
    threshold = math.inf
    total = 0.0
    for place, (negative, loss) in enumerate(order):
        total += loss
        # Items of equal confidence change sides together.
        if place + 1 < len(order) and order[place + 1][0] == negative:
            continue
        if not passes(total, len(losses), method=method, alpha=alpha, delta=delta):
            break
        threshold = -negative
    return threshold


def threshold_from(
    confidence: Sequence[float],
    losses: Sequence[float],
    *,
    method: Method,
    risk: Risk,
    alpha: float,
    delta: float,
    sha256: Sequence[str] = (),
) -> Threshold:
    """Choose a threshold on held-out items, and record what it is made of.

    Raises ValueError without items, and for losses that Clopper-Pearson does not take.
    """
    # What the method can take.
    if not losses:
        raise ValueError("a threshold needs at least one held-out item")
    if method == "clopper_pearson" and any(loss not in (0.0, 1.0) for loss in losses):
        raise ValueError("clopper_pearson needs losses of 0 and 1; use crc")
    chosen = choose_threshold(
        confidence, losses, method=method, alpha=alpha, delta=delta
    )
    # What the threshold means for these items.
    fast = [value >= chosen for value in confidence]
    return Threshold(
        confidence=chosen if math.isfinite(chosen) else None,
        method=method,
        risk=risk,
        alpha=alpha,
        delta=delta,
        n=len(losses),
        losses=math.fsum(
            loss for loss, skipped in zip(losses, fast, strict=True) if skipped
        ),
        thought=1 - sum(fast) / len(losses),
        sha256=tuple(sha256),
    )


# ------------------------------------------------------------------ the common scale


class AffineFit(NamedTuple):
    """slow = offset + slope fast, and the POPULATION std of the residuals."""

    offset: float
    slope: float
    sigma: float

    def apply(self, fast: float) -> float:
        """Put a fast score on the scale of those behind a chain of thought."""
        return self.offset + self.slope * fast


def fit_scale(fast_B: Tensor, slow_B: Tensor) -> AffineFit:
    """Least squares over the videos that have both scores.

    Raises ValueError for fewer than three such videos, and for fast scores that do not rise with
    the slow ones: their order would be worthless.
    """
    # A CoT that did not end has no score.
    both_B = fast_B.isfinite() & slow_B.isfinite()
    fast_B = fast_B[both_B].double()
    slow_B = slow_B[both_B].double()
    if len(fast_B) < 3:
        raise ValueError(
            f"{len(fast_B)} videos have both scores, the fit needs at least 3"
        )
    # slope = covariance / variance
    centred_B = fast_B - fast_B.mean()
    variance = float(centred_B.square().mean())
    covariance = float((centred_B * slow_B).mean())
    if variance == 0 or covariance <= 0:
        raise ValueError(
            "the fast scores do not rise with those behind a chain of thought, so their "
            "order decides nothing: use thinking=always"
        )
    slope = covariance / variance
    offset = float(slow_B.mean()) - slope * float(fast_B.mean())
    residual_B = slow_B - offset - slope * fast_B
    return AffineFit(offset, slope, float(residual_B.square().mean().sqrt()))


def risk_coverage(confidence: Sequence[float], wrong: Sequence[float]) -> list[float]:
    """Return the error among the i most confident items, for i = 1 to n (El-Yaniv, Wiener 2010).

    Equal confidences keep their order.
    """
    order = sorted(range(len(wrong)), key=lambda i: -confidence[i])
    # Errors among the first, divided by their number.
    curve = []
    errors = 0.0
    for count, i in enumerate(order, start=1):
        errors += wrong[i]
        curve.append(errors / count)
    return curve


def area_under_risk_coverage(
    confidence: Sequence[float], wrong: Sequence[float]
) -> float:
    """AURC, the MEAN of `risk_coverage` over its items."""
    curve = risk_coverage(confidence, wrong)
    return math.fsum(curve) / len(curve)
