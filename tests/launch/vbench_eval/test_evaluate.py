"""launch/evaluate.py vbench: a stand-in for VBench (tests/fakes_vbench) judges, all else is real."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import evaluate
from launch.evaluation.results_table import read_rows
from launch.vbench_eval.suite import DIMENSIONS, read_suite
from tests.launch.processes import ROOT, torchrun

FAKE = ROOT / "tests" / "fakes_vbench"
SUITE = read_suite(FAKE / "vbench" / "VBench_full_info.json")
DANCE = "A person is dancing"


def film(folder: Path, number: float, *, moving: int = 0) -> Path:
    """All videos of the suite, each saying the same; the first ``moving`` of 25 for temporal_flickering do not."""
    folder.mkdir()
    for video in SUITE.videos(SUITE.prompts(), each=5, flickering=25):
        (folder / video.name).write_text(f"{number}")
    names = sorted(path.name for path in folder.glob("In a still frame*"))
    for name in names[:moving]:
        (folder / name).write_text("moving")
    return folder


def evaluated(
    out: Path, videos: dict[str, Path], *words: str, expect: int = 0
) -> dict[str, Any]:
    folders = [f"videos.{model}={folder}" for model, folder in videos.items()]
    settings = [f"out={out}", "device=cpu", f"env.PYTHONPATH={FAKE}", *folders, *words]
    if expect:
        with pytest.raises(SystemExit) as exit_:
            evaluate.main(["vbench", *settings])
        assert exit_.value.code == expect
    else:
        evaluate.main(["vbench", *settings])
    return json.loads((out / "summary.json").read_text()) if expect < 2 else {}


def cells(out: Path, name: str) -> list[str]:
    line = next(
        one
        for one in (out / "table.md").read_text().splitlines()
        if one.startswith(f"| {name} |")
    )
    return line.strip("| ").split(" | ")[1:]


def test_base_beside_tuned_in_one_table(tmp_path: Path) -> None:
    """Every video scores 0.5 and 0.9; quality, semantic and total by hand from VBench's limits and weights."""
    videos = {"base": film(tmp_path / "b", 0.5), "tuned": film(tmp_path / "t", 0.9)}
    found = evaluated(tmp_path / "out", videos)
    assert found["models"]["base"]["scene"] == 0.5
    quality = {
        value: ((value - 0.1462) / 0.8538 + (value - 0.2615) / 0.7385 + (value - 0.6293) / 0.3707
                + (value - 0.706) / 0.2915 + 0.5 * value + 2 * value) / 6.5
        for value in (0.5, 0.9)
    }  # fmt: skip
    semantic = {
        value: (
            5 * value + value / 0.8222 + (value - 0.0009) / 0.2846 + 2 * value / 0.364
        )
        / 9
        for value in (0.5, 0.9)
    }
    for model, value in (("base", 0.5), ("tuned", 0.9)):
        one = found["models"][model]
        assert one["quality"] == pytest.approx(quality[value])
        assert one["semantic"] == pytest.approx(semantic[value])
        assert one["total"] == pytest.approx(
            0.8 * quality[value] + 0.2 * semantic[value]
        )
    assert cells(tmp_path / "out", "scene") == ["0.5000", "0.9000", "+0.4000"]
    assert cells(tmp_path / "out", "quality") == [
        f"{quality[0.5]:.4f}", f"{quality[0.9]:.4f}", f"{quality[0.9] - quality[0.5]:+.4f}"
    ]  # fmt: skip
    assert (
        "NOT VBench's standard prompts" in (tmp_path / "out" / "table.md").read_text()
    )
    rows = read_rows(tmp_path / "out" / "tuned" / "results.jsonl")
    assert [row["dimension"] for row in rows] == list(DIMENSIONS)
    assert all((row["found"], row["wanted"]) == (5, 5) for row in rows)


