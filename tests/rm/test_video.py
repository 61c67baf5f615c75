"""Videos: golden values of transformers' own processor, sampling by hand, one decode a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import av
import pytest
import torch
from safetensors.torch import load_file

from common.film import Film
from common.video_io import write_mp4
from rm.config import VideoSettings
from rm.video import (
    VideoError,
    frame_indices,
    patch_times,
    prepare,
    preprocess,
    read_video,
    sample_clip,
    smart_resize,
)
from tests.tiny_qwen import SETTINGS, random_frames

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "qwen3vl_video.json").read_text())["cases"]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['T']}x{case['H']}x{case['W']}"
)
def test_patches_equal_the_golden_values(case):
    t, y, x, c = torch.meshgrid(
        *map(torch.arange, (case["T"], case["H"], case["W"], 3)), indexing="ij"
    )
    frames = ((7 * x + 13 * y + 29 * t + 57 * c + x * y // 5) % 256).to(torch.uint8)
    settings = VideoSettings(
        budget="video",
        min_pixels=case["size"]["shortest_edge"],
        max_pixels=case["size"]["longest_edge"],
    )
    found = preprocess(frames, settings)
    rows = load_file(GOLDEN / "qwen3vl_video.safetensors")[f"case{case['case']}_rows"]
    assert [list(found.grid)] == case["grid"]
    assert list(found.patches.shape) == case["shape"]
    torch.testing.assert_close(found.patches[case["rows"]], rows, atol=1e-6, rtol=0)
    assert found.patches.double().mean().item() == pytest.approx(case["mean"], abs=1e-6)
    assert found.patches.double().square().sum().item() == pytest.approx(
        case["sumsq"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("count", "fps", "want"),
    [
        (
            80,
            16.0,
            [0, 9, 18, 26, 35, 44, 53, 61, 70, 79],
        ),  # 5 s at 2 fps: 10 frames, 79 / 9 apart
        (16, 16.0, [0, 5, 10, 15]),  # 1 s at 2 fps would be 2: the minimum is 4
        (3, 16.0, [0, 1, 2]),  # shorter than the minimum: all of it
        (1, 16.0, [0]),
        (5, 2.0, [0, 1, 3, 4]),  # 2.5 s at 2 fps: 5 frames, rounded to a multiple of 2
    ],
)
def test_which_frames_are_seen(count, fps, want):
    assert frame_indices(count, fps, VideoSettings(fps=2.0)) == want


def test_long_videos_are_capped():
    indices = frame_indices(
        100_000, 25.0, VideoSettings(fps=2.0)
    )  # 4000 s would be 8000 frames
    assert len(indices) == 768
    assert indices[0] == 0
    assert indices[-1] == 99_999


def test_times_are_means_of_two_frames():
    assert patch_times((0.0, 0.25, 0.5, 0.75), 2) == (0.125, 0.625)
    assert patch_times((0.0, 0.25, 0.5), 2) == (
        0.125,
        0.5,
    )  # the last frame is repeated


def test_an_odd_clip_repeats_its_last_frame():
    frames = random_frames(0, frames=5)
    odd = preprocess(frames, SETTINGS)
    even = preprocess(torch.cat([frames, frames[-1:]]), SETTINGS)
    assert odd.grid == even.grid == (3, 4, 4)
    assert torch.equal(odd.patches, even.patches)


def test_a_patch_holds_its_pixels_in_merge_order():
    # No resize; a pixel value is its patch's number in reading order.
    number = torch.arange(16, dtype=torch.uint8).view(4, 4)
    frame = number.repeat_interleave(8, 0).repeat_interleave(8, 1)
    frames = frame.view(1, 32, 32, 1).expand(2, -1, -1, 3)
    patches = preprocess(frames, SETTINGS).patches
    seen = (patches[:, 0] * 127.5 + 127.5).round().int().tolist()
    assert seen == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_frame_budget_by_hand():
    # sqrt(480 * 832 / 200704) = 1.4106; 480 / 1.4106 = 340 -> 320; 832 / 1.4106 = 590 -> 576
    assert smart_resize(81, 480, 832, VideoSettings()) == (320, 576)
    assert smart_resize(2, 480, 832, VideoSettings()) == (
        320,
        576,
    )  # whatever the number of frames
    # sqrt(3136 / 32^2) = 1.75; 32 * 1.75 = 56 -> 64
    assert smart_resize(8, 20, 20, VideoSettings()) == (64, 64)
    with pytest.raises(VideoError, match=r"\b200\b"):
        smart_resize(8, 32, 32 * 201, VideoSettings())


def decoded_by_pyav(path: Path) -> torch.Tensor:
    with av.open(str(path)) as container:
        return torch.stack(
            [
                torch.from_numpy(f.to_ndarray(format="rgb24"))
                for f in container.decode(video=0)
            ]
        )


@pytest.mark.parametrize("width", [16, 24, 32, 48, 50, 64, 90, 130])
def test_pixels_are_those_of_another_decoder(width, tmp_path):
    draw = torch.Generator().manual_seed(width)
    write_mp4(
        tmp_path / "clip.mp4",
        torch.randint(0, 256, (4, 16, width, 3), generator=draw, dtype=torch.uint8),
        4.0,
    )
    assert torch.equal(
        read_video(tmp_path / "clip.mp4", SETTINGS).frames_TYXC,
        decoded_by_pyav(tmp_path / "clip.mp4"),
    )


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    write_mp4(path, random_frames(1, frames=9), 8.0)
    return path


def test_file_and_frames_are_sampled_equally(mp4, monkeypatch):
    everything = decoded_by_pyav(mp4)
    assert everything.shape == (9, 32, 32, 3)
    opened = []
    monkeypatch.setattr(
        Film,
        "frames",
        lambda *a, _real=Film.frames: opened.append(a) or _real(*a),
    )
    from_file, from_frames = (
        prepare(mp4, SETTINGS),
        prepare(everything, SETTINGS, fps=8.0),
    )
    assert len(opened) == 1
    assert torch.equal(from_file.patches, from_frames.patches)
    # 9 / 8 s at 4 fps is 4.5 frames -> 4 at 0, 3, 5, 8 (2.67 and 5.33 rounded):
    # means 1.5 / 8 and 6.5 / 8.
    assert from_file.times == from_frames.times == (0.1875, 0.8125)
    assert from_file.grid == (2, 4, 4)


def test_bad_video_files_raise(tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 100)
    with pytest.raises(VideoError, match=r"broken\.mp4"):
        read_video(broken, SETTINGS)
    with pytest.raises(VideoError, match=r"absent\.mp4"):
        read_video(tmp_path / "absent.mp4", SETTINGS)


def test_frames_need_their_rate_and_their_type():
    with pytest.raises(ValueError, match="fps"):
        prepare(random_frames(0), SETTINGS)
    with pytest.raises(ValueError, match="uint8"):
        sample_clip(random_frames(0).float(), 8.0, SETTINGS)
    with pytest.raises(ValueError, match=r"\b0\b"):
        sample_clip(random_frames(0)[:0], 8.0, SETTINGS)


def test_settings_travel_as_json(tmp_path):
    settings = VideoSettings(fps=3.0, mean=(0.1, 0.2, 0.3))
    settings.save(tmp_path / "video.json")
    assert VideoSettings.load(tmp_path / "video.json") == settings
    (tmp_path / "video.json").write_text('{"fsp": 2}')
    with pytest.raises(ValueError, match="fsp"):
        VideoSettings.load(tmp_path / "video.json")
    for wrong in (
        {"fps": 0},
        {"min_pixels": 9, "max_pixels": 8},
        {"min_frames": 0},
        {"mean": (0.5,)},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            VideoSettings(**wrong)


def test_normalisation_by_hand():
    settings = VideoSettings(
        patch_size=8,
        min_pixels=256,
        max_pixels=1024,
        mean=(0.5, 0.25, 0.0),
        std=(0.5, 0.5, 1.0),
    )
    frames = torch.tensor([255, 51, 102], dtype=torch.uint8).expand(2, 16, 16, 3)
    row = preprocess(frames, settings).patches[0].view(3, 2 * 8 * 8)[:, 0]
    assert row.tolist() == pytest.approx([1.0, (0.2 - 0.25) / 0.5, 0.4], abs=1e-6)
    assert math.isclose(row[1], -0.1, abs_tol=1e-6)
