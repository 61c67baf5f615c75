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

import torch
from torch import Tensor

from common.types import Score
from toy.measure import Observation, RoomReading, ShapeReading, observe
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
    "subject": 0.22,
    "dynamics": 0.28,
    "camera": 0.10,
    "environment": 0.04,
    "style": 0.06,
}
QUALITY_WEIGHT = 0.30

# Distances at which a grade reaches 0, and motions at which it reaches 1.
_HUE = 120.0
_MISFIT = 0.10
_TRAVEL = 0.24
_PAN = 0.040
_SHAKE = 0.030
_LIGHT = 100.0
_COLOUR = 110.0
# Faults at which a part of the quality reaches 1 and 0.
_EDGE = (0.9, 4.0)
_GRAIN = (1.5, 10.0)
_FLICKER = (2.0, 25.0)
_WOBBLE = (0.02, 0.40)
# A change of the room's light is seen more easily than one of the shape's colour.
_ROOM_FLICKER = 5.0


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
PEOPLE = People(temperature=0.06, theta=1.9)


def utility(video_TYXC: Tensor, prompt: str) -> Utility:
    """Measure what people see in a uint8 video (T, Y, X, 3) that was made for a prompt.

    Raises:
        ValueError: if the video has the wrong type or shape.
    """
    seen = observe(video_TYXC)
    grades = grade(parse(prompt), seen)
    quality = quality_of(video_TYXC, seen)
    value = sum(WEIGHTS[name] * grades[name] for name in SUB_DIMENSIONS)
    value += QUALITY_WEIGHT * sum(quality.values()) / len(quality)
    return Utility(grades, quality, value)


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
        grades["subject"] = _grade_subject(wish, seen.shape)
        grades["dynamics"] = _grade_motion(wish, seen.shape)
        grades["style"] = 1.0
        if wish.style is not None:
            distance = abs(seen.shape.chroma - CHROMA[wish.style])
            grades["style"] = _falling(distance, 0.0, _COLOUR)
    if seen.room is not None:
        grades["camera"] = _grade_camera(wish, seen.room)
        grades["environment"] = 1.0
        if wish.background is not None:
            distance = abs(seen.room.level - LEVEL[wish.background])
            grades["environment"] = _falling(distance, 0.0, _LIGHT)
    return grades


def _grade_subject(wish: Attributes, shape: ShapeReading) -> float:
    color = 1.0
    if wish.color is not None:
        turn = (shape.hue - 60 * COLORS.index(wish.color) + 180) % 360 - 180
        color = _falling(abs(turn), 0.0, _HUE)
    form = 1.0
    if wish.shape is not None:
        # How much worse the wanted template fits than the best one.
        excess = shape.misfits[wish.shape] - min(shape.misfits.values())
        form = _falling(excess / shape.mask_TYX.sum().item(), 0.0, _MISFIT)
    return (color + form) / 2


def _grade_motion(wish: Attributes, shape: ShapeReading) -> float:
    if wish.motion is None:
        return 1.0
    x, y = direction_of(wish.motion)
    along = shape.speed_x * x + shape.speed_y * y
    across = abs(shape.speed_x * y - shape.speed_y * x)
    return (1 - _falling(along, 0.0, _TRAVEL)) * _falling(across, 0.0, _TRAVEL)


def _grade_camera(wish: Attributes, room: RoomReading) -> float:
    if wish.camera is None:
        return 1.0
    if wish.camera == "panning":
        return 1 - _falling(room.slide, 0.0, _PAN)
    return _falling(abs(room.slide), 0.0, _SHAKE)


