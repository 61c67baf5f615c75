"""From a video to the patches that Qwen3-VL's vision tower reads.

The patches equal those of transformers' ``Qwen3VLVideoProcessor``, which needs torchvision; see
``tests/golden``. Files and frames in memory take the same path, and the settings are saved with
the checkpoint, so training and scoring cannot differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.film import Film, VideoError
from rm.config import VideoSettings

# Qwen3-VL refuses frames that are more elongated.
MAX_ASPECT = 200


@dataclass(frozen=True)
class Clip:
    """Sampled frames, uint8 (T, Y, X, 3), and the time of each in seconds."""

    frames_TYXC: Tensor
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        frames = self.frames_TYXC
        if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[-1] != 3:
            raise ValueError(
                "Clip.frames_TYXC must be uint8 (T, Y, X, 3), "
                f"got {frames.dtype} {tuple(frames.shape)}"
            )
        if len(self.times) != len(frames):
            raise ValueError(
                f"Clip.times has {len(self.times)} entries for {len(frames)} frames"
            )


@dataclass(frozen=True)
class PixelPatches:
    """Patches of a video before their times are known.

    patches  fp32 (t*h*w, C*tp*p*p); the patches of a merge block are contiguous.
    grid     (t, h, w), the number of patches before merging.
    """

    patches: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class PreparedVideo:
    """A video as the model reads it.

    ``patches`` and ``grid`` are as in `PixelPatches`; ``times`` are the t mean times of the
    temporal patches, in seconds.
    """

    patches: Tensor
    grid: tuple[int, int, int]
    times: tuple[float, ...]


def prepare(
    source: str | Path | Tensor, settings: VideoSettings, *, fps: float | None = None
) -> PreparedVideo:
    """Prepare a file, or uint8 frames (T, Y, X, 3) at ``fps``, for the model."""
    if isinstance(source, Tensor):
        if fps is None:
            raise ValueError("prepare: frames need their fps")
        clip = sample_clip(source, fps, settings)
    else:
        clip = read_video(source, settings)
    pixels = preprocess(clip.frames_TYXC, settings)
    times = patch_times(clip.times, settings.temporal_patch_size)
    return PreparedVideo(
        patches=pixels.patches,
        grid=pixels.grid,
        times=times,
    )


def frame_indices(count: int, fps: float, settings: VideoSettings) -> list[int]:
    """Choose the frames that the model sees, out of ``count`` frames at ``fps``.

    They are duration * settings.fps many, evenly spaced, the first and the last included. The
    number is rounded to a multiple of the temporal patch and held within min_frames and
    max_frames. A clip with fewer frames is taken in full; `preprocess` repeats its last frame
    to fill a patch.
    """
    if count < 1 or not fps > 0:
        raise ValueError(f"frame_indices: {count} frames at {fps} fps")

    # How many frames.
    step = settings.temporal_patch_size
    number = round(count / fps * settings.fps / step) * step
    number = max(number, settings.min_frames)
    number = min(number, settings.max_frames, count)

    # Which frames.
    places = torch.linspace(0, count - 1, number, dtype=torch.float64)
    return places.round().long().tolist()


def sample_clip(frames_TYXC: Tensor, fps: float, settings: VideoSettings) -> Clip:
    """Sample a clip from frames in memory at a known rate."""
    indices = frame_indices(len(frames_TYXC), fps, settings)
    times = tuple(i / fps for i in indices)
    return Clip(frames_TYXC[indices], times)


def read_video(path: str | Path, settings: VideoSettings) -> Clip:
    """Decode the frames of a file that the model sees, as `common.film` shows them.

    Raises VideoError, naming the file, if it is missing, broken or empty.
    """
    film = Film(path)
    indices = frame_indices(film.count, film.fps, settings)
    times = tuple(i / film.fps for i in indices)
    return Clip(film.frames(indices), times)


def patch_times(times: Sequence[float], temporal_patch_size: int) -> tuple[float, ...]:
    """Compute the MEAN of the first and last frame's times of each temporal patch."""
    # The last frame is repeated to fill its patch.
    missing = -len(times) % temporal_patch_size
    padded = list(times)
    padded += [times[-1]] * missing
    means = []
    for first in range(0, len(padded), temporal_patch_size):
        last = first + temporal_patch_size - 1
        means.append((padded[first] + padded[last]) / 2)
    return tuple(means)


def preprocess(frames_TYXC: Tensor, settings: VideoSettings) -> PixelPatches:
    """Resize (bicubic, antialiased), normalise and cut uint8 frames (T, Y, X, 3).

    value = (pixel - 255 mean) / (255 std). The resize works on uint8 as transformers' does: in
    float the result differs by up to a grey level.
    """
    # Resize.
    count, height, width, channels = frames_TYXC.shape
    size = smart_resize(count, height, width, settings)
    frames = frames_TYXC.permute(0, 3, 1, 2)
    if size != (height, width):
        frames = F.interpolate(
            frames.contiguous(),
            size=size,
            mode="bicubic",
            antialias=True,
        )

    # Normalise.
    mean = torch.tensor(settings.mean) * 255.0
    std = torch.tensor(settings.std) * 255.0
    video = frames.float() - mean.view(3, 1, 1)
    video = video / std.view(3, 1, 1)

    # Repeat the last frame to fill its temporal patch.
    tp = settings.temporal_patch_size
    missing = -count % tp
    if missing:
        last = video[-1:]
        repeated = last.expand(missing, -1, -1, -1)
        video = torch.cat([video, repeated])

    # Cut. Blocks of m x m patches are contiguous rows: the vision tower merges them by a view.
    p = settings.patch_size
    m = settings.merge_size
    t = len(video) // tp
    h = size[0] // p
    w = size[1] // p
    cut = video.reshape(t, tp, channels, h // m, m, p, w // m, m, p)
    ordered = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    patches = ordered.reshape(t * h * w, channels * tp * p * p)
    return PixelPatches(patches, (t, h, w))


def smart_resize(
    count: int, height: int, width: int, settings: VideoSettings
) -> tuple[int, int]:
    """Compute the height and width that frames are resized to, by Qwen3-VL's rule.

    Both are multiples of patch * merge; the aspect is kept as far as that allows. With
    ``budget="video"`` the pixel budget bounds frames * height * width, with the frame count
    rounded to full temporal patches; with ``"frame"`` it bounds height * width.
    """
    # The number of frames that the budget is for.
    rounded = 1
    if settings.budget == "frame":
        count = 1
    else:
        step = settings.temporal_patch_size
        rounded = max(step, round(count / step) * step)

    # At least a merge block in each direction.
    factor = settings.patch_size * settings.merge_size
    if min(height, width) < factor:
        scale = factor / min(height, width)
        height = int(height * scale)
        width = int(width * scale)
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise VideoError(
            f"a {height} x {width} video is more than {MAX_ASPECT} times as long as wide"
        )

    # The nearest multiples; shrink or grow if they leave the budget.
    new_height = round(height / factor) * factor
    new_width = round(width / factor) * factor
    pixels = rounded * new_height * new_width
    if pixels > settings.max_pixels:
        scale = math.sqrt(count * height * width / settings.max_pixels)
        new_height = math.floor(height / scale / factor) * factor
        new_width = math.floor(width / scale / factor) * factor
        new_height = max(factor, new_height)
        new_width = max(factor, new_width)
    elif pixels < settings.min_pixels:
        scale = math.sqrt(settings.min_pixels / (count * height * width))
        new_height = math.ceil(height * scale / factor) * factor
        new_width = math.ceil(width * scale / factor) * factor
    return new_height, new_width
