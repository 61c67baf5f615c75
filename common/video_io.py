"""Videos as mp4 files, written and read in process with PyAV: no ffmpeg binary, a few milliseconds for a small clip."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_mp4(
    path: str | Path, video_TYXC: Tensor, fps: float, *, crf: int = 12
) -> None:
    """Write uint8 RGB frames (T, Y, X, 3) as H.264, yuv420p, which every browser plays.

    The same frames give the same bytes. crf is x264's quality: 0 is almost lossless, 12 can hardly be told from the
    source, 23 is what the web uses.
    Raises ValueError for another dtype or shape, an odd height or width (chroma is halved), fps <= 0 or a crf outside
    0..51.
    """
    import av

    shape = tuple(video_TYXC.shape)
    if (
        str(video_TYXC.dtype) != "torch.uint8"
        or len(shape) != 4
        or shape[0] < 1
        or shape[3] != 3
    ):
        raise ValueError(
            f"write_mp4 needs uint8 frames (T, Y, X, 3), got {video_TYXC.dtype} {shape}"
        )
    if shape[1] % 2 or shape[2] % 2:
        raise ValueError(
            f"write_mp4 needs an even height and width, got {shape[1]}x{shape[2]}"
        )
    if not fps > 0 or not 0 <= crf <= 51:
        raise ValueError(
            f"write_mp4 needs fps > 0 and 0 <= crf <= 51, got fps={fps} and crf={crf}"
        )
    options = {
        "crf": str(crf),
        "preset": "veryfast",
        "threads": "1" if shape[1] * shape[2] < 128 * 128 else "0",
    }
    # with macroblock-tree look-ahead, x264's AVX-512 code writes other bytes each time for frames 32 pixels wide
    options["x264-params"] = "mbtree=0"
    with av.open(str(path), mode="w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001), options=options
        )
        stream.height, stream.width, stream.pix_fmt = shape[1], shape[2], "yuv420p"
        for frame_YXC in video_TYXC.cpu().numpy():
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(frame_YXC, format="rgb24"))
            )
        container.mux(stream.encode())


def read_frames(
    path: str | Path, *, num_frames: int, fps: float, height: int, width: int
) -> Tensor:
    """The first ``num_frames`` frames at ``fps`` of a file, uint8 RGB (T, Y, X, 3), scaled and cropped to size.

    Frame i is the last one shown at i / fps seconds. Raises ValueError, naming the file, when it cannot be decoded, has
    no video, or ends before the last of these frames is shown.
    """
    import av
    import torch
    import torch.nn.functional as F

    wanted = [i / fps for i in range(num_frames)]
    frames: list[Tensor] = []
    shown = None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path}: has no video stream")
            stream, end = container.streams.video[0], 0.0
            for frame in container.decode(stream):
                start = end if frame.time is None else frame.time
                while (
                    shown is not None
                    and len(frames) < num_frames
                    and wanted[len(frames)] < start - 1e-6
                ):
                    frames.append(shown)
                if len(frames) == num_frames:
                    break
                shown = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                end = start + 1 / float(stream.average_rate or fps)
    except (av.error.FFmpegError, OSError) as error:
        raise ValueError(f"{path}: cannot be decoded ({error})") from error
    while (
        shown is not None
        and len(frames) < num_frames
        and wanted[len(frames)] < end - 1e-6
    ):
        frames.append(shown)
    if len(frames) < num_frames:
        raise ValueError(
            f"{path}: {len(frames)} frames at {fps:g} a second, {num_frames} are needed"
        )
    pixels = torch.stack(frames).permute(0, 3, 1, 2)
    rows, columns = pixels.shape[2:]
    if (rows, columns) != (height, width):
        scale = max(height / rows, width / columns)
        size = (
            max(height, math.ceil(rows * scale - 1e-6)),
            max(width, math.ceil(columns * scale - 1e-6)),
        )
        pixels = (
            F.interpolate(pixels.float(), size=size, mode="bicubic", antialias=True)
            .round()
            .clamp(0, 255)
        )
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        pixels = pixels[:, :, top : top + height, left : left + width].to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()