def quality_of(video_TYXC: Tensor, seen: Observation) -> dict[str, float]:
    """Measure the quality in four parts, each in [0, 1].

    sharp       Narrow edges of the shape.
    clean       Little grain in the room.
    steady      Light of the room and colour of the shape that do not flicker.
    consistent  A shape that keeps its size and moves along a straight line.

    Without a shape, sharp and consistent are 0; without stripes, clean and steady.
    """
    quality = dict.fromkeys(("sharp", "clean", "steady", "consistent"), 0.0)
    flicker = 0.0
    if seen.shape is not None:
        mask = seen.shape.mask_TYX
        quality["sharp"] = _falling(_edge_width(video_TYXC, seen.shape), *_EDGE)
        quality["consistent"] = _falling(_wobble(mask), *_WOBBLE)
        flicker = _chroma_by_frame(video_TYXC, mask).std(correction=0).item()
    if seen.room is not None:
        quality["clean"] = _falling(seen.room.grain, *_GRAIN)
        flicker += _ROOM_FLICKER * seen.room.level_T.std(correction=0).item()
        quality["steady"] = _falling(flicker, *_FLICKER)
    return quality


def _falling(value: float, best: float, worst: float) -> float:
    """1 up to ``best``, 0 from ``worst``, linear in between."""
    return min(1.0, max(0.0, (worst - value) / (worst - best)))


def _chroma(video_TYXC: Tensor) -> Tensor:
    rgb = video_TYXC.float()
    return rgb.amax(-1) - rgb.amin(-1)


def _chroma_by_frame(video_TYXC: Tensor, mask_TYX: Tensor) -> Tensor:
    """Mean chroma of the shape in each frame, (T,)."""
    inside = (mask_TYX > 0.8).float()
    total = (_chroma(video_TYXC) * inside).sum((1, 2))
    return total / inside.sum((1, 2)).clamp(min=1.0)


def _edge_width(video_TYXC: Tensor, shape: ShapeReading) -> float:
    """Width of the shape's edge in pixels of a frame of 32: its area over its length.

    The edge is where the chroma lies between 20 % and 80 % of the plateau; the length is that of
    a circle with the shape's area.
    """
    relative = _chroma(video_TYXC) / shape.chroma
    edge = ((relative > 0.2) & (relative < 0.8)).float().sum((1, 2))
    area = shape.mask_TYX.sum((1, 2))
    length = 2 * torch.sqrt(math.pi * area)
    return (edge / length.clamp(min=1.0)).mean().item() * 32 / video_TYXC.shape[2]


def _wobble(mask_TYX: Tensor) -> float:
    """Relative spread of the shape's area, plus its distance from a straight line in sides."""
    frames, height, width = mask_TYX.shape
    area = mask_TYX.sum((1, 2)).clamp(min=1e-6)
    spread = area.std(correction=0) / area.mean()

    # Root mean square distance of the centroids from their least-squares line in time.
    x = (mask_TYX.sum(1) * torch.arange(width)).sum(1) / area / width
    y = (mask_TYX.sum(2) * torch.arange(height)).sum(1) / area / height
    time = torch.arange(frames) - (frames - 1) / 2
    residuals = []
    for path in (x - x.mean(), y - y.mean()):
        slope = (path * time).sum() / (time**2).sum()
        residuals.append(path - slope * time)
    distance = torch.stack(residuals).pow(2).sum(0).mean().sqrt()
    return (spread + distance).item()


class PeopleUtility:
    """The utility U as a reward that only watches; its grades and the quality are the parts."""

    name = "people"

    def score(
        self, video_BTYXC: Tensor, prompts: Sequence[str], *, fps: float
    ) -> Score:
        seen = []
        for video_TYXC, prompt in zip(video_BTYXC, prompts, strict=True):
            seen.append(utility(video_TYXC, prompt))

        # One tensor of all videos for each part.
        parts = {}
        for name in SUB_DIMENSIONS:
            parts[name] = torch.tensor([u.grades[name] for u in seen])
        means = [sum(u.quality.values()) / len(u.quality) for u in seen]
        parts["quality"] = torch.tensor(means)
        return Score(value_B=torch.tensor([u.value for u in seen]), parts=parts)
