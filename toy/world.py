"""The embedded world: one coloured shape moves in a striped room, a caption says what was asked, an oracle measures.

The renderer draws a `Scene`; `caption` words it; `parse` reads the wish back from any of the wordings; `observe` reads
a video from its pixels alone; `measure` compares wish and observation along DeScore's five sub-dimensions
(2605.05922, section 3): subject, dynamics, camera, environment, style, each 2 (as asked), 1 (partly) or 0.

All lengths are fractions of the frame side, so a scene renders at any resolution. Luminance belongs to the room (a mean
level and vertical sinusoidal stripes that slide when the camera pans), chroma belongs to the shape; that is what lets
the oracle separate them exactly.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

COLORS = (
    "red",
    "yellow",
    "green",
    "cyan",
    "blue",
    "magenta",
)  # hue 0, 60, ... 300 degrees
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down")
CAMERAS = ("fixed", "panning")
BACKGROUNDS = (
    "dark",
    "grey",
    "bright",
)  # in order of brightness: neighbours are a partial match
STYLES = ("vivid", "pastel")

SUB_DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")
FRAMES, SIDE, FPS = 5, 32, 8.0

_LEVEL = {
    "dark": 45.0,
    "grey": 115.0,
    "bright": 195.0,
}  # mean luminance of the room, of 255
_STRIPE, _PERIOD = (
    24.0,
    0.5,
)  # amplitude of the stripes, of 255; their period, of the side
_CHROMA = {"vivid": 205.0, "pastel": 95.0}  # max - min over RGB of the shape
_MIDDLE = {"vivid": 130.0, "pastel": 175.0}  # (max + min) / 2 over RGB of the shape
# Extent of each shape for scale 1: circle radius, square half side, triangle circumradius.
_EXTENT = {"circle": 1.0, "square": 0.88, "triangle": 1.38}
_DIRECTION = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
}

_WORDINGS = (
    "a {style} video: a {color} {shape} moves {motion} in a {background} room, {camera} camera",
    "in a {background} room, a {color} {shape} moves {motion}, {camera} camera, {style} style",
    "{camera} camera, {style} style, a {color} {shape} moving {motion}, {background} room",
    "a {color} {shape} is moving {motion} through a {background} room; {style} style; {camera} camera",
)


@dataclass(frozen=True)
class Attributes:
    """What a caption asks for, or what a video shows (then a field is None where nothing could be read)."""

    color: str | None
    shape: str | None
    motion: str | None
    camera: str | None
    background: str | None
    style: str | None


VALUES = {
    "color": COLORS,
    "shape": SHAPES,
    "motion": MOTIONS,
    "camera": CAMERAS,
    "background": BACKGROUNDS,
    "style": STYLES,
}


@dataclass(frozen=True)
class Scene:
    """Attributes plus the free choices of the renderer. Lengths are fractions of the side, x right, y down."""

    attributes: Attributes
    scale: float  # see _EXTENT
    x: float  # middle of the path of the shape's centroid
    y: float
    travel: float  # length of that path over the whole clip
    pan: float  # how far the stripes slide per frame while the camera pans
    phase: float  # of the stripes, in [0, 1)
    light: float  # added to the room's mean luminance, of 255


@dataclass(frozen=True)
class Look:
    """What a renderer draws `Scene`s from: ranges of scale, travel and pan, and how far its light strays."""

    scale: tuple[float, float] = (0.17, 0.23)
    travel: tuple[float, float] = (0.24, 0.36)
    pan: tuple[float, float] = (0.035, 0.06)
    light: float = 10.0


def all_attributes() -> list[Attributes]:
    """Every combination, 6 x 3 x 4 x 2 x 3 x 2 = 864, in a fixed order."""
    return [Attributes(*values) for values in itertools.product(*VALUES.values())]


def split_attributes(
    *, heldout: float = 0.2, seed: int = 0
) -> tuple[list[Attributes], list[Attributes]]:
    """All combinations cut into (train, held out), the same cut for everybody who names the same seed."""
    combinations = all_attributes()
    random.Random(seed).shuffle(combinations)
    cut = round(len(combinations) * heldout)
    return combinations[cut:], combinations[:cut]


def random_attributes(rng: random.Random) -> Attributes:
    """One combination, uniform over all 864."""
    return Attributes(*(rng.choice(values) for values in VALUES.values()))


def random_scene(
    attributes: Attributes, rng: random.Random, look: Look = Look()
) -> Scene:
    """A scene with random size, speed, position and light in which the shape never leaves the frame."""
    scale, travel = rng.uniform(*look.scale), rng.uniform(*look.travel)
    dx, dy = _DIRECTION[attributes.motion]
    margin = scale * _EXTENT[attributes.shape]
    room_x = 0.5 - margin - abs(dx) * travel / 2
    room_y = 0.5 - margin - abs(dy) * travel / 2
    return Scene(
        attributes,
        scale=scale,
        x=0.5 + rng.uniform(-room_x, room_x),
        y=0.5 + rng.uniform(-room_y, room_y),
        travel=travel,
        pan=rng.uniform(*look.pan),
        phase=rng.random(),
        light=rng.uniform(-look.light, look.light),
    )


def caption(attributes: Attributes, *, wording: int) -> str:
    """The request in one of the wordings; ``wording`` counts modulo their number."""
    return _WORDINGS[wording % len(_WORDINGS)].format(
        **{f.name: getattr(attributes, f.name) for f in fields(attributes)}
    )


def captions(attributes: Sequence[Attributes]) -> list[str]:
    """Every combination in every wording, combination-major."""
    return [caption(a, wording=w) for a in attributes for w in range(len(_WORDINGS))]


def parse(prompt: str) -> Attributes:
    """The wish in a caption. A field the prompt does not speak of is None; "camera" needs its own word."""
    words = set(re.findall(r"[a-z]+", prompt.lower()))
    found = {
        name: [value for value in values if value in words]
        for name, values in VALUES.items()
    }
    return Attributes(
        **{
            name: values[0] if len(values) == 1 else None
            for name, values in found.items()
        }
    )


# ---------------------------------------------------------------------------------------------------- renderer


def _coverage(shape: str, dx: Tensor, dy: Tensor, scale: Tensor) -> Tensor:
    """Share of each pixel that the shape covers, antialiased over one pixel; dx, dy, scale in pixels."""
    extent = scale * _EXTENT[shape]
    if shape == "circle":
        distance = torch.sqrt(dx**2 + dy**2) - extent
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - extent
    else:  # equilateral, tip up, centroid at the origin: three half planes at the inradius
        inradius = extent / 2
        slant = math.sqrt(3) / 2 * dx.abs() - dy / 2
        distance = torch.maximum(dy, slant) - inradius
    return (0.5 - distance).clamp(0.0, 1.0)


def _rgb(color: str, style: str) -> tuple[float, float, float]:
    high = _MIDDLE[style] + _CHROMA[style] / 2
    low = _MIDDLE[style] - _CHROMA[style] / 2
    lit = {"red": (1, 0, 0), "yellow": (1, 1, 0), "green": (0, 1, 0)}
    lit |= {"cyan": (0, 1, 1), "blue": (0, 0, 1), "magenta": (1, 0, 1)}
    red, green, blue = (high if on else low for on in lit[color])
    return red, green, blue


def render(
    scenes: Sequence[Scene], *, frames: int = FRAMES, side: int = SIDE
) -> Tensor:
    """Draw the scenes -> uint8 (B, T, Y, X, 3)."""
    wish = [s.attributes for s in scenes]

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None, None, None]

    time = torch.linspace(-0.5, 0.5, frames)[None, :, None, None]
    axis = torch.arange(side) + 0.5
    x, y = axis[None, None, None, :], axis[None, None, :, None]
    centre_x = side * (
        column([s.x for s in scenes])
        + time
        * column(
            [
                s.travel * _DIRECTION[a.motion][0]
                for s, a in zip(scenes, wish, strict=True)
            ]
        )
    )
    centre_y = side * (
        column([s.y for s in scenes])
        + time
        * column(
            [
                s.travel * _DIRECTION[a.motion][1]
                for s, a in zip(scenes, wish, strict=True)
            ]
        )
    )
    scale = side * column([s.scale for s in scenes])
    alpha = torch.zeros(len(scenes), frames, side, side)
    for shape in SHAPES:
        chosen = [i for i, a in enumerate(wish) if a.shape == shape]
        if chosen:
            alpha[chosen] = _coverage(
                shape, x - centre_x[chosen], y - centre_y[chosen], scale[chosen]
            )

    slide = column(
        [
            s.pan if a.camera == "panning" else 0.0
            for s, a in zip(scenes, wish, strict=True)
        ]
    )
    step = torch.arange(frames, dtype=torch.float32)[None, :, None, None]
    turns = (x / side + slide * step) / _PERIOD + column([s.phase for s in scenes])
    level = column(
        [_LEVEL[a.background] + s.light for s, a in zip(scenes, wish, strict=True)]
    )
    room = (level + _STRIPE * torch.cos(2 * math.pi * turns)).expand_as(alpha)

    paint = torch.tensor([_rgb(a.color, a.style) for a in wish])[:, None, None, None, :]
    video = room[..., None] * (1 - alpha[..., None]) + paint * alpha[..., None]
    return video.round().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------------------------------------------ oracle


@dataclass(frozen=True)
class Observation:
    """What the pixels show. ``attributes`` holds None where nothing could be read; the numbers explain why.

    chroma  of the shape, of 255       speed_x, speed_y  of its centroid, sides per clip
    level   of the room, of 255        slide             of the stripes, sides per frame, positive when the camera pans
    stripe  their amplitude, of 255
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


