"""mp4 files: what is written is what another decoder reads."""

from __future__ import annotations

import random
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from common.video_io import read_frames, write_mp4
from toy.world import random_attributes, random_scene, render


def smooth_video(frames: int = 9, side: int = 32) -> torch.Tensor:
    """Grey ramps that move: no chroma detail, so halving the chroma loses nothing."""
    ramp = torch.linspace(40, 215, side)
    grey_TYX = torch.stack(
        [(ramp[None, :] + ramp[:, None]) / 2 + t for t in range(frames)]
    )
    return (
        grey_TYX.round().to(torch.uint8)[..., None].expand(-1, -1, -1, 3).contiguous()
    )


@pytest.mark.slow
def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    """x264's default look-ahead gave several versions of 10 of 64 such clips."""
    rng = random.Random(0)
    scenes = [random_scene(random_attributes(rng), rng) for _ in range(48)]
    for video_TYXC in render(scenes):
        written = set()
        for _ in range(16):  # other memory around the frames each time
            torch.randint(0, 255, (rng.randrange(1000, 400_000),), dtype=torch.uint8)
            write_mp4(tmp_path / "a.mp4", video_TYXC.clone(), 8.0)
            written.add((tmp_path / "a.mp4").read_bytes())
        assert len(written) == 1


@pytest.mark.parametrize("fps", [8.0, 16.0, 23.976])
def test_frames_and_rate_come_back(tmp_path: Path, fps: float) -> None:
    video_TYXC = smooth_video()
    write_mp4(tmp_path / "a.mp4", video_TYXC, fps)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == (
            "h264",
            "yuv420p",
        )
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
        frames = np.stack(
            [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        )
    assert frames.shape == tuple(video_TYXC.shape)
    assert np.abs(frames.astype(int) - video_TYXC.numpy()).mean() < 1.5


def test_flat_colours_survive(tmp_path: Path) -> None:
    for color in ([255, 0, 0], [0, 128, 255], [90, 200, 60]):
        video_TYXC = (
            torch.tensor(color, dtype=torch.uint8).expand(4, 16, 16, 3).contiguous()
        )
        write_mp4(tmp_path / "c.mp4", video_TYXC, 8.0)
        with av.open(str(tmp_path / "c.mp4")) as container:
            frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
        assert np.abs(frame.astype(int) - np.array(color)).max() <= 4


def test_lower_crf_has_smaller_error(tmp_path: Path) -> None:
    noise = (
        torch.randint(0, 256, (4, 32, 32, 1), dtype=torch.uint8)
        .expand(-1, -1, -1, 3)
        .contiguous()
    )
    errors = []
    for crf in (1, 12, 40):
        write_mp4(tmp_path / "n.mp4", noise, 8.0, crf=crf)
        with av.open(str(tmp_path / "n.mp4")) as container:
            frames = np.stack(
                [
                    frame.to_ndarray(format="rgb24")
                    for frame in container.decode(video=0)
                ]
            )
        errors.append(np.abs(frames.astype(int) - noise.numpy()).mean())
    assert errors == sorted(errors)
    assert errors[2] > 4 * errors[0]


@pytest.mark.parametrize(
    ("video", "options", "message"),
    [
        (torch.zeros(2, 16, 16, 3), {}, "uint8"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), {}, "uint8"),
        (
            torch.zeros(2, 16, 15, 3, dtype=torch.uint8),
            {},
            "16x15",
        ),
        (torch.zeros(2, 16, 16, 3, dtype=torch.uint8), {"fps": 0.0}, "fps"),
        (torch.zeros(2, 16, 16, 3, dtype=torch.uint8), {"crf": 52}, "crf"),
    ],
)
def test_write_mp4_with_invalid_input_raises(
    tmp_path: Path, video: torch.Tensor, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_mp4(tmp_path / "x.mp4", video, **{"fps": 8.0, **options})


# ------------------------------------------------------------------ reading


def counted_video(frames: int, height: int = 32, width: int = 32) -> torch.Tensor:
    """Frame t is grey of 20 t + 30."""
    grey_T = 20 * torch.arange(frames) + 30
    return (
        grey_T[:, None, None, None]
        .expand(-1, height, width, 3)
        .to(torch.uint8)
        .contiguous()
    )


def greys(video_TYXC: torch.Tensor) -> list[int]:
    """Which of `counted_video`'s frames these are."""
    return [round((float(frame.float().mean()) - 30) / 20) for frame in video_TYXC]


@pytest.mark.parametrize(
    ("fps", "frames"),
    [
        (8.0, [0, 1, 2, 3, 4, 5, 6, 7]),  # the file's own rate
        (4.0, [0, 2, 4, 6, 8]),
        (16.0, [0, 0, 1, 1, 2, 2, 3, 3]),  # shown for two
        (6.0, [0, 1, 2, 4, 5]),  # 0, 1.33, 2.67, 4, 5.33
    ],
)
def test_frames_at_a_rate(tmp_path: Path, fps: float, frames: list[int]) -> None:
    write_mp4(tmp_path / "a.mp4", counted_video(10), 8.0)
    found = read_frames(
        tmp_path / "a.mp4", num_frames=len(frames), fps=fps, height=32, width=32
    )
    assert found.dtype == torch.uint8
    assert greys(found) == frames


def test_the_last_frame_is_shown_as_long_as_the_others(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", counted_video(3), 8.0)
    size = {"height": 32, "width": 32}
    assert greys(read_frames(tmp_path / "a.mp4", num_frames=6, fps=16.0, **size)) == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    with pytest.raises(ValueError, match=r"a\.mp4"):
        read_frames(tmp_path / "a.mp4", num_frames=7, fps=16.0, **size)


def test_scaled_to_cover_and_cropped_around_the_middle(tmp_path: Path) -> None:
    """64 x 32: a white left half, a black right one; of the middle square, half is white."""
    video = torch.zeros(3, 32, 64, 3, dtype=torch.uint8)
    video[:, :, :32] = 255
    write_mp4(tmp_path / "a.mp4", video, 8.0)
    found = read_frames(tmp_path / "a.mp4", num_frames=3, fps=8.0, height=16, width=16)
    assert tuple(found.shape) == (3, 16, 16, 3)
    assert float(found[:, :, :7].float().mean()) > 240
    assert float(found[:, :, 9:].float().mean()) < 15
    whole = read_frames(tmp_path / "a.mp4", num_frames=3, fps=8.0, height=16, width=32)
    assert float(whole[:, :, :15].float().mean()) > 240


def test_read_frames_of_invalid_video_raises(tmp_path: Path) -> None:
    (tmp_path / "b.mp4").write_bytes(b"nothing of the kind")
    for name in ("b.mp4", "gone.mp4"):
        with pytest.raises(ValueError, match=name):
            read_frames(tmp_path / name, num_frames=1, fps=8.0, height=16, width=16)