def test_a_dimension_that_fails_is_not_run_and_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    videos = {"base": film(tmp_path / "b", 0.5)}
    only = "dimensions=[scene,color,imaging_quality]"
    found = evaluated(
        tmp_path / "out", videos, only, "env.FAKE_VBENCH=die:color", expect=1
    )
    assert found["models"]["base"]["color"] is None
    assert cells(tmp_path / "out", "color") == ["not run"]
    assert cells(tmp_path / "out", "scene") == ["0.5000"]
    assert cells(tmp_path / "out", "human action") == ["not run"]
    assert (
        "base, color: not run, ModuleNotFoundError: No module named 'detectron2'"
        in found["notes"][1]
    )
    capsys.readouterr()
    assert evaluated(tmp_path / "out", videos, only)["models"]["base"]["color"] == 0.5
    assert "base: 1 of 3 dimensions to judge" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["nan", "percent"])
def test_what_is_no_score_is_not_run(tmp_path: Path, fault: str) -> None:
    words = ["dimensions=[scene,color]", f"env.FAKE_VBENCH={fault}:color"]
    found = evaluated(
        tmp_path / "out", {"base": film(tmp_path / "b", 0.5)}, *words, expect=1
    )
    assert found["models"]["base"] == {
        "scene": 0.5,
        "color": None,
        "quality": None,
        "semantic": None,
        "total": None,
    }
    assert "which is none" in found["notes"][1]


def test_missing_videos_are_counted_by_dimension_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = film(tmp_path / "b", 0.5)
    for i in (1, 3):
        (folder / f"{DANCE}-{i}.mp4").unlink()
    (folder / "In a still frame, a stop sign-24.mp4").unlink()
    evaluated(tmp_path / "out", {"base": folder}, expect=2)
    said = capsys.readouterr().err
    assert f"base.human_action: 2 of 5, first '{DANCE}-1.mp4'" in said
    assert (
        "base.temporal_flickering: 1 of 25, first 'In a still frame, a stop sign-24.mp4'"
        in said
    )
    assert "scene" not in said
    assert not (tmp_path / "out" / "base").exists()

    words = ["missing=leave_out", "dimensions=[human_action,scene]"]
    found = evaluated(tmp_path / "out", {"base": folder}, *words)
    assert found["models"]["base"] == {
        "human_action": None, "scene": 0.5, "quality": None, "semantic": None, "total": None
    }  # fmt: skip
    assert "base, human_action: not run, 2 videos are not there." in found["notes"]
    evaluated(
        tmp_path / "unfiltered",
        {"base": folder},
        "static_filter=false",
        "dimensions=[temporal_flickering]",
    )


def test_flickering_is_judged_on_static_videos_only(tmp_path: Path) -> None:
    """Of 25 videos 22 move: three are static, and VBench's filter renames them 0, 1, 2."""
    videos = {
        "base": film(tmp_path / "b", 0.7, moving=22),
        "tuned": film(tmp_path / "t", 0.8, moving=3),
    }
    found = evaluated(tmp_path / "out", videos, "dimensions=[temporal_flickering]")
    assert [
        found["models"][model]["temporal_flickering"] for model in videos
    ] == pytest.approx([0.7, 0.8])
    base, tuned = (
        read_rows(tmp_path / "out" / model / "results.jsonl")[0] for model in videos
    )
    assert (base["with_static"], base["found"], base["wanted"]) == (0, 3, 5)
    assert (tuned["with_static"], tuned["found"], tuned["wanted"]) == (1, 5, 5)
    assert (
        "base, temporal_flickering: 0 of 1 prompts have 5 static videos; 3 of 5 were judged."
        in found["notes"]
    )
    found = evaluated(tmp_path / "none", {"base": film(tmp_path / "n", 0.7, moving=25)},
                      "dimensions=[temporal_flickering]", expect=1)  # fmt: skip
    assert found["models"]["base"]["temporal_flickering"] is None