_MIN_CHROMA, _MIN_STRIPE, _MIN_TRAVEL = 45.0, 9.0, 0.10
_STYLE_SPLIT, _STYLE_BAND = (
    150.0,
    12.0,
)  # halfway between the two chromas; inside the band the style is undecided
_STILL, _SLIDING = (
    0.012,
    0.020,
)  # sides per frame; between the two the camera is undecided


def _find_shape(rgb: Tensor) -> tuple[Tensor, float] | None:
    """Soft mask (T, Y, X) in [0, 1] of the one compact coloured region and its chroma, or None if there is none."""
    chroma = rgb.amax(-1) - rgb.amin(-1)
    _, height, width = chroma.shape
    # The plateau of the shape: the level that about 20 pixels in 1,024 exceed, in the median frame.
    plateau = chroma.flatten(1).quantile(1 - 20 / 1024, dim=1).median().item()
    if plateau < _MIN_CHROMA:
        return None
    mask = ((chroma / plateau - 0.25) / 0.65).clamp(0, 1)
    area = mask.sum((1, 2)).clamp(min=1e-6)
    y = torch.arange(height, dtype=mask.dtype)[None, :, None]
    x = torch.arange(width, dtype=mask.dtype)[None, None, :]
    centre_y = (mask * y).sum((1, 2)) / area
    centre_x = (mask * x).sum((1, 2)) / area
    spread = (
        (
            mask
            * ((x - centre_x[:, None, None]) ** 2 + (y - centre_y[:, None, None]) ** 2)
        ).sum((1, 2))
        / area
    ).sqrt()
    compact = spread < 0.62 * area.sqrt()  # 0.40 disc, 0.41 square, 0.44 triangle
    sized = (area > 0.03 * height * width) & (area < 0.35 * height * width)
    if (compact & sized).float().mean() < 0.7:
        return None
    return mask, plateau


