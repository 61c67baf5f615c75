"""From a video to the patches Qwen3-VL's vision tower reads. One path for files and for frames in memory.

Equal to transformers' ``Qwen3VLVideoProcessor`` (which needs torchvision) on the frames it is given; see
``tests/golden``. The settings travel with the checkpoint, so training and scoring cannot differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rm.config import VideoSettings


class VideoError(ValueError):
    """A video that cannot be read; the message names the file."""


@dataclass(frozen=True)
class Clip:
    """Sampled frames and when each was seen.

    frames_TYXC  uint8; ``times`` in seconds, one per frame
    """

    frames_TYXC: Tensor
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        got = self.frames_TYXC
        if got.dtype != torch.uint8 or got.dim() != 4 or got.shape[-1] != 3:
            raise ValueError(
                f"Clip.frames_TYXC must be uint8 (T, Y, X, 3), got {got.dtype} {tuple(got.shape)}"
            )
        if len(self.times) != self.frames_TYXC.shape[0]:
            raise ValueError(
                f"Clip.times has {len(self.times)} entries for {self.frames_TYXC.shape[0]} frames"
            )


@dataclass(frozen=True)
class PixelPatches:
    """patches (t*h*w, C*tp*p*p) fp32, merge blocks contiguous; grid (t, h, w) counts patches before merging."""

    patches: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True)
class PreparedVideo:
    """All the model needs of a video: patches, grid, and the mean time of each temporal patch (t entries)."""

    patches: Tensor
    grid: tuple[int, int, int]
    times: tuple[float, ...]


def prepare(
    source: str | Path | Tensor, settings: VideoSettings, *, fps: float | None = None
) -> PreparedVideo:
    """File path, or uint8 frames (T, Y, X, 3) at ``fps`` -> PreparedVideo. A file is decoded once, a tensor never."""
    if isinstance(source, Tensor):
        if fps is None:
            raise ValueError("prepare: frames need their fps")
        clip = sample_clip(source, fps, settings)
    else:
        clip = read_video(source, settings)
    pixels = preprocess(clip.frames_TYXC, settings)
    return PreparedVideo(
        pixels.patches,
        pixels.grid,
        patch_times(clip.times, settings.temporal_patch_size),
    )


def frame_indices(count: int, fps: float, settings: VideoSettings) -> list[int]:
    """Which of ``count`` frames at ``fps`` are seen: duration * settings.fps of them, uniform, first and last included.

    The number is rounded to a multiple of the temporal patch, held within min_frames and max_frames, and never above
    ``count``: a clip that is shorter than that is used whole (`preprocess` repeats its last frame to fill a patch).
    """
    if count < 1 or not fps > 0:
        raise ValueError(f"frame_indices: {count} frames at {fps} fps")
    step = settings.temporal_patch_size
    wanted = round(count / fps * settings.fps / step) * step
    wanted = min(max(wanted, settings.min_frames), settings.max_frames, count)
    return (
        torch.linspace(0, count - 1, wanted, dtype=torch.float64)
        .round()
        .long()
        .tolist()
    )


def sample_clip(frames_TYXC: Tensor, fps: float, settings: VideoSettings) -> Clip:
    """Frames in memory, at a known rate -> Clip."""
    indices = frame_indices(frames_TYXC.shape[0], fps, settings)
    return Clip(frames_TYXC[indices], tuple(i / fps for i in indices))


def read_video(path: str | Path, settings: VideoSettings) -> Clip:
    """Decode the wanted frames of a file. VideoError, naming the file, if it is missing, broken or empty."""
    import decord

    if not Path(path).is_file():
        raise VideoError(f"{path}: no such video file")
    try:
        reader = decord.VideoReader(str(path), num_threads=1)
        count, fps = len(reader), float(reader.get_avg_fps())
        if count < 1 or not fps > 0:
            raise VideoError(f"{path}: {count} frames at {fps} fps")
        indices = frame_indices(count, fps, settings)
        frames_TYXC = torch.stack(
            [_unpadded(torch.from_numpy(reader[i].asnumpy())) for i in indices]
        )
    except (RuntimeError, decord.DECORDError) as error:
        raise VideoError(
            f"{path}: cannot be decoded ({str(error).splitlines()[0]:.200})"
        ) from error
    return Clip(frames_TYXC, tuple(i / fps for i in indices))


def _unpadded(frame_YXC: Tensor) -> Tensor:
    """A decoded frame (Y, X, 3). decord pads the rows of narrow frames and then claims more than three channels."""
    height, width, _ = frame_YXC.shape
    return frame_YXC.reshape(height, -1)[:, : 3 * width].reshape(height, width, 3)


def patch_times(times: Sequence[float], temporal_patch_size: int) -> tuple[float, ...]:
    """Time of each temporal patch: the MEAN of its first and last frame's times, the last frame repeated to fill it."""
    padded = [*times, *[times[-1]] * (-len(times) % temporal_patch_size)]
    return tuple(
        (padded[i] + padded[i + temporal_patch_size - 1]) / 2
        for i in range(0, len(padded), temporal_patch_size)
    )