def test_other_videos_are_judged_again_and_others_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = film(tmp_path / "b", 0.5)
    only = "dimensions=[scene,color,human_action]"
    evaluated(tmp_path / "out", {"base": folder}, only)
    for i in range(5):
        (folder / f"{DANCE}-{i}.mp4").write_text("0.75")
    capsys.readouterr()
    found = evaluated(tmp_path / "out", {"base": folder}, only)
    assert found["models"]["base"]["human_action"] == 0.75
    assert "base: 1 of 3 dimensions to judge" in capsys.readouterr().out
    more = {"base": folder, "tuned": film(tmp_path / "t", 0.6)}
    evaluated(tmp_path / "out", more, only)
    said = capsys.readouterr().out
    assert "base: 0 of 3" in said
    assert "tuned: 3 of 3" in said
    evaluated(
        tmp_path / "out",
        more,
        only,
        "options.imaging_quality_preprocessing_mode=shorter",
        expect=2,
    )


def test_a_file_that_is_no_video_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The stand-in, like VBench, takes the ending of the first name it sees for that of all."""
    folder = film(tmp_path / "b", 0.5)
    (folder / "samples.jsonl").write_text("")
    evaluated(tmp_path / "out", {"base": folder}, expect=2)
    assert "'samples.jsonl'" in capsys.readouterr().err


def test_without_the_package_the_error_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "empty").mkdir()
    bare = Path(sys.base_prefix) / "bin" / "python3"
    words = [f"out={tmp_path / 'out'}", f"videos.base={tmp_path / 'b'}"]
    for python, reason in (
        (bare, "has no package vbench"),
        ("no/such/python", "there is no interpreter"),
    ):
        with pytest.raises(SystemExit, match="2"):
            evaluate.main(["vbench", *words, f"python={python}"])
        said = capsys.readouterr().err
        assert reason in said
        assert "pip install torch torchvision vbench==0.1.5" in said


@pytest.mark.skipif(
    "VBENCH_PATH" not in os.environ,
    reason="VBENCH_PATH names no folder with vbench and torchvision",
)
def test_the_real_package_judges_flickering(tmp_path: Path) -> None:
    """Its one dimension without weights: 1 - MEAN |frame - the one before| / 255 over pixels, frames, then videos."""
    import cv2
    import numpy as np
    import torch

    from common.video_io import write_mp4

    (tmp_path / "v").mkdir()
    draw, wanted = torch.Generator().manual_seed(0), []
    for i in range(5):
        video = torch.randint(0, 256, (4, 32, 32, 3), generator=draw, dtype=torch.uint8)
        write_mp4(tmp_path / "v" / f"In a still frame, a stop sign-{i}.mp4", video, 8)
        reader = cv2.VideoCapture(
            str(tmp_path / "v" / f"In a still frame, a stop sign-{i}.mp4")
        )
        frames = np.stack([reader.read()[1].astype(float) for _ in range(4)])
        wanted.append(1 - np.abs(frames[1:] - frames[:-1]).mean() / 255)
    words = [
        f"out={tmp_path / 'out'}",
        f"videos.base={tmp_path / 'v'}",
        f"info={SUITE.path}",
        "device=cpu",
    ]
    words += [
        "static_filter=false",
        "dimensions=[temporal_flickering]",
        f"env.PYTHONPATH={os.environ['VBENCH_PATH']}",
    ]
    evaluate.main(["vbench", *words])
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["models"]["base"]["temporal_flickering"] == pytest.approx(
        float(np.mean(wanted)), abs=1e-6
    )
    assert found["vbench"] == "0.1.5"


@pytest.mark.slow
def test_two_ranks_share_the_dimensions(tmp_path: Path) -> None:
    words = [
        f"out={tmp_path / 'out'}",
        "device=cpu",
        f"env.PYTHONPATH={FAKE}",
        "dimensions=[scene,color,object_class]",
    ]
    torchrun(
        2,
        str(ROOT / "launch" / "evaluate.py"),
        "vbench",
        *words,
        f"videos.base={film(tmp_path / 'b', 0.5)}",
    )
    rows = read_rows(tmp_path / "out" / "base" / "results.jsonl")
    assert [(row["dimension"], row["score"]) for row in rows] == [
        ("scene", 0.5),
        ("color", 0.5),
        ("object_class", 0.5),
    ]
    assert cells(tmp_path / "out", "object class") == ["0.5000"]
