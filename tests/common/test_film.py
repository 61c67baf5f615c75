"""Odd films: every entry point reads the frames that ffmpeg's own decoder shows."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import common.film
from alignment.rewards import wire
from common.film import Film, VideoError
from common.video_io import read_frames, write_mp4
from launch.evaluation.files import ScoreItem, read_clip
from rm.video import frame_indices, read_video
from tests.common.film_cases import (
    CASES,
    SHARED,
    FilmCase,
    difference,
    ffmpeg,
    run_ffmpeg,
    show,
)
from tests.tiny_qwen import SETTINGS

# Formats that a reward server takes under the name of mp4.
MP4 = (".mp4", ".mov", ".m4v", ".3gp")
# Grey levels, of the means of 8 x 8 pixels.
LIMIT = 2.0
FILMS = [
    pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])
    for case in CASES
]


def make(name: str, folder: Path) -> Path:
    (case,) = (case for case in CASES if case.name == name)
    return case.make(folder)


def from_server(path: Path) -> wire.VideoItem:
    """The film as a reward server reads it."""
    content = base64.b64encode(path.read_bytes()).decode()
    request = {"model": "m", "prompts": ["p"], "videos": [{"mp4": content}]}
    body = json.dumps(request).encode()
    (item,) = wire.decode_request(body, wire.JSON, wire.RequestLimits(512, 1)).items
    return item


@pytest.mark.parametrize("case", FILMS)
def test_every_entry_point_reads_what_ffmpeg_shows(
    case: FilmCase, tmp_path: Path
) -> None:
    path = case.make(tmp_path)
    want = show(path, case.shown)

    # The rate: as many frames as are shown, in the time that they take.
    clip = read_clip(ScoreItem(path.name, path, ""), max_frames=512)
    count = len(want.frames)
    assert len(clip.video_TYXC) == count
    if count > 1:
        step = want.times[-1] - want.times[-2]
        assert clip.fps == pytest.approx(count / (want.times[-1] + step), rel=0.02)

    # Scoring: the frame on the screen at k / fps; files round times to 1 ms.
    def on_screen(seconds: np.ndarray) -> np.ndarray:
        return np.searchsorted(want.times, seconds + 0.0015, side="right") - 1

    shown = np.arange(count)
    if case.name.startswith("uneven"):
        shown = on_screen(shown / clip.fps)
    assert difference(clip.video_TYXC.numpy(), want.frames[shown]) <= LIMIT

    # Training of DeScore: the same frames, sampled.
    sampled = read_video(path, SETTINGS)
    indices = frame_indices(count, clip.fps, SETTINGS)
    assert torch.equal(sampled.frames_TYXC, clip.video_TYXC[indices])
    assert sampled.times == pytest.approx([i / clip.fps for i in indices])

    # A table of pairs: at another rate.
    seconds = np.arange(min(8, int(11 * count / clip.fps - 0.1) + 1)) / 11
    height, width = want.frames.shape[1:3]
    at_11 = read_frames(
        path, num_frames=len(seconds), fps=11.0, height=height, width=width
    )
    places = on_screen(seconds)
    if case.name.startswith("jitter"):
        places = np.round(seconds * clip.fps - 0.49).astype(int)
    assert difference(at_11.numpy(), want.frames[places]) <= LIMIT

    # A reward server.
    if path.suffix in MP4:
        item = from_server(path)
        assert torch.equal(item.video_TYXC, clip.video_TYXC)
        assert item.fps == pytest.approx(clip.fps)


# ------------------------------------------------------------------ parts of a film


@pytest.mark.parametrize(
    "name",
    [
        "long.mp4",
        "cut_twice.mp4",
        "hevc_open.mp4",
        "plain.ts",
        "uneven.mkv",
        pytest.param("cut.mp4", marks=pytest.mark.slow),
        pytest.param("open_gop.mp4", marks=pytest.mark.slow),
        pytest.param("vp9.mp4", marks=pytest.mark.slow),
        pytest.param("av1.mp4", marks=pytest.mark.slow),
        pytest.param("intra_refresh.mp4", marks=pytest.mark.slow),
        pytest.param("repeated_headers.mkv", marks=pytest.mark.slow),
        pytest.param("xvid.avi", marks=pytest.mark.slow),
    ],
)
def test_frame_read_alone_has_the_bits_of_the_whole_film(
    name: str, tmp_path: Path
) -> None:
    film = Film(make(name, tmp_path))
    whole = film.frames(range(film.count))
    for index in range(film.count):
        (alone,) = film.frames([index])
        assert torch.equal(alone, whole[index])
    # An order of the caller's, and a frame twice.
    assert torch.equal(film.frames([5, 2, 5]), whole[[5, 2, 5]])


@pytest.mark.parametrize(
    ("name", "most"),
    [
        # A key frame each 12: the film's first frame, and at most 12 of the part; the decoder
        # gives up to 4 more while it reorders.
        ("long.mp4", 16),
        # Key frames that are no entries: everything before the frame.
        ("open_gop.mp4", 24),
        ("plain.ts", 24),
    ],
)
def test_one_frame_decodes_only_from_the_entry_before_it(
    name: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    film = Film(make(name, tmp_path))
    decoded = []
    real = common.film._frames_of

    def count(packet):
        for frame in real(packet):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(common.film, "_frames_of", count)
    film.frames([film.count - 1])
    assert len(decoded) <= most
    assert (len(decoded) <= 16) == (name == "long.mp4")


@pytest.mark.slow
def test_few_frames_of_a_long_film_need_little_memory(tmp_path: Path) -> None:
    """900 frames of 640 x 360 are 622 MB of RGB."""
    words = "-f lavfi -i testsrc2=s=640x360:r=30:d=30 -c:v libx264 -preset ultrafast"
    run_ffmpeg([*words.split(), str(tmp_path / "a.mp4")])
    reader = (
        "import resource, sys, torch\n"
        "from common.film import Film\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "Film(sys.argv[1]).frames([0, 300, 899])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    from tests.launch.processes import run

    done = run("python", "-c", reader, str(tmp_path / "a.mp4"))
    assert int(done.stdout) < 120_000


# ------------------------------------------------------------------ damaged films


@pytest.mark.parametrize(
    "name",
    [
        "index_first.mp4",
        "fragmented.mp4",
        "plain.mkv",
        "vp9.webm",
        "plain.flv",
        "plain.avi",
    ],
)
@pytest.mark.parametrize("share", [0.55, 0.8])
def test_film_that_is_cut_off_raises(name: str, share: float, tmp_path: Path) -> None:
    path = make(name, tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(VideoError, match=name):
        Film(path).check(512)


@pytest.mark.parametrize("name", ["index_first.mp4", "plain.ts"])
def test_film_with_lost_bytes_raises(name: str, tmp_path: Path) -> None:
    path = make(name, tmp_path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    path.write_bytes(bytes(content))
    with pytest.raises(VideoError, match=name):
        Film(path).check(512)


def test_film_without_a_picture_raises(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    words = f"-f lavfi -t 1 -i sine {SHARED['still']} -map 0 -map 1 -c:a aac -c:v mjpeg"
    run_ffmpeg([*words.split(), "-disposition:v:0", "attached_pic", str(path)])
    with pytest.raises(VideoError, match=r"song\.mp4"):
        Film(path)


def test_film_that_is_turned_askew_raises(tmp_path: Path) -> None:
    straight = make("plain.mp4", tmp_path)
    words = f"-display_rotation 30 -i {straight} -c copy {tmp_path / 'askew.mp4'}"
    run_ffmpeg(words.split())
    with pytest.raises(VideoError, match=r"askew\.mp4.* 90 "):
        Film(tmp_path / "askew.mp4").check(1)


def test_film_with_too_many_frames_raises_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make("long.mp4", tmp_path)
    monkeypatch.setattr(common.film, "_frames_of", None)
    with pytest.raises(VideoError, match="47"):
        Film(path, max_frames=47)


# ------------------------------------------------------------------ further kinds


def test_name_with_a_colon_needs_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make("colon:a.mp4", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert Film("colon:a.mp4").count == 24


def test_one_frame_is_a_film_at_every_entry_point(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    write_mp4(path, torch.full((1, 32, 32, 3), 90, dtype=torch.uint8), 8.0)
    clip = read_clip(ScoreItem("a.mp4", path, ""), max_frames=16)
    assert (len(clip.video_TYXC), clip.fps) == (1, 8.0)
    trained = read_video(path, SETTINGS)
    assert trained.times == (0.0,)
    pair = read_frames(path, num_frames=1, fps=8.0, height=32, width=32)
    for frames in (trained.frames_TYXC, pair, from_server(path).video_TYXC):
        assert torch.equal(frames, clip.video_TYXC)


def test_film_that_changes_its_size_keeps_that_of_its_start(tmp_path: Path) -> None:
    joined = b""
    for size in ("96x64", "128x64"):
        path = tmp_path / f"{size}.h264"
        words = f"-f lavfi -i testsrc2=s={size}:r=24:d=0.5 {SHARED['h264']} {path}"
        run_ffmpeg(words.split())
        joined += path.read_bytes()
    (tmp_path / "joined.h264").write_bytes(joined)
    film = Film(tmp_path / "joined.h264")
    assert tuple(film.frames(range(24)).shape) == (24, 64, 96, 3)


def test_ffmpeg_is_there() -> None:
    assert Path(ffmpeg()).is_file()