def _name_shape(mask_TYX: Tensor, centre_x: Tensor, centre_y: Tensor) -> str:
    """The shape whose template of equal area at the same centroid fits best, SUM of squared error over the frames."""
    area = mask_TYX.sum((1, 2))[:, None, None]
    height, width = mask_TYX.shape[1:]
    dx = torch.arange(width) - centre_x[:, None, None]
    dy = torch.arange(height)[:, None] - centre_y[:, None, None]
    unit = {
        "circle": math.pi,
        "square": 4 * _EXTENT["square"] ** 2,
        "triangle": 3 * math.sqrt(3) / 4 * _EXTENT["triangle"] ** 2,
    }
    error = {
        s: ((_coverage(s, dx, dy, (area / unit[s]).sqrt()) - mask_TYX) ** 2)
        .sum()
        .item()
        for s in SHAPES
    }
    return min(error, key=error.__getitem__)


def _slope(value_T: Tensor) -> float:
    """Least-squares change per frame."""
    time = torch.arange(len(value_T), dtype=value_T.dtype)
    time = time - time.mean()
    return ((time * value_T).sum() / (time**2).sum()).item()


def _read_room(rgb: Tensor, mask: Tensor | None) -> tuple[float, float, float]:
    """(mean level, stripe amplitude, slide in sides per frame) by least squares on the pixels beside the shape."""
    frames, _, width = rgb.shape[:3]
    light = rgb.mean(-1)
    weight = torch.ones_like(light) if mask is None else (mask < 0.02).float()
    turn = 2 * math.pi * (torch.arange(width) + 0.5) / width / _PERIOD
    basis = torch.stack([torch.ones(width), torch.cos(turn), torch.sin(turn)])  # (3, X)
    per_column = weight.sum(1)  # (T, X)
    gram = torch.einsum("kx,tx,lx->tkl", basis, per_column, basis) + 1e-3 * torch.eye(3)
    right = torch.einsum("kx,tx->tk", basis, (light * weight).sum(1))
    fit = torch.linalg.solve(gram, right)  # (T, 3): level, cosine, sine
    amplitude = (
        fit[:, 1:].mean(0).norm() if frames == 1 else fit[:, 1:].norm(dim=1).median()
    )
    phase = torch.atan2(-fit[:, 2], fit[:, 1])  # cos(turn + phase)
    jump = torch.remainder(phase.diff() + math.pi, 2 * math.pi) - math.pi
    unwrapped = torch.cat([phase[:1], phase[:1] + jump.cumsum(0)])
    return (
        fit[:, 0].median().item(),
        amplitude.item(),
        _slope(unwrapped) / (2 * math.pi) * _PERIOD,
    )


