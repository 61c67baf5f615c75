"""Ten kinds of bad videos: each costs its row, none the run, and what is sound stays sound."""

from __future__ import annotations

import csv
import json
import signal
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from common.files import read_jsonl
from common.video_io import write_mp4
from launch.training.rm_data import checked
from rm import video_check
from rm.data import Pair
from rm.video_check import VideoChecker, bad_videos, split_pairs
from tests.fakes import decoder_with_a_trap
from tests.launch.processes import run
from tests.rm.cold_start_runs import write_data


def noise(frames: int, side: int = 32) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(
        0, 256, (frames, side, side, 3), dtype=torch.uint8, generator=draw
    )


def sound_only(path: Path) -> None:
    """An mp4 with a voice and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


def odd_size(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 33, 35, "yuv444p"
        frames = [
            av.VideoFrame.from_ndarray(f.copy(), format="rgb24")
            for f in noise(8, side=35)[:, :, :33].numpy()
        ]
        for packet in [p for frame in frames for p in stream.encode(frame)] + list(
            stream.encode(None)
        ):
            container.mux(packet)


def claims(path: Path, source: bytes, side: int) -> None:
    """The same bytes under a header that claims ``side`` pixels each way."""
    changed = bytearray(source)
    at = source.index(b"avc1") + 4 + 24  # VisualSampleEntry: width and height
    changed[at : at + 4] = side.to_bytes(2, "big") * 2
    path.write_bytes(bytes(changed))


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("videos")
    write_mp4(root / "good.mp4", noise(8), 8.0)
    write_mp4(root / "one_frame.mp4", noise(1), 8.0)
    odd_size(root / "odd.mp4")
    whole = (root / "good.mp4").read_bytes()
    (root / "empty.mp4").touch()
    (root / "text.mp4").write_text("this is no video\n" * 100)
    moov = whole.index(b"moov") - 4
    (root / "no_moov.mp4").write_bytes(
        whole[:moov] + whole[moov + int.from_bytes(whole[moov : moov + 4], "big") :]
    )
    (root / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "garbled.mp4").write_bytes(whole[:60] + bytes(200) + whole[260:])
    sound_only(root / "audio.mp4")
    claims(root / "huge.mp4", whole, 20_000)
    return {path.stem: path for path in root.iterdir()} | {
        "missing": root / "missing.mp4"
    }


def test_bad_videos_are_reported_and_odd_ones_accepted(videos: dict[str, Path]) -> None:
    found = {
        path.stem: why for path, why in bad_videos(videos.values(), workers=2).items()
    }
    assert set(found) == {
        "empty",
        "text",
        "no_moov",
        "truncated",
        "garbled",
        "audio",
        "missing",
    }
    assert set(videos) - set(found) == {
        "good",
        "one_frame",
        "odd",
        "huge",
    }  # its frames say their own size
    assert "such" in found["missing"]
    assert found["empty"] == "0 bytes"
    assert "decoded" in found["text"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("trap and os.kill(os.getpid(), 11)", "died with exit code -11"),
        ("trap and time.sleep(60)", "did not answer within 1 s"),
    ],
)
def test_dead_or_hanging_decoder_loses_a_single_file(
    body: str, says: str, tmp_path: Path, monkeypatch
) -> None:
    decoder_with_a_trap(tmp_path, body, monkeypatch)
    for name in ("a.mp4", "trap.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"x")
    began = time.monotonic()
    with VideoChecker(deadline_s=1.0) as checker:
        found = {
            name: checker.problem(tmp_path / name)
            for name in ("a.mp4", "trap.mp4", "b.mp4")
        }
    assert found["a.mp4"] == found["b.mp4"] == ""
    assert says in found["trap.mp4"]
    assert time.monotonic() - began < 30


def test_decoder_ends_when_its_parent_is_killed(videos: dict[str, Path]) -> None:
    program = f"""
