"""Videos as mp4 files, written in process with PyAV: no ffmpeg binary, a few milliseconds for a small clip."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def write_mp4(path: str | Path, video_TYXC: Tensor, fps: float, *, crf: int = 12) -> None:
    """Write uint8 RGB frames (T, Y, X, 3) as H.264, yuv420p, which every browser plays.

    The same frames give the same bytes. crf is x264's quality: 0 is almost lossless, 12 can hardly be told from the
    source, 23 is what the web uses.
    Raises ValueError for another dtype or shape, an odd height or width (chroma is halved), fps <= 0 or a crf outside
    0..51.
    """
    import av

    shape = tuple(video_TYXC.shape)
    if str(video_TYXC.dtype) != "torch.uint8" or len(shape) != 4 or shape[0] < 1 or shape[3] != 3:
        raise ValueError(f"write_mp4 needs uint8 frames (T, Y, X, 3), got {video_TYXC.dtype} {shape}")
    if shape[1] % 2 or shape[2] % 2:
        raise ValueError(f"write_mp4 needs an even height and width, got {shape[1]}x{shape[2]}")
    if not fps > 0 or not 0 <= crf <= 51:
        raise ValueError(f"write_mp4 needs fps > 0 and 0 <= crf <= 51, got fps={fps} and crf={crf}")
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1" if shape[1] * shape[2] < 128 * 128 else "0"}
    # with macroblock-tree look-ahead, x264's AVX-512 code writes other bytes each time for frames 32 pixels wide
    options["x264-params"] = "mbtree=0"
    with av.open(str(path), mode="w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width, stream.pix_fmt = shape[1], shape[2], "yuv420p"
        for frame_YXC in video_TYXC.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_YXC, format="rgb24")))
        container.mux(stream.encode())
