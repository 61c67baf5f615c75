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

# Below these the video has no shape and no stripes (of 255) and no motion (sides per clip).
_MIN_CHROMA = 45.0
_MIN_STRIPE = 9.0
_MIN_TRAVEL = 0.10
# A soft mask starts at a quarter of the shape's chroma and is full at 0.9 of it.
_MASK_START = 0.25
_MASK_WIDTH = 0.65
# A shape is compact: spread / sqrt(area) is 0.40 for a disc, 0.41 for a square and 0.44 for a
# triangle. Its area is between these shares of the frame.
_MAX_SPREAD = 0.62
_MIN_AREA = 0.03
_MAX_AREA = 0.35
# Share of the frames in which the region must look like a shape.
_MIN_FRAMES = 0.7
# Halfway between the two chromas. Inside the band the style is undecided.
_STYLE_SPLIT = 150.0
_STYLE_BAND = 12.0
# Slide of the stripes in sides per frame; between the two the camera is undecided.
_STILL = 0.012
_SLIDING = 0.020
_OPPOSITE = {
    "left": "right",
    "right": "left",
    "up": "down",
    "down": "up",
}
# Area of each shape at scale 1.
_UNIT_AREA = {
    "circle": math.pi,
    "square": 4 * EXTENT["square"] ** 2,
    "triangle": 3 * math.sqrt(3) / 4 * EXTENT["triangle"] ** 2,
}


@dataclass(frozen=True)
class ShapeReading:
    """The compact coloured region of a video.

    mask_TYX          Its soft mask in [0, 1].
    chroma            max - min over RGB on its plateau, of 255.
    hue               Its hue in degrees, the colours are 60 apart.
    misfits           By name of a shape, SUM of squares over pixels and frames of the mask's
                      difference to a template of equal area at the same centroid.
    speed_x, speed_y  Motion of its centroid in sides per clip.
    """

    mask_TYX: Tensor
    chroma: float
    hue: float
    misfits: dict[str, float]
    speed_x: float
    speed_y: float


@dataclass(frozen=True)
class RoomReading:
    """The striped room outside the shape; light is the mean over RGB, of 255.

    level_T  Mean light of each frame.
    stripe   Amplitude of the stripes, median over the frames.
    slide    Motion of the stripes in sides per frame, positive when the camera pans.
    grain    Root mean square of what level and stripes leave unexplained.
    """

    level_T: Tensor
    stripe: float
    slide: float
    grain: float

    @property
    def level(self) -> float:
        """Mean light of the room, median over the frames."""
        return self.level_T.median().item()


@dataclass(frozen=True)
class Observation:
    """What the pixels show; an attribute is None where it could not be read.

    shape  None without a compact coloured region.
    room   None where no stripes are strong enough to be read.
    """

    attributes: Attributes
    shape: ShapeReading | None
    room: RoomReading | None


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
    if wish == Attributes(**dict.fromkeys(VALUES)):
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
        undecided = seen.style is None
        scores["style"] = _grade(full=agrees["style"], partial=undecided)

    # What the room shows.
    if seen.background is not None:
        undecided = seen.camera is None
        scores["camera"] = _grade(full=agrees["camera"], partial=undecided)
        near = False
        if wish.background is not None:
            distance = BACKGROUNDS.index(wish.background)
            distance -= BACKGROUNDS.index(seen.background)
            near = abs(distance) == 1
        scores["environment"] = _grade(full=agrees["background"], partial=near)

    # Every sub-dimension gives up to 2.
    total = sum(scores.values()) / (2 * len(scores))
    return OracleScore(scores, total)


def _grade(*, full: bool, partial: bool) -> int:
    if full:
        return 2
    return 1 if partial else 0


