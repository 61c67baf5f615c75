"""Measure a video of the embedded world from its pixels and score it against a prompt.

`observe` reads the attributes that a video shows. `compare` scores them along DeScore's five
sub-dimensions (arXiv 2605.05922, section 3): subject, dynamics, camera, environment and style get
2 (as in the prompt), 1 (partly) or 0. `measure` does both for a prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from toy.world import (
    BACKGROUNDS,
    COLORS,
    EXTENT,
    LEVEL,
    PERIOD,
    SHAPES,
    SUB_DIMENSIONS,
    VALUES,
    Attributes,
    coverage,
    parse,
)

# Below these, of 255 and in sides per clip, there is no shape, no stripe, no motion.
_MIN_CHROMA = 45.0
_MIN_STRIPE = 9.0
_MIN_TRAVEL = 0.10
# Halfway between the two chromas; inside the band the style is undecided.
_STYLE_SPLIT = 150.0
_STYLE_BAND = 12.0
# Slide of the stripes in sides per frame; between the two the camera is undecided.
_STILL = 0.012
_SLIDING = 0.020
_OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


@dataclass(frozen=True)
class Observation:
    """What the pixels show; an attribute is None where it could not be read.

    chroma            Chroma of the shape, of 255.
    speed_x, speed_y  Motion of its centroid in sides per clip.
    level             Mean luminance of the room, of 255.
    stripe            Amplitude of its stripes, of 255.
    slide             Motion of the stripes in sides per frame, positive when the camera pans.
    """

    attributes: Attributes
    chroma: float
    speed_x: float
    speed_y: float
    level: float
    stripe: float
    slide: float


@dataclass(frozen=True)
class OracleScore:
    """Sub-dimension scores 0, 1 or 2 by name, and ``total`` = their SUM / 10, in [0, 1]."""

    scores: dict[str, int]
    total: float


def measure(video_TYXC: Tensor, prompt: str) -> OracleScore:
    """Score how well a uint8 video (T, Y, X, 3) shows what the prompt asks for.

    Raises:
        ValueError: if the video has the wrong type or shape, or the prompt names no attribute.
    """
    wish = parse(prompt)
    if all(getattr(wish, name) is None for name in VALUES):
        raise ValueError(f"the prompt names nothing of the shapes world: {prompt!r}")
    return compare(wish, observe(video_TYXC).attributes)


def compare(wish: Attributes, seen: Attributes) -> OracleScore:
    """Score the attributes of a video against those of a prompt.

    subject      2 for colour and shape, 1 for one of them, 0 for none.
    dynamics     2 for the same direction, 1 for the opposite one.
    camera       2 if equal, 1 if undecided, 0 if wrong.
    environment  2 for the same room, 1 for a neighbour in brightness.
    style        2 if equal, 1 if undecided, 0 if wrong.

    Without a shape, subject, dynamics and style are 0; without stripes, camera and environment.
    An attribute that the prompt does not name always agrees.
    """
    agrees = {}
    for name in VALUES:
        wanted = getattr(wish, name)
        agrees[name] = wanted is None or wanted == getattr(seen, name)
    scores = dict.fromkeys(SUB_DIMENSIONS, 0)

    # What the shape shows.
    if seen.shape is not None:
        scores["subject"] = int(agrees["color"]) + int(agrees["shape"])
        opposite = seen.motion == _OPPOSITE.get(wish.motion)
        scores["dynamics"] = _grade(full=agrees["motion"], partial=opposite)
        scores["style"] = _grade(full=agrees["style"], partial=seen.style is None)

    # What the room shows.
    if seen.background is not None:
        scores["camera"] = _grade(full=agrees["camera"], partial=seen.camera is None)
        near = False
        if wish.background is not None:
            distance = BACKGROUNDS.index(wish.background)
            distance -= BACKGROUNDS.index(seen.background)
            near = abs(distance) == 1
        scores["environment"] = _grade(full=agrees["background"], partial=near)
    return OracleScore(scores, sum(scores.values()) / (2 * len(scores)))


def _grade(*, full: bool, partial: bool) -> int:
    if full:
        return 2
    return 1 if partial else 0


def observe(video_TYXC: Tensor) -> Observation:
    """Read the attributes of a uint8 video (T, Y, X, 3) from its pixels alone.

    Raises:
        ValueError: if the video is not uint8 (T >= 2, Y, X, 3).
    """
    shape = tuple(video_TYXC.shape)
    right_shape = len(shape) == 4 and shape[-1] == 3 and shape[0] >= 2
    if video_TYXC.dtype != torch.uint8 or not right_shape:
        raise ValueError(
            f"observe needs uint8 (T >= 2, Y, X, 3), got {video_TYXC.dtype} {shape}"
        )
    rgb = video_TYXC.float()
    region = _find_shape(rgb)
    mask, chroma = region if region else (None, 0.0)
    level, stripe, slide = _read_room(rgb, mask)
    attributes = dict.fromkeys(VALUES)

    # The room, where its stripes are strong enough to be read.
    if stripe >= _MIN_STRIPE:
        attributes["background"] = min(LEVEL, key=lambda name: abs(LEVEL[name] - level))
        if slide > _SLIDING:
            attributes["camera"] = "panning"
        elif abs(slide) < _STILL:
            attributes["camera"] = "fixed"

    # The shape, where there is one.
    speed_x = speed_y = 0.0
    if mask is not None:
        frames, height, width = mask.shape
        centre_x, centre_y = _centroid(mask)
        speed_x = _slope(centre_x) * (frames - 1) / width
        speed_y = _slope(centre_y) * (frames - 1) / height
        attributes["motion"] = _name_motion(speed_x, speed_y)
        attributes["shape"] = _name_shape(mask, centre_x, centre_y)
        inside = (mask > 0.8)[..., None]
        attributes["color"] = _name_color((rgb * inside).sum((0, 1, 2)))
        if chroma > _STYLE_SPLIT + _STYLE_BAND:
            attributes["style"] = "vivid"
        elif chroma < _STYLE_SPLIT - _STYLE_BAND:
            attributes["style"] = "pastel"
    seen = Attributes(**attributes)
    return Observation(seen, chroma, speed_x, speed_y, level, stripe, slide)


def _find_shape(rgb: Tensor) -> tuple[Tensor, float] | None:
    """Find the compact coloured region: (soft mask (T, Y, X) in [0, 1], chroma), or None."""
    chroma = rgb.amax(-1) - rgb.amin(-1)
    _, height, width = chroma.shape
    # About 20 pixels in 1,024 exceed the plateau of the shape, in the median frame.
    plateau = chroma.flatten(1).quantile(1 - 20 / 1024, dim=1).median().item()
    if plateau < _MIN_CHROMA:
        return None
    mask = ((chroma / plateau - 0.25) / 0.65).clamp(0, 1)

    # A shape is compact: 0.40 for a disc, 0.41 for a square, 0.44 for a triangle.
    area = mask.sum((1, 2)).clamp(min=1e-6)
    y = torch.arange(height, dtype=mask.dtype)[None, :, None]
    x = torch.arange(width, dtype=mask.dtype)[None, None, :]
    centre_y = (mask * y).sum((1, 2)) / area
    centre_x = (mask * x).sum((1, 2)) / area
    dx = x - centre_x[:, None, None]
    dy = y - centre_y[:, None, None]
    spread = ((mask * (dx**2 + dy**2)).sum((1, 2)) / area).sqrt()
    compact = spread < 0.62 * area.sqrt()
    sized = (area > 0.03 * height * width) & (area < 0.35 * height * width)
    if (compact & sized).float().mean() < 0.7:
        return None
    return mask, plateau


def _centroid(mask_TYX: Tensor) -> tuple[Tensor, Tensor]:
    """Mean x and mean y of the mask, in pixels, frame by frame."""
    _, height, width = mask_TYX.shape
    area = mask_TYX.sum((1, 2)).clamp(min=1e-6)
    centre_x = (mask_TYX * torch.arange(width)).sum((1, 2)) / area
    centre_y = (mask_TYX * torch.arange(height)[:, None]).sum((1, 2)) / area
    return centre_x, centre_y


def _name_shape(mask_TYX: Tensor, centre_x: Tensor, centre_y: Tensor) -> str:
    """Name the shape whose template of equal area at the same centroid fits best.

    The error is the SUM of squares over pixels and frames.
    """
    height, width = mask_TYX.shape[1:]
    area = mask_TYX.sum((1, 2))[:, None, None]
    dx = torch.arange(width) - centre_x[:, None, None]
    dy = torch.arange(height)[:, None] - centre_y[:, None, None]
    unit_area = {
        "circle": math.pi,
        "square": 4 * EXTENT["square"] ** 2,
        "triangle": 3 * math.sqrt(3) / 4 * EXTENT["triangle"] ** 2,
    }
    error = {}
    for shape in SHAPES:
        template = coverage(shape, dx, dy, (area / unit_area[shape]).sqrt())
        error[shape] = ((template - mask_TYX) ** 2).sum().item()
    return min(error, key=error.__getitem__)


def _name_motion(speed_x: float, speed_y: float) -> str | None:
    if max(abs(speed_x), abs(speed_y)) < _MIN_TRAVEL:
        return None
    if abs(speed_x) > abs(speed_y):
        return "right" if speed_x > 0 else "left"
    return "down" if speed_y > 0 else "up"


def _name_color(rgb: Tensor) -> str:
    red, green, blue = rgb.tolist()
    opponent = math.sqrt(3) * (green - blue)
    hue = math.degrees(math.atan2(opponent, 2 * red - green - blue))
    return COLORS[round(hue / 60) % 6]


def _read_room(rgb: Tensor, mask: Tensor | None) -> tuple[float, float, float]:
    """Fit (mean level, stripe amplitude, slide in sides per frame) to the pixels of the room.

    Least squares of light = level + a cos(turn) + b sin(turn) in each frame, outside the shape.
    """
    width = rgb.shape[2]
    light = rgb.mean(-1)
    weight = torch.ones_like(light) if mask is None else (mask < 0.02).float()
    turn = 2 * math.pi * (torch.arange(width) + 0.5) / width / PERIOD
    # Basis (3, X), pixels that count in each column (T, X), coefficients (T, 3).
    basis = torch.stack([torch.ones(width), torch.cos(turn), torch.sin(turn)])
    per_column = weight.sum(1)
    gram = torch.einsum("kx,tx,lx->tkl", basis, per_column, basis) + 1e-3 * torch.eye(3)
    right = torch.einsum("kx,tx->tk", basis, (light * weight).sum(1))
    fit = torch.linalg.solve(gram, right)
    amplitude = fit[:, 1:].norm(dim=1).median()

    # The stripes are cos(turn + phase); unwrap the phase over the frames.
    phase = torch.atan2(-fit[:, 2], fit[:, 1])
    jump = torch.remainder(phase.diff() + math.pi, 2 * math.pi) - math.pi
    unwrapped = torch.cat([phase[:1], phase[:1] + jump.cumsum(0)])
    slide = _slope(unwrapped) / (2 * math.pi) * PERIOD
    return fit[:, 0].median().item(), amplitude.item(), slide


def _slope(value_T: Tensor) -> float:
    """Least-squares change per frame."""
    time = torch.arange(len(value_T), dtype=value_T.dtype)
    time = time - time.mean()
    return ((time * value_T).sum() / (time**2).sum()).item()
