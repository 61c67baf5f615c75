"""The quality of a video of the embedded world: what no prompt asks for and nothing states.

Four parts, each in [0, 1], are measured from the pixels: sharp, clean, steady and consistent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from toy.measure import Observation, ShapeReading

PARTS = (
    "sharp",
    "clean",
    "steady",
    "consistent",
)
# Faults at which a part is 1 and 0: width of edges in pixels of a frame of 32, grain of 255,
# flicker of 255, relative wobble.
_EDGE = (0.9, 4.0)
_GRAIN = (1.5, 10.0)
_FLICKER = (2.0, 25.0)
_WOBBLE = (0.02, 0.40)
# A change of the room's light is seen more easily than one of the shape's colour.
_ROOM_FLICKER = 5.0


def quality_of(video_TYXC: Tensor, seen: Observation) -> dict[str, float]:
    """Measure the four parts of the quality of a uint8 video.

    sharp       Narrow edges of the shape.
    clean       Little grain in the room.
    steady      Light of the room and colour of the shape that do not flicker.
    consistent  A shape that keeps its size and moves along a straight line.

    Without a shape, sharp and consistent are 0; without stripes, clean and steady.
    """
    quality = dict.fromkeys(PARTS, 0.0)
    flicker = 0.0

    # What the shape shows.
    shape = seen.shape
    if shape is not None:
        chroma = _chroma(video_TYXC)
        width = _edge_width(chroma, shape)
        wobble = _wobble(shape.mask_TYX)
        quality["sharp"] = falling(width, *_EDGE)
        quality["consistent"] = falling(wobble, *_WOBBLE)
        by_frame = _chroma_by_frame(chroma, shape.mask_TYX)
        flicker = _spread(by_frame)

    # What the room shows.
    room = seen.room
    if room is not None:
        light = _spread(room.level_T)
        flicker += _ROOM_FLICKER * light
        quality["clean"] = falling(room.grain, *_GRAIN)
        quality["steady"] = falling(flicker, *_FLICKER)
    return quality


def mean_quality(quality: Mapping[str, float]) -> float:
    """MEAN over the parts of the quality."""
    return sum(quality.values()) / len(quality)


def falling(value: float, best: float, worst: float) -> float:
    """1 up to ``best``, 0 from ``worst``, linear in between."""
    share = (worst - value) / (worst - best)
    return min(1.0, max(0.0, share))


def rising(value: float, enough: float) -> float:
    """0 up to 0, 1 from ``enough``, linear in between."""
    share = value / enough
    return min(1.0, max(0.0, share))


def _spread(value_T: Tensor) -> float:
    """Standard deviation over the frames."""
    return value_T.std(correction=0).item()


def _chroma(video_TYXC: Tensor) -> Tensor:
    """max - min over RGB of every pixel, (T, Y, X)."""
    rgb = video_TYXC.float()
    return rgb.amax(-1) - rgb.amin(-1)


def _chroma_by_frame(chroma_TYX: Tensor, mask_TYX: Tensor) -> Tensor:
    """Mean chroma of the shape in each frame, (T,)."""
    inside = (mask_TYX > 0.8).float()
    total = _sum(chroma_TYX * inside)
    pixels = _sum(inside)
    return total / pixels.clamp(min=1.0)


def _edge_width(chroma_TYX: Tensor, shape: ShapeReading) -> float:
    """Width of the shape's edge in pixels of a frame of 32: its area over its length.

    The edge is where the chroma lies between 20 % and 80 % of the plateau; the length is that of
    a circle with the shape's area.
    """
    low = 0.2 * shape.chroma
    high = 0.8 * shape.chroma
    edge = (chroma_TYX > low) & (chroma_TYX < high)
    edge_area = _sum(edge.float())
    area = _sum(shape.mask_TYX)
    length = 2 * torch.sqrt(math.pi * area)
    width = edge_area / length.clamp(min=1.0)

    # As if the frame had 32 columns.
    columns = chroma_TYX.shape[2]
    scale = 32 / columns
    return scale * width.mean().item()


def _wobble(mask_TYX: Tensor) -> float:
    """Relative spread of the shape's area, plus its distance from a straight line in sides."""
    _, height, width = mask_TYX.shape
    area = _sum(mask_TYX)
    area = area.clamp(min=1e-6)
    spread = _spread(area) / area.mean().item()

    # Squared distances of the centroids from a straight line, in sides.
    column = torch.arange(width) / width
    row = torch.arange(height) / height
    x = _sum(mask_TYX * column) / area
    y = _sum(mask_TYX * row[:, None]) / area
    squares = _bend(x) + _bend(y)
    distance = squares.mean().sqrt()
    return spread + distance.item()


def _bend(value_T: Tensor) -> Tensor:
    """Squared distance of each value from the least-squares line in time, (T,)."""
    frames = len(value_T)
    time = torch.arange(frames) - (frames - 1) / 2
    value = value_T - value_T.mean()
    covariance = (value * time).sum()
    variance = (time**2).sum()
    slope = covariance / variance
    rest = value - slope * time
    return rest**2


def _sum(value_TYX: Tensor) -> Tensor:
    """SUM over the pixels of each frame, (T,)."""
    return value_TYX.sum((1, 2))
