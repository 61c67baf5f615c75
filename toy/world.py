"""Scenes of the embedded world: attributes, captions and the renderer.

A `Scene` is a coloured shape that moves in a striped room. `caption` describes it, `parse` reads a
caption back and `render` draws the video. `toy.measure` scores a video from its pixels.

All lengths are fractions of the frame side, so that a scene renders at any resolution. Luminance
belongs to the room (a mean level and vertical sinusoidal stripes that slide when the camera pans),
chroma belongs to the shape. The oracle can therefore separate the two exactly.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

# The hues are 0, 60, ... 300 degrees.
COLORS = ("red", "yellow", "green", "cyan", "blue", "magenta")
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("left", "right", "up", "down")
CAMERAS = ("fixed", "panning")
# In order of brightness: a neighbour is a partial match.
BACKGROUNDS = ("dark", "grey", "bright")
STYLES = ("vivid", "pastel")

SUB_DIMENSIONS = ("subject", "dynamics", "camera", "environment", "style")
FRAMES = 5
SIDE = 32
FPS = 8.0

# Mean luminance of the room and amplitude of its stripes, both of 255.
LEVEL = {"dark": 45.0, "grey": 115.0, "bright": 195.0}
_STRIPE = 24.0
# Period of the stripes in sides.
PERIOD = 0.5
# max - min and (max + min) / 2 over RGB of the shape.
CHROMA = {"vivid": 205.0, "pastel": 95.0}
_MIDDLE = {"vivid": 130.0, "pastel": 175.0}
_RED_GREEN_BLUE = {
    "red": (1, 0, 0),
    "yellow": (1, 1, 0),
    "green": (0, 1, 0),
    "cyan": (0, 1, 1),
    "blue": (0, 0, 1),
    "magenta": (1, 0, 1),
}
# Circle radius, half side of the square, circumradius of the triangle, each at scale 1.
EXTENT = {"circle": 1.0, "square": 0.88, "triangle": 1.38}
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
    "a {color} {shape} is moving {motion} through a {background} room; {style} style; "
    "{camera} camera",
)


@dataclass(frozen=True)
class Attributes:
    """Six attributes that a caption asks for or a video shows; None where there is no answer."""

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
    """Attributes and the free choices of the renderer.

    Lengths are fractions of the side, x points right and y down.

    scale   Size of the shape, in units of `EXTENT`.
    x, y    Middle of the path of the shape's centroid.
    travel  Length of that path over the whole clip.
    pan     Distance the stripes slide per frame while the camera pans.
    phase   Phase of the stripes in [0, 1).
    light   Offset of the room's mean luminance, of 255.
    """

    attributes: Attributes
    scale: float
    x: float
    y: float
    travel: float
    pan: float
    phase: float
    light: float


@dataclass(frozen=True)
class Look:
    """Ranges from which `random_scene` draws scale, travel and pan, and the greatest light."""

    scale: tuple[float, float] = (0.17, 0.23)
    travel: tuple[float, float] = (0.24, 0.36)
    pan: tuple[float, float] = (0.035, 0.06)
    light: float = 10.0


def all_attributes() -> list[Attributes]:
    """List every combination, 6 x 3 x 4 x 2 x 3 x 2 = 864, in a fixed order."""
    return [Attributes(*values) for values in itertools.product(*VALUES.values())]


def direction_of(motion: str) -> tuple[float, float]:
    """Unit vector of a motion, x to the right and y down."""
    return _DIRECTION[motion]


def split_attributes() -> tuple[list[Attributes], list[Attributes]]:
    """Split all combinations into (train, held-out), 80 % and 20 %; always the same split."""
    # A fixed seed: every program has the same held-out combinations.
    combinations = all_attributes()
    random.Random(0).shuffle(combinations)
    cut = round(len(combinations) * 0.2)
    return combinations[cut:], combinations[:cut]


def random_attributes(rng: random.Random) -> Attributes:
    """Draw a combination, uniform over all 864."""
    chosen = [rng.choice(values) for values in VALUES.values()]
    return Attributes(*chosen)


@lru_cache(maxsize=1)
def heldout_attributes() -> frozenset[Attributes]:
    """The held-out combinations, see `split_attributes`."""
    return frozenset(split_attributes()[1])


def training_attributes(rng: random.Random) -> Attributes:
    """Draw a combination, uniform over those that are not held out."""
    return redrawn(random_attributes, rng)


def redrawn(
    draw: Callable[[random.Random], Attributes], rng: random.Random
) -> Attributes:
    """Call ``draw`` until its combination is not held out; nothing trains on the others."""
    while True:
        attributes = draw(rng)
        if attributes not in heldout_attributes():
            return attributes


def mix_attributes(
    attributes: Attributes,
    other: Attributes,
    rng: random.Random,
    *,
    share: float,
) -> Attributes:
    """Replace each attribute by that of ``other`` with probability ``share``."""
    mixed = {}
    for name in VALUES:
        source = other if rng.random() < share else attributes
        mixed[name] = getattr(source, name)
    return Attributes(**mixed)


def random_scene(
    attributes: Attributes, rng: random.Random, look: Look = Look()
) -> Scene:
    """Draw a scene of random size, speed, position and light; the shape stays in the frame."""
    scale = rng.uniform(*look.scale)
    travel = rng.uniform(*look.travel)

    # The middle of the path may leave the centre by this much.
    dx, dy = _DIRECTION[attributes.motion]
    margin = scale * EXTENT[attributes.shape]
    room_x = 0.5 - margin - abs(dx) * travel / 2
    room_y = 0.5 - margin - abs(dy) * travel / 2
    return Scene(
        attributes=attributes,
        scale=scale,
        x=0.5 + rng.uniform(-room_x, room_x),
        y=0.5 + rng.uniform(-room_y, room_y),
        travel=travel,
        pan=rng.uniform(*look.pan),
        phase=rng.random(),
        light=rng.uniform(-look.light, look.light),
    )


def random_scenes(count: int, rng: random.Random) -> list[Scene]:
    """Draw scenes of random combinations of attributes, held-out ones left out."""
    return [random_scene(training_attributes(rng), rng) for _ in range(count)]


def caption(attributes: Attributes, *, wording: int) -> str:
    """Write the caption in one of four wordings; ``wording`` counts modulo 4."""
    template = _WORDINGS[wording % len(_WORDINGS)]
    return template.format(**asdict(attributes))


def captions(attributes: Sequence[Attributes]) -> list[str]:
    """Write every combination in every wording, combination-major."""
    texts = []
    for combination in attributes:
        for wording in range(len(_WORDINGS)):
            texts.append(caption(combination, wording=wording))
    return texts


def parse(prompt: str) -> Attributes:
    """Read the attributes that a caption asks for.

    A field is None where the prompt names no value of it, or several.
    """
    words = set(re.findall(r"[a-z]+", prompt.lower()))
    wanted = dict.fromkeys(VALUES)
    for name, values in VALUES.items():
        named = [value for value in values if value in words]
        if len(named) == 1:
            wanted[name] = named[0]
    return Attributes(**wanted)


def coverage(shape: str, dx: Tensor, dy: Tensor, scale: Tensor) -> Tensor:
    """Share of each pixel that the shape covers, antialiased over one pixel.

    ``dx`` and ``dy`` are distances from the centroid; they and ``scale`` are in pixels.
    """
    extent = scale * EXTENT[shape]
    if shape == "circle":
        distance = torch.sqrt(dx**2 + dy**2) - extent
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - extent
    else:
        # Equilateral, tip up, centroid at the origin: three half planes at the inradius.
        inradius = extent / 2
        slant = math.sqrt(3) / 2 * dx.abs() - dy / 2
        distance = torch.maximum(dy, slant) - inradius
    return (0.5 - distance).clamp(0.0, 1.0)


def render(
    scenes: Sequence[Scene], *, frames: int = FRAMES, side: int = SIDE
) -> Tensor:
    """Draw the scenes as uint8 (B, T, Y, X, 3)."""
    # Coverage of the shape and luminance of the room, with an axis for the colour.
    axis = torch.arange(side) + 0.5
    alpha = _draw_shapes(scenes, frames, axis)
    room = _draw_rooms(scenes, frames, axis).expand_as(alpha)
    alpha = alpha[..., None]
    room = room[..., None]

    # The shape lies over the room.
    colors = [_rgb(scene.attributes) for scene in scenes]
    paint = torch.tensor(colors)[:, None, None, None, :]
    video = room * (1 - alpha) + paint * alpha
    return video.round().clamp(0, 255).to(torch.uint8)


def _draw_shapes(scenes: Sequence[Scene], frames: int, axis: Tensor) -> Tensor:
    """Coverage (B, T, Y, X) of every pixel by the shape of its scene."""
    side = len(axis)
    x = axis[None, None, None, :]
    y = axis[None, None, :, None]
    time = torch.linspace(-0.5, 0.5, frames)[None, :, None, None]

    # The centroid moves along a straight line at constant speed.
    steps_x = []
    steps_y = []
    rows_of = {shape: [] for shape in SHAPES}
    for row, scene in enumerate(scenes):
        dx, dy = _DIRECTION[scene.attributes.motion]
        steps_x.append(scene.travel * dx)
        steps_y.append(scene.travel * dy)
        rows_of[scene.attributes.shape].append(row)
    middle_x = _per_scene([scene.x for scene in scenes])
    middle_y = _per_scene([scene.y for scene in scenes])
    centre_x = side * (middle_x + time * _per_scene(steps_x))
    centre_y = side * (middle_y + time * _per_scene(steps_y))
    scale = side * _per_scene([scene.scale for scene in scenes])

    # All scenes of a shape together.
    alpha = torch.zeros(len(scenes), frames, side, side)
    for shape, rows in rows_of.items():
        if rows:
            dx = x - centre_x[rows]
            dy = y - centre_y[rows]
            alpha[rows] = coverage(shape, dx, dy, scale[rows])
    return alpha


def _draw_rooms(scenes: Sequence[Scene], frames: int, axis: Tensor) -> Tensor:
    """Luminance (B, T, 1, X) of the striped room behind the shape."""
    slides = []
    levels = []
    for scene in scenes:
        panning = scene.attributes.camera == "panning"
        slides.append(scene.pan if panning else 0.0)
        # The room has its light in every frame.
        levels.append(LEVEL[scene.attributes.background] + scene.light)

    # Turns of the stripes' cosine at every column and frame.
    step = torch.arange(frames, dtype=torch.float32)[None, :, None, None]
    x = axis[None, None, None, :]
    turns = (x / len(axis) + _per_scene(slides) * step) / PERIOD
    turns = turns + _per_scene([scene.phase for scene in scenes])
    stripes = torch.cos(2 * math.pi * turns)
    return _per_scene(levels) + _STRIPE * stripes


def _per_scene(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None, None]


def _rgb(attributes: Attributes) -> list[float]:
    middle = _MIDDLE[attributes.style]
    half = CHROMA[attributes.style] / 2
    lit = _RED_GREEN_BLUE[attributes.color]
    channels = []
    for on in lit:
        channels.append(middle + half if on else middle - half)
    return channels