import os, signal
from pathlib import Path
from rm.video_check import VideoChecker
checker = VideoChecker()
assert checker.problem(Path({str(videos["good"])!r})) == ""
print(checker._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = run(sys.executable, "-c", program, expect=-signal.SIGKILL)
    stat = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 30
    # An ended process whose new parent does not wait for it is a zombie.
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_pair_with_a_bad_video_is_bad(videos: dict[str, Path]) -> None:
    pairs = [
        Pair("p", videos["good"], videos["odd"], "", "", 1, line=2),
        Pair("q", videos["good"], videos["text"], "", "", 1, line=3),
    ]
    sound, records = split_pairs(pairs, {videos["text"]: "no video"})
    assert sound == pairs[:1]
    assert records == [
        {"line": 3, "prompt": "q", "problems": {str(videos["text"]): "no video"}}
    ]


@pytest.mark.long
def test_run_drops_bad_pairs_or_does_not_start(tmp_path: Path) -> None:
    """One video of eight is a text: 25 % of the pairs."""
    write_data(tmp_path)
    (tmp_path / "1B.mp4").write_text("no video")
    words = [
        "launch/cold_start.py",
        f"base={tmp_path / 'base'}",
        f"data.train={tmp_path / 'pairs.csv'}",
    ]
    words += [
        "data.heldout=null",
        "cold_start.pairs_per_step=2",
        "cold_start.micro_batch=1",
        "cold_start.epochs=1",
    ]
    words += [f"run_dir={tmp_path / 'run'}", "lora.rank=4", "dtype=float32"]
    done = run(sys.executable, *words, expect=2)
    assert "1 of 3" in done.stdout
    assert "data.max_bad_share=0.05" in done.stderr
    held = [
        f"data.heldout={tmp_path / 'pairs.csv'}",
        "data.limit=1",
    ]  # of the training pairs: the first is sound
    done = run(sys.executable, *words, *held, expect=2)
    assert "held-out" in done.stderr
    assert "data.max_bad_share=0.05" in done.stderr
    run(sys.executable, *words, "data.max_bad_share=0.5")
    (record,) = read_jsonl(tmp_path / "run" / "bad_samples.jsonl")
    assert (record["of"], record["line"], record["prompt"]) == ("pairs", 3, "p1")
    assert "decoded" in record["problems"][str(tmp_path / "1B.mp4")]
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    known = json.loads((tmp_path / "run" / "checked_videos.json").read_text())
    assert list(known["bad"]) == [str(tmp_path / "1B.mp4")]


def test_checked_videos_are_cached_until_changed(
    videos: dict[str, Path], tmp_path: Path, monkeypatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        video_check,
        "bad_videos",
        lambda files: asked.append(len(files)) or {videos["text"]: "no video"},
    )
    mine = tmp_path / "mine.mp4"
    mine.write_bytes(videos["good"].read_bytes())
    files = [mine, videos["text"]]
    assert (
        checked(files, str(tmp_path))
        == checked(files, str(tmp_path))
        == {videos["text"]: "no video"}
    )
    assert asked == [2]
    mine.write_bytes(b"other")
    checked(files, str(tmp_path))
    checked(files[:1], str(tmp_path))
    assert asked == [2, 2, 1]


@pytest.mark.slow
def test_table_with_many_bad_rows_is_refused(tmp_path: Path) -> None:
    """One of four rows says what nobody could mean."""
    write_data(tmp_path)
    rows = list(csv.DictReader((tmp_path / "pairs.csv").open(encoding="utf-8")))
    rows[1]["GSB"] = "better"
    with (tmp_path / "pairs.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    words = [
        "launch/cold_start.py",
        f"base={tmp_path / 'base'}",
        f"data.train={tmp_path / 'pairs.csv'}",
    ]
    done = run(
        sys.executable,
        *words,
        f"run_dir={tmp_path / 'run'}",
        "data.heldout=null",
        expect=2,
    )
    assert "1 of 4" in done.stderr
    assert "data.max_bad_share=0.05" in done.stderr
    assert "pairs.csv:3: " in done.stderr