def observe(video_TYXC: Tensor) -> Observation:
    """Read the attributes of a uint8 video (T, Y, X, 3) from its pixels alone.

    Raises:
        ValueError: if the video is not uint8 (T >= 2, Y, X, 3).
    """
    # A motion needs two frames.
    shape = tuple(video_TYXC.shape)
    right_shape = len(shape) == 4 and shape[-1] == 3 and shape[0] >= 2
    if video_TYXC.dtype != torch.uint8 or not right_shape:
        raise ValueError(
            f"observe needs uint8 (T >= 2, Y, X, 3), got {video_TYXC.dtype} {shape}"
        )
    rgb = video_TYXC.float()
    shape = read_shape(rgb)
    room = read_room(rgb, None if shape is None else shape.mask_TYX)
    if room.stripe < _MIN_STRIPE:
        room = None
    attributes = dict.fromkeys(VALUES)

    # The room, where its stripes are strong enough to be read.
    if room is not None:
        attributes["background"] = _name_background(room.level)
        attributes["camera"] = _name_camera(room.slide)

    # The shape, where there is one.
    if shape is not None:
        attributes["motion"] = _name_motion(shape.speed_x, shape.speed_y)
        attributes["shape"] = min(shape.misfits, key=shape.misfits.__getitem__)
        attributes["color"] = COLORS[round(shape.hue / 60) % 6]
        attributes["style"] = _name_style(shape.chroma)
    return Observation(Attributes(**attributes), shape, room)


# Regions and their motion.


def read_shape(rgb: Tensor) -> ShapeReading | None:
    """Read the compact coloured region of float frames (T, Y, X, 3); None without one."""
    mask, chroma = _find_shape(rgb)
    if mask is None:
        return None
    speed_x, speed_y = _speed(mask)
    return ShapeReading(
        mask_TYX=mask,
        chroma=chroma,
        hue=_hue(rgb, mask),
        misfits=_misfits(mask),
        speed_x=speed_x,
        speed_y=speed_y,
    )


def _find_shape(rgb: Tensor) -> tuple[Tensor | None, float]:
    """Find the compact coloured region.

    Returns its soft mask (T, Y, X) in [0, 1] and its chroma, or (None, 0) without a shape.
    """
    # About 20 pixels in 1,024 exceed the plateau of the shape, in the median frame.
    chroma = rgb.amax(-1) - rgb.amin(-1)
    highest = chroma.flatten(1).quantile(1 - 20 / 1024, dim=1)
    plateau = highest.median().item()
    if plateau < _MIN_CHROMA:
        return None, 0.0
    mask = (chroma / plateau - _MASK_START) / _MASK_WIDTH
    mask = mask.clamp(0, 1)

    # The region must be compact and neither tiny nor large.
    area = _area(mask)
    dx, dy = _offsets(mask)
    variance = (mask * (dx**2 + dy**2)).sum((1, 2)) / area
    compact = variance.sqrt() < _MAX_SPREAD * area.sqrt()
    _, height, width = mask.shape
    large_enough = area > _MIN_AREA * height * width
    small_enough = area < _MAX_AREA * height * width
    good = compact & large_enough & small_enough
    if good.float().mean() < _MIN_FRAMES:
        return None, 0.0
    return mask, plateau


def _area(mask_TYX: Tensor) -> Tensor:
    """Area of the mask in each frame, in pixels; never 0, for divisions."""
    return mask_TYX.sum((1, 2)).clamp(min=1e-6)


def _centroid(mask_TYX: Tensor) -> tuple[Tensor, Tensor]:
    """Mean x and mean y of the mask in each frame, in pixels."""
    _, height, width = mask_TYX.shape
    area = _area(mask_TYX)
    x = torch.arange(width)
    y = torch.arange(height)[:, None]
    centre_x = (mask_TYX * x).sum((1, 2)) / area
    centre_y = (mask_TYX * y).sum((1, 2)) / area
    return centre_x, centre_y


def _offsets(mask_TYX: Tensor) -> tuple[Tensor, Tensor]:
    """Distances of all pixels from the centroid: dx (T, 1, X) and dy (T, Y, 1)."""
    _, height, width = mask_TYX.shape
    centre_x, centre_y = _centroid(mask_TYX)
    dx = torch.arange(width) - centre_x[:, None, None]
    dy = torch.arange(height)[:, None] - centre_y[:, None, None]
    return dx, dy


def _speed(mask_TYX: Tensor) -> tuple[float, float]:
    """Motion of the centroid along x and y, in sides per clip."""
    frames, height, width = mask_TYX.shape
    centre_x, centre_y = _centroid(mask_TYX)
    speed_x = _slope(centre_x) * (frames - 1) / width
    speed_y = _slope(centre_y) * (frames - 1) / height
    return speed_x, speed_y


