"""VBench's prompts, file names and totals."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from launch.vbench_eval import suite as vbench_suite
from launch.vbench_eval.scores import QUALITY, SEMANTIC, markdown, normalised, totals
from launch.vbench_eval.suite import (
    DIMENSIONS,
    ENTRIES,
    FLICKERING,
    Suite,
    installed_info,
    read_rewritten,
    read_suite,
)

# dimensions share prompts like this in VBench 0.1.5: its prompts/README.md, "Evaluation Setting"
GROUPS = (
    ((FLICKERING,), 75),
    (("subject_consistency", "dynamic_degree", "motion_smoothness"), 72),
    (("scene", "background_consistency"), 86),
    (("appearance_style",), 90),
    (("color",), 85),
    (("object_class",), 79),
    (("multiple_objects",), 82),
    (("human_action",), 100),
    (("spatial_relationship",), 84),
    (("temporal_style",), 100),
    (("overall_consistency", "aesthetic_quality", "imaging_quality"), 93),
)


def write_info(path: Path, entries: list[tuple[str, list[str]]]) -> Path:
    path.write_text(
        json.dumps(
            [{"prompt_en": prompt, "dimension": names} for prompt, names in entries]
        )
    )
    return path


def real_info() -> Path | None:
    """The info file of an installed `vbench`, or that of VBENCH_INFO; it is not shipped here."""
    if "VBENCH_INFO" in os.environ:
        return Path(os.environ["VBENCH_INFO"])
    try:
        return installed_info()
    except ValueError:
        return None


@pytest.fixture
def standard(tmp_path: Path) -> Suite:
    """946 entries in VBench's groups; two prompts are in two groups, as in VBench's file."""
    entries = [
        (f"{names[0]} {i}", list(names))
        for names, count in GROUPS
        for i in range(count)
    ]
    for i in range(2):
        place = entries.index((f"overall_consistency {i}", list(GROUPS[-1][0])))
        entries[place] = (f"appearance_style {i}", list(GROUPS[-1][0]))
    return read_suite(write_info(tmp_path / "info.json", entries))


def check_standard(suite: Suite) -> None:
    """Counted by hand: 75 x 25 + 869 x 5 = 6220 videos, 5 x 944 = 4720 with 5 of each."""
    assert suite.is_standard
    assert len(suite.entries) == 946
    assert len(suite.prompts()) == 944
    videos = suite.videos(suite.prompts(), each=5, flickering=25)
    assert len(videos) == len({video.name for video in videos}) == 6220
    assert len(suite.videos(suite.prompts(), each=5, flickering=5)) == 4720
    paper = [
        "subject_consistency",
        "background_consistency",
        "aesthetic_quality",
        "imaging_quality",
        "dynamic_degree",
    ]
    assert len(suite.prompts(paper)) == 72 + 86 + 93  # DeScore's five dimensions
    assert sum(suite.count(name) for name in DIMENSIONS) == sum(
        len(names) * count for names, count in GROUPS
    )


def test_the_standard_suite_has_946_entries_and_6220_videos(standard: Suite) -> None:
    check_standard(standard)
    assert {name: count for names, count in GROUPS for name in names} == ENTRIES
    fewer = Suite(standard.path, standard.entries[:-1])
    assert not fewer.is_standard


@pytest.mark.skipif(
    real_info() is None, reason="no vbench is installed and VBENCH_INFO is not set"
)
def test_the_real_info_file_is_what_is_said_of_it() -> None:
    suite = read_suite(real_info())
    check_standard(suite)
    names = [
        video.name for video in suite.videos(suite.prompts(), each=5, flickering=25)
    ]
    assert "In a still frame, a stop sign-24.mp4" in names
    assert "A 3D model of a 1800s victorian house.-4.mp4" in names
    assert max(len(name.encode()) for name in names) == 210 + len("-0.mp4")
    assert (
        len({name.lower() for name in names}) == len(names) - 5
    )  # "A fantasy landscape" and "a fantasy landscape"


def test_a_file_is_called_by_the_whole_prompt(tmp_path: Path) -> None:
    suite = read_suite(
        write_info(
            tmp_path / "i.json",
            [("Mt. Fuji, 4 a.m.", ["scene"]), ("stop", [FLICKERING])],
        )
    )
    names = [
        video.name for video in suite.videos(suite.prompts(), each=2, flickering=3)
    ]
    assert names == [
        "Mt. Fuji, 4 a.m.-0.mp4",
        "Mt. Fuji, 4 a.m.-1.mp4",
        "stop-0.mp4",
        "stop-1.mp4",
        "stop-2.mp4",
    ]
    assert suite.prompts(["scene"]) == ["Mt. Fuji, 4 a.m."]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a / b", ["scene"])], "called"),
        ([("x" * 250, ["scene"])], "255"),
        ([("x", ["scenery"])], "scenery"),
        ([], "list"),
        ([("", ["scene"])], "prompt_en"),
    ],
)
def test_prompts_that_vbench_could_not_find_are_refused(
    tmp_path: Path, entries: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_suite(write_info(tmp_path / "info.json", entries))


def test_without_the_package_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vbench_suite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="info=PATH"):
        read_suite(None)


def test_rewritten_prompts_cover_the_suite_and_do_not_disagree(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [("a", " a long "), ("b", "b long"), ("a", "a long"), ("other", "o")]
    path.write_text(
        "".join(json.dumps({"prompt": p, "augmented": t}) + "\n" for p, t in rows)
    )
    assert read_rewritten(path, ["b", "a"]) == {"b": "b long", "a": "a long"}
    with pytest.raises(ValueError, match="'c'"):
        read_rewritten(path, ["a", "c"])
    path.write_text(path.read_text() + '{"prompt": "b", "augmented": "another"}\n')
    with pytest.raises(ValueError, match=":5:"):
        read_rewritten(path, ["a"])
    path.write_text('{"prompt": "b"}\n')
    with pytest.raises(ValueError, match=":1:"):
        read_rewritten(path, [])


# ------------------------------------------------------------------ scores

# total, quality, semantic and the 16 dimensions in VBench's order, in percent: rows of the
# public leaderboard as the README of Goku (2502.04896) prints them.
PUBLISHED = {
    "VideoCrafter-2.0": (
        "80.44 82.20 73.42 96.85 98.22 98.41 97.73 42.50 63.13 67.22 "
        "92.55 40.66 95.00 92.92 35.86 55.29 25.13 25.84 28.23"
    ),
    "Gen-3": (
        "82.32 84.11 75.17 97.10 96.62 98.61 99.23 60.14 63.34 66.82 "
        "87.81 53.64 96.40 80.90 65.09 54.57 24.31 24.71 26.69"
    ),
    "CogVideoX-5B": (
        "81.61 82.75 77.04 96.23 96.52 98.66 96.92 70.97 61.98 62.90 "
        "85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59"
    ),
    "Kling": (
        "81.85 83.39 75.68 98.33 97.60 99.30 99.40 46.94 61.21 65.62 "
        "87.24 68.05 93.40 89.90 73.03 50.86 19.62 24.17 26.42"
    ),
    "Mira": (
        "71.87 78.78 44.21 96.23 96.92 98.29 97.54 60.33 42.51 60.16 "
        "52.06 12.52 63.80 42.24 27.83 16.34 21.89 18.77 18.72"
    ),
    "HunyuanVideo": (
        "83.24 85.09 75.82 97.37 97.76 99.44 98.99 70.83 60.36 67.56 "
        "86.10 68.55 94.40 91.60 68.68 53.88 19.80 23.89 26.44"
    ),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_totals_come_out_of_their_dimensions(model: str) -> None:
    """To 0.01: the dimensions are printed with two digits, of which some are divided by 0.28."""
    total, quality, semantic, *found = (
        float(value) for value in PUBLISHED[model].split()
    )
    result = totals(
        {name: value / 100 for name, value in zip(DIMENSIONS, found, strict=True)}
    )
    assert 100 * result["total"] == pytest.approx(total, abs=0.01)
    assert 100 * result["quality"] == pytest.approx(quality, abs=0.01)
    assert 100 * result["semantic"] == pytest.approx(semantic, abs=0.01)


def test_the_ends_of_every_scale_are_0_and_1() -> None:
    """VBench's scripts/constant.py; what it does not list here fills 0..1."""
    ends = {
        "subject_consistency": (0.1462, 1.0),
        "background_consistency": (0.2615, 1.0),
        FLICKERING: (0.6293, 1.0),
        "motion_smoothness": (0.7060, 0.9975),
        "scene": (0.0, 0.8222),
        "appearance_style": (0.0009, 0.2855),
        "temporal_style": (0.0, 0.3640),
        "overall_consistency": (0.0, 0.3640),
    }
    for name in DIMENSIONS:
        low, high = ends.get(name, (0.0, 1.0))
        assert [normalised(name, low), normalised(name, high)] == [0.0, 1.0]