def observe(video_TYXC: Tensor) -> Observation:
    """Read a uint8 video (T, Y, X, 3) from its pixels alone.

    Raises:
        ValueError: if the video is not uint8 (T >= 2, Y, X, 3).
    """
    if (
        video_TYXC.dtype != torch.uint8
        or video_TYXC.dim() != 4
        or video_TYXC.shape[-1] != 3
        or len(video_TYXC) < 2
    ):
        raise ValueError(
            f"observe needs uint8 (T >= 2, Y, X, 3), got {video_TYXC.dtype} {tuple(video_TYXC.shape)}"
        )
    rgb = video_TYXC.float()
    frames, height, width = rgb.shape[:3]
    found = _find_shape(rgb)
    level, stripe, slide = _read_room(rgb, found[0] if found else None)

    camera = background = color = shape = motion = style = None
    if stripe >= _MIN_STRIPE:
        background = min(BACKGROUNDS, key=lambda name: abs(_LEVEL[name] - level))
        camera = (
            "panning" if slide > _SLIDING else "fixed" if abs(slide) < _STILL else None
        )
    chroma = speed_x = speed_y = 0.0
    if found:
        mask, chroma = found
        area = mask.sum((1, 2)).clamp(min=1e-6)
        centre_x = (mask * torch.arange(width)).sum((1, 2)) / area
        centre_y = (mask * torch.arange(height)[:, None]).sum((1, 2)) / area
        speed_x = _slope(centre_x) * (frames - 1) / width
        speed_y = _slope(centre_y) * (frames - 1) / height
        if max(abs(speed_x), abs(speed_y)) >= _MIN_TRAVEL:
            sideways = abs(speed_x) > abs(speed_y)
            motion = (
                ("right" if speed_x > 0 else "left")
                if sideways
                else ("down" if speed_y > 0 else "up")
            )
        shape = _name_shape(mask, centre_x, centre_y)
        color = _name_color((rgb * (mask > 0.8)[..., None]).sum((0, 1, 2)))
        style = (
            "vivid"
            if chroma > _STYLE_SPLIT + _STYLE_BAND
            else "pastel"
            if chroma < _STYLE_SPLIT - _STYLE_BAND
            else None
        )
    return Observation(
        Attributes(color, shape, motion, camera, background, style),
        chroma,
        speed_x,
        speed_y,
        level,
        stripe,
        slide,
    )


def _name_color(rgb: Tensor) -> str:
    red, green, blue = rgb.tolist()
    hue = math.degrees(
        math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
    )
    return COLORS[round(hue / 60) % 6]


def compare(wish: Attributes, seen: Attributes) -> OracleScore:
    """Score what is seen against the wish; a wish that is None (not spoken of) is never failed.

    subject      2 colour and shape, 1 one of them, 0 none       dynamics  2 same direction, 1 the opposite one
    environment  2 same room, 1 a neighbour in brightness        camera, style  2 same, 1 undecided, 0 wrong
    Without a shape there is no subject, no dynamics and no style; without stripes no camera and no environment.
    """

    def same(name: str) -> bool:
        return getattr(wish, name) is None or getattr(wish, name) == getattr(seen, name)

    present, room = seen.shape is not None, seen.background is not None
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    near = (
        room
        and wish.background
        and abs(BACKGROUNDS.index(wish.background) - BACKGROUNDS.index(seen.background))
        == 1
    )
    scores = {
        "subject": same("color") + same("shape") if present else 0,
        "dynamics": (
            2 if same("motion") else int(seen.motion == opposite.get(wish.motion))
        )
        if present
        else 0,
        "camera": (2 if same("camera") else int(seen.camera is None)) if room else 0,
        "environment": (2 if same("background") else int(bool(near))) if room else 0,
        "style": (2 if same("style") else int(seen.style is None)) if present else 0,
    }
    return OracleScore(scores, sum(scores.values()) / (2 * len(scores)))


def measure(video_TYXC: Tensor, prompt: str) -> OracleScore:
    """The exact oracle: how well a uint8 video (T, Y, X, 3) shows what the prompt asks, from the pixels alone.

    Raises:
        ValueError: if the video has the wrong type or shape, or the prompt asks for nothing of this world.
    """
    wish = parse(prompt)
    if all(getattr(wish, name) is None for name in VALUES):
        raise ValueError(f"the prompt names nothing of the shapes world: {prompt!r}")
    return compare(wish, observe(video_TYXC).attributes)