def _misfits(mask_TYX: Tensor) -> dict[str, float]:
    """Misfit of each shape's template, see `ShapeReading`."""
    area = mask_TYX.sum((1, 2))[:, None, None]
    dx, dy = _offsets(mask_TYX)
    misfits = {}
    for shape in SHAPES:
        scale = (area / _UNIT_AREA[shape]).sqrt()
        difference = coverage(shape, dx, dy, scale) - mask_TYX
        misfits[shape] = (difference**2).sum().item()
    return misfits


def _hue(rgb: Tensor, mask: Tensor) -> float:
    """Hue angle of the shape in degrees."""
    # SUM over the pixels that are well inside the shape.
    inside = (mask > 0.8)[..., None]
    red, green, blue = (rgb * inside).sum((0, 1, 2)).tolist()
    opponent = math.sqrt(3) * (green - blue)
    return math.degrees(math.atan2(opponent, 2 * red - green - blue))


def read_room(rgb: Tensor, mask: Tensor | None) -> RoomReading:
    """Fit level, stripes and their slide to the pixels of the room, in float frames (T, Y, X, 3).

    Least squares of light = level + a cos(turn) + b sin(turn) in each frame, outside the shape.
    """
    # Pixels of the shape do not count.
    light = rgb.mean(-1)
    weight = torch.ones_like(light)
    if mask is not None:
        weight = (mask < 0.02).float()

    # Basis functions over the columns, (3, X).
    width = rgb.shape[2]
    column = torch.arange(width) + 0.5
    turn = 2 * math.pi * column / width / PERIOD
    basis = torch.stack(
        [
            torch.ones(width),
            torch.cos(turn),
            torch.sin(turn),
        ]
    )

    # Normal equations of each frame; the ridge keeps a frame without pixels solvable.
    per_column = weight.sum(1)
    ridge = 1e-3 * torch.eye(3)
    gram = torch.einsum("kx,tx,lx->tkl", basis, per_column, basis) + ridge
    right = torch.einsum("kx,tx->tk", basis, (light * weight).sum(1))
    fit = torch.linalg.solve(gram, right)
    amplitude = fit[:, 1:].norm(dim=1)

    # What the fit leaves of the light.
    fitted = torch.einsum("tk,kx->tx", fit, basis)
    rest = weight * (light - fitted[:, None, :])
    grain = (rest**2).sum() / weight.sum().clamp(min=1.0)

    # The stripes are cos(turn + phase); unwrap the phase over the frames.
    phase = torch.atan2(-fit[:, 2], fit[:, 1])
    jump = torch.remainder(phase.diff() + math.pi, 2 * math.pi)
    jump = jump - math.pi
    unwrapped = phase[:1] + jump.cumsum(0)
    unwrapped = torch.cat([phase[:1], unwrapped])
    return RoomReading(
        level_T=fit[:, 0],
        stripe=amplitude.median().item(),
        slide=_slope(unwrapped) / (2 * math.pi) * PERIOD,
        grain=grain.sqrt().item(),
    )


# Names of what was measured.


def _name_background(level: float) -> str:
    return min(LEVEL, key=lambda name: abs(LEVEL[name] - level))


def _name_camera(slide: float) -> str | None:
    if slide > _SLIDING:
        return "panning"
    if abs(slide) < _STILL:
        return "fixed"
    return None


def _name_style(chroma: float) -> str | None:
    if chroma > _STYLE_SPLIT + _STYLE_BAND:
        return "vivid"
    if chroma < _STYLE_SPLIT - _STYLE_BAND:
        return "pastel"
    return None


def _name_motion(speed_x: float, speed_y: float) -> str | None:
    if max(abs(speed_x), abs(speed_y)) < _MIN_TRAVEL:
        return None
    if abs(speed_x) > abs(speed_y):
        return "right" if speed_x > 0 else "left"
    return "down" if speed_y > 0 else "up"


def _slope(value_T: Tensor) -> float:
    """Least-squares change per frame."""
    time = torch.arange(len(value_T), dtype=value_T.dtype)
    time = time - time.mean()
    covariance = (time * value_T).sum()
    variance = (time**2).sum()
    return (covariance / variance).item()