def test_totals_by_hand() -> None:
    """All at 1/2 give 1/2. With dynamic degree at 1, quality is (6/2 + 1/2) / 6.5."""
    middle = dict.fromkeys(DIMENSIONS, 0.5)
    middle |= {
        "subject_consistency": 0.5731,
        "background_consistency": 0.63075,
        FLICKERING: 0.81465,
    }
    middle |= {
        "motion_smoothness": 0.85175,
        "scene": 0.4111,
        "appearance_style": 0.1432,
    }
    middle |= {"temporal_style": 0.182, "overall_consistency": 0.182}
    assert totals(middle) == pytest.approx(
        {"quality": 0.5, "semantic": 0.5, "total": 0.5}
    )
    moving = totals({**middle, "dynamic_degree": 1.0})
    assert moving["quality"] == pytest.approx(3.5 / 6.5)
    assert moving["total"] == pytest.approx(0.8 * 3.5 / 6.5 + 0.2 * 0.5)
    assert (len(QUALITY), len(SEMANTIC)) == (7, 9)


def test_what_was_not_run_is_never_0() -> None:
    scores = dict.fromkeys(QUALITY, 0.9) | {"scene": None}
    found = totals(scores)
    assert found["quality"] is not None
    assert found["semantic"] is None
    assert found["total"] is None
    assert not any(
        value == 0 or (value is not None and math.isnan(value))
        for value in found.values()
    )
    table = markdown(
        {"base": {"scene": 0.25, "color": 0.0}, "tuned": {"scene": 0.5}}, ["a note"]
    )
    rows = {
        line.split(" | ")[0].removeprefix("| "): line
        for line in table.splitlines()
        if line.startswith("| ")
    }
    assert rows["scene"] == "| scene | 0.2500 | 0.5000 | +0.2500 |"
    assert rows["color"] == "| color | 0.0000 | not run |  |"
    assert rows["total"] == "| total | not run | not run |  |"
    assert table.endswith("\n- a note\n")
    assert len(rows) == 2 + 16 + 3