def preprocess(frames_TYXC: Tensor, settings: VideoSettings) -> PixelPatches:
    """uint8 (T, Y, X, 3) -> patches: resize (bicubic, antialiased, in uint8), normalise, cut.

    value = (pixel - 255 mean) / (255 std). The resize works on uint8 because the reference does: in float the result
    differs by up to one grey level.
    """
    count, height, width, channels = frames_TYXC.shape
    size = smart_resize(count, height, width, settings)
    frames = frames_TYXC.permute(0, 3, 1, 2)
    if size != (height, width):
        frames = F.interpolate(
            frames.contiguous(), size=size, mode="bicubic", antialias=True
        )
    mean = torch.tensor(settings.mean).view(3, 1, 1) * 255.0
    std = torch.tensor(settings.std).view(3, 1, 1) * 255.0
    video = (frames.float() - mean) / std

    tp, p, m = settings.temporal_patch_size, settings.patch_size, settings.merge_size
    if fill := -count % tp:
        video = torch.cat([video, video[-1:].expand(fill, -1, -1, -1)])
    t, h, w = video.shape[0] // tp, size[0] // p, size[1] // p
    # merge blocks of m x m patches are contiguous rows: the vision tower merges them by a plain view
    cut = video.reshape(t, tp, channels, h // m, m, p, w // m, m, p)
    patches = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(
        t * h * w, channels * tp * p * p
    )
    return PixelPatches(patches, (t, h, w))


def frames_of(video: PreparedVideo, settings: VideoSettings) -> Tensor:
    """The uint8 frames (T, Y, X, 3) that `preprocess` cut up, exactly: resized, a repeated last frame included."""
    tp, p, m = settings.temporal_patch_size, settings.patch_size, settings.merge_size
    t, h, w = video.grid
    cut = video.patches.reshape(t, h // m, w // m, m, m, -1, tp, p, p)
    frames = cut.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(t * tp, h * p, w * p, -1)
    mean, std = (torch.tensor(x) * 255.0 for x in (settings.mean, settings.std))
    return (frames * std + mean).round().to(torch.uint8)


def smart_resize(
    count: int, height: int, width: int, settings: VideoSettings
) -> tuple[int, int]:
    """Height and width the frames are resized to: multiples of patch * merge, aspect kept, within the pixel budget.

    Qwen3-VL's rule. With ``budget="video"`` it bounds frames * height * width, the frame count rounded to whole
    temporal patches; with ``"frame"`` it bounds height * width.
    """
    factor = settings.patch_size * settings.merge_size
    low, high = settings.min_pixels, settings.max_pixels
    if settings.budget == "frame":
        count = rounded = 1
    else:
        step = settings.temporal_patch_size
        rounded = max(step, round(count / step) * step)
    if min(height, width) < factor:
        grow = factor / min(height, width)
        height, width = int(height * grow), int(width * grow)
    if max(height, width) > 200 * min(height, width):
        raise VideoError(
            f"a {height} x {width} video is more than 200 times as long as wide"
        )
    new_height, new_width = (
        round(height / factor) * factor,
        round(width / factor) * factor,
    )
    if rounded * new_height * new_width > high:
        shrink = math.sqrt(count * height * width / high)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif rounded * new_height * new_width < low:
        grow = math.sqrt(low / (count * height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width
