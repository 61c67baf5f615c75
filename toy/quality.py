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
    if seen.shape is not None:
        chroma = _chroma(video_TYXC)
        width = _edge_width(chroma, seen.shape)
        wobble = _wobble(seen.shape.mask_TYX)
        quality["sharp"] = falling(width, *_EDGE)
        quality["consistent"] = falling(wobble, *_WOBBLE)
        flicker = _spread(_chroma_by_frame(chroma, seen.shape.mask_TYX))
    if seen.room is not None:
        quality["clean"] = falling(seen.room.grain, *_GRAIN)
        flicker += _ROOM_FLICKER * _spread(seen.room.level_T)
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
    total = (chroma_TYX * inside).sum((1, 2))
    pixels = inside.sum((1, 2))
    return total / pixels.clamp(min=1.0)


def _edge_width(chroma_TYX: Tensor, shape: ShapeReading) -> float:
    """Width of the shape's edge in pixels of a frame of 32: its area over its length.

    The edge is where the chroma lies between 20 % and 80 % of the plateau; the length is that of
    a circle with the shape's area.
    """
    relative = chroma_TYX / shape.chroma
    edge = (relative > 0.2) & (relative < 0.8)
    edge_area = edge.float().sum((1, 2))
    area = shape.mask_TYX.sum((1, 2))
    length = 2 * torch.sqrt(math.pi * area)
    width = edge_area / length.clamp(min=1.0)
    side = chroma_TYX.shape[2]
    return width.mean().item() * 32 / side


def _wobble(mask_TYX: Tensor) -> float:
    """Relative spread of the shape's area, plus its distance from a straight line in sides."""
    frames, height, width = mask_TYX.shape
    area = mask_TYX.sum((1, 2))
    area = area.clamp(min=1e-6)
    spread = _spread(area) / area.mean().item()

    # Centroids in sides.
    x = (mask_TYX.sum(1) * torch.arange(width)).sum(1)
    y = (mask_TYX.sum(2) * torch.arange(height)).sum(1)
    path = torch.stack(
        [
            x / area / width,
            y / area / height,
        ]
    )

    # Root mean square distance from their least-squares line in time.
    time = torch.arange(frames) - (frames - 1) / 2
    path = path - path.mean(1, keepdim=True)
    slope = (path * time).sum(1, keepdim=True) / (time**2).sum()
    rest = path - slope * time
    distance = (rest**2).sum(0).mean().sqrt()
    return spread + distance.item()
