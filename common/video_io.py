"""Write and read mp4 files in process with PyAV, without an ffmpeg binary."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from common.film import Film, VideoError

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDING_S = 1e-6


def write_mp4(
    path: str | Path,
    video_TYXC: Tensor,
    fps: float,
    *,
    crf: int = 12,
) -> None:
    """Write uint8 RGB frames (T, Y, X, 3) as H.264, yuv420p, which every browser plays.

    The same frames give the same bytes. crf is x264's quality: 0 is almost lossless, 12 can hardly
    be told from the source, 23 is common on the web. Raises ValueError for another dtype or shape,
    an odd height or width (chroma is halved), fps <= 0 or a crf outside 0..51.
    """
    import av

    # 1. Checks.
    shape = tuple(video_TYXC.shape)
    is_video = len(shape) == 4 and shape[0] >= 1 and shape[3] == 3
    if str(video_TYXC.dtype) != "torch.uint8" or not is_video:
        raise ValueError(
            f"write_mp4 needs uint8 frames (T, Y, X, 3), got {video_TYXC.dtype} {shape}"
        )
    _, height, width, _ = shape
    if height % 2 or width % 2:
        raise ValueError(
            f"write_mp4 needs an even height and width, got {height}x{width}"
        )
    if not fps > 0 or not 0 <= crf <= 51:
        raise ValueError(
            f"write_mp4 needs fps > 0 and 0 <= crf <= 51, got fps={fps} and crf={crf}"
        )

    # 2. Encode. Macroblock-tree look-ahead is off: with it, x264's AVX-512 code writes other
    # bytes each time for frames 32 pixels wide.
    options = {
        "crf": str(crf),
        "preset": "veryfast",
        "threads": "1" if height * width < 128 * 128 else "0",
        "x264-params": "mbtree=0",
    }
    with av.open(
        str(path),
        mode="w",
        options={"movflags": "+faststart"},
    ) as container:
        # H.264 stores a rate as a fraction.
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream(
            "libx264",
            rate=rate,
            options=options,
        )
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p"
        for frame_YXC in video_TYXC.cpu().numpy():
            frame = av.VideoFrame.from_ndarray(frame_YXC, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def read_frames(
    path: str | Path,
    *,
    num_frames: int,
    fps: float,
    height: int,
    width: int,
) -> Tensor:
    """Read the first ``num_frames`` frames at ``fps``, scaled and cropped: uint8 (T, Y, X, 3).

    Frame i is on the screen i / fps seconds after the first, see `common.film`. Raises VideoError,
    naming the file, when it cannot be decoded, has no video, or ends too early.
    """
    film = Film(path)
    instants = [i / fps for i in range(num_frames)]
    if instants[-1] >= film.duration - _ROUNDING_S:
        there = sum(instant < film.duration - _ROUNDING_S for instant in instants)
        raise VideoError(
            f"{path}: {there} frames at {fps:g} a second, {num_frames} are needed"
        )
    # Interpolation wants channels first.
    pixels = film.frames_at(instants).permute(0, 3, 1, 2)
    if pixels.shape[2:] != (height, width):
        pixels = _fill(pixels, height, width)
    return pixels.permute(0, 2, 3, 1).contiguous()


def _fill(
    pixels_TCYX: Tensor,
    height: int,
    width: int,
) -> Tensor:
    """Scale frames until they cover height x width, and crop the centre."""
    import torch
    import torch.nn.functional as F

    # The larger scale covers both sides.
    rows, columns = pixels_TCYX.shape[2:]
    scale = max(height / rows, width / columns)
    # rounded up, less an allowance for the rounding of the scale
    new_rows = max(height, math.ceil(rows * scale - 1e-6))
    new_columns = max(width, math.ceil(columns * scale - 1e-6))
    pixels_TCYX = F.interpolate(
        pixels_TCYX.float(),
        size=(new_rows, new_columns),
        mode="bicubic",
        antialias=True,
    )
    pixels_TCYX = pixels_TCYX.round().clamp(0, 255)
    # Crop what juts out, equally on both sides.
    top = (new_rows - height) // 2
    left = (new_columns - width) // 2
    cropped = pixels_TCYX[:, :, top : top + height, left : left + width]
    return cropped.to(torch.uint8)
