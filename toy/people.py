"""The people of the embedded world: a utility that is only partly stated, and labels drawn from it.

What people want of a video is ``U = sum_d w_d q_d + w_v quality``. The q_d in [0, 1] are the five
sub-dimensions, graded by distance instead of 2, 1, 0. Quality (sharp, clean, steady, consistent)
is what no prompt asks for and no sub-dimension names. The weights are told to nobody: no caption,
chain of thought, annotation or score of the oracle holds them. Everything is measured from pixels.

`PEOPLE` then draws a label from the difference of two utilities.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from common.types import Score
from toy.measure import Observation, RoomReading, ShapeReading, observe
from toy.oracle import to_score
from toy.quality import falling, mean_quality, quality_of, rising
from toy.world import (
    CHROMA,
    COLORS,
    LEVEL,
    SUB_DIMENSIONS,
    Attributes,
    direction_of,
    parse,
)

# What people weigh; the sum is 1.
WEIGHTS: Mapping[str, float] = {
    "subject": 0.13,
    "dynamics": 0.20,
    "camera": 0.03,
    "environment": 0.10,
    "style": 0.04,
}
QUALITY_WEIGHT = 0.50

# Distances at which a grade reaches 0, and motions at which it reaches 1.
_HUE = 120.0
_MISFIT = 0.10
_TRAVEL = 0.24
_PAN = 0.040
_SHAKE = 0.030
_LIGHT = 100.0
_COLOUR = 110.0


@dataclass(frozen=True)
class Utility:
    """What people see in a video.

    grades   q_d in [0, 1] by sub-dimension.
    quality  Parts of the quality in [0, 1]: sharp, clean, steady and consistent.
    value    U in [0, 1].
    """

    grades: Mapping[str, float]
    quality: Mapping[str, float]
    value: float

    @property
    def parts(self) -> dict[str, float]:
        """The terms of U before they are weighed: the grades, and the MEAN quality."""
        return {**self.grades, "quality": mean_quality(self.quality)}


@dataclass(frozen=True)
class People:
    """Labels of pairs by Rao and Kupper's model of comparisons with ties (1967).

    With d = (U_A - U_B) / temperature:
    P(A) = 1 / (1 + theta e^-d), P(B) = 1 / (1 + theta e^d), P(same) = 1 - P(A) - P(B).

    temperature  Difference of utilities at which the odds are e.
    theta        At least 1, and 1 means no ties. Two equal videos are a tie with probability
                 (theta - 1) / (theta + 1).
    """

    temperature: float
    theta: float

    def probabilities(self, difference: float) -> tuple[float, float, float]:
        """P(A), P(B) and P(same) for a difference U_A - U_B."""
        d = difference / self.temperature
        first = 1 / (1 + self.theta * math.exp(-d))
        second = 1 / (1 + self.theta * math.exp(d))
        return first, second, 1 - first - second

    def label(self, difference: float, rng: random.Random) -> str:
        """Draw "A", "B" or "same"."""
        first, second, _ = self.probabilities(difference)
        draw = rng.random()
        if draw < first:
            return "A"
        return "B" if draw < first + second else "same"

    def best_accuracy(self, difference: float) -> float:
        """Probability that a pair with a label A or B has the label of the greater utility.

        No reward model can do better on such pairs, because the labels are drawn.
        """
        first, second, _ = self.probabilities(difference)
        return max(first, second) / (first + second)

    def agreement(self, difference: float) -> float:
        """Probability that two people who both decide, decide alike."""
        best = self.best_accuracy(difference)
        return best**2 + (1 - best) ** 2


# On the demo's pairs two people who decide agree on 85 in a hundred, and a fifth are ties.
PEOPLE = People(temperature=0.07, theta=2.3)


def utility(video_TYXC: Tensor, prompt: str) -> Utility:
    """Measure what people see in a uint8 video (T, Y, X, 3) that was made for a prompt.

    Raises:
        ValueError: if the video has the wrong type or shape.
    """
    seen = observe(video_TYXC)
    grades = grade(parse(prompt), seen)
    quality = quality_of(video_TYXC, seen)
    return Utility(grades, quality, value_of(grades, mean_quality(quality)))


def value_of(
    grades: Mapping[str, float],
    quality: float,
    quality_weight: float = QUALITY_WEIGHT,
) -> float:
    """Weigh the terms of U; with another weight of the quality the others keep their ratios."""
    stated = sum(WEIGHTS[name] * grades[name] for name in SUB_DIMENSIONS)
    share = (1 - quality_weight) / (1 - QUALITY_WEIGHT)
    return share * stated + quality_weight * quality


def grade(wish: Attributes, seen: Observation) -> dict[str, float]:
    """Grade the five sub-dimensions by distance, each in [0, 1].

    subject      Half for the hue, half for how the shape fits.
    dynamics     Motion along the wanted direction, less with motion across it.
    camera       Slide of the stripes: enough of it, or none.
    environment  Distance of the light.
    style        Distance of the chroma.

    What the prompt does not name is 1. Without a shape, subject, dynamics and style are 0; without
    stripes, camera and environment.
    """
    grades = dict.fromkeys(SUB_DIMENSIONS, 0.0)
    if seen.shape is not None:
        color = _grade_color(wish.color, seen.shape)
        form = _grade_form(wish.shape, seen.shape)
        grades["subject"] = (color + form) / 2
        grades["dynamics"] = _grade_motion(wish.motion, seen.shape)
        grades["style"] = _near(seen.shape.chroma, CHROMA, wish.style, _COLOUR)
    if seen.room is not None:
        grades["camera"] = _grade_camera(wish.camera, seen.room)
        grades["environment"] = _near(seen.room.level, LEVEL, wish.background, _LIGHT)
    return grades


def _near(
    value: float, targets: Mapping[str, float], wish: str | None, reach: float
) -> float:
    """Grade a distance to the target of a wish."""
    if wish is None:
        return 1.0
    distance = abs(value - targets[wish])
    return falling(distance, 0.0, reach)


def _grade_color(wish: str | None, shape: ShapeReading) -> float:
    if wish is None:
        return 1.0
    wanted = 60 * COLORS.index(wish)
    # The shorter way around the circle of hues.
    turn = (shape.hue - wanted) % 360
    distance = min(turn, 360 - turn)
    return falling(distance, 0.0, _HUE)


def _grade_form(wish: str | None, shape: ShapeReading) -> float:
    if wish is None:
        return 1.0
    # How much worse the wanted template fits than the best one, by area of the shape.
    best = min(shape.misfits.values())
    excess = shape.misfits[wish] - best
    area = shape.mask_TYX.sum().item()
    return falling(excess / area, 0.0, _MISFIT)


def _grade_motion(wish: str | None, shape: ShapeReading) -> float:
    if wish is None:
        return 1.0
    x, y = direction_of(wish)
    along = shape.speed_x * x + shape.speed_y * y
    across = shape.speed_x * y - shape.speed_y * x
    straight = falling(abs(across), 0.0, _TRAVEL)
    return rising(along, _TRAVEL) * straight


def _grade_camera(wish: str | None, room: RoomReading) -> float:
    if wish is None:
        return 1.0
    if wish == "panning":
        return rising(room.slide, _PAN)
    return falling(abs(room.slide), 0.0, _SHAKE)


class PeopleUtility:
    """The utility U as a reward that only watches; its grades and the quality are the parts."""

    name = "people"

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        seen = []
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True):
            seen.append(utility(video_TYXC, prompt))

        values = [found.value for found in seen]
        parts = [found.parts for found in seen]
        return to_score(values, parts, (*SUB_DIMENSIONS, "quality"))
